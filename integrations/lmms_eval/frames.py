"""How the transformers processors of InternVL and LLaVA-OneVision get at the frames of a video file."""

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers.utils import import_utils
from transformers.video_utils import load_video

SampleFrames = Callable[..., Any]


def sample_evenly(n_frames: int) -> SampleFrames:
    """`n_frames` frames from the first to the last, as LLaVA-OneVision was trained."""
    return lambda metadata, **_: np.linspace(0, metadata.total_num_frames - 1, n_frames).astype(int)


def set_frame_sampling(video_processor: Any, n_frames: int, sample: SampleFrames | None = None) -> None:
    """Makes a video processor read the frames of a file as follows, and all frames of a shorter video, which the
    processors themselves refuse. torchcodec decodes where it works, else PyAV.

    Args:
        video_processor: of transformers; changed in place.
        n_frames: frames that are sampled, >= 1.
        sample: from the video's metadata to frame indices; None leaves it to the processor.
    """
    usable = getattr(import_utils, "is_torchcodec_usable", None)
    backend = "torchcodec" if usable is not None and usable(decode="video") else "pyav"

    def fetch(video: Any, sample_indices_fn: SampleFrames | None = None) -> Any:
        if isinstance(video, list):
            return list(zip(*(fetch(one, sample_indices_fn) for one in video), strict=True))
        chosen = sample or sample_indices_fn

        def indices(metadata: Any, **settings: Any) -> Any:
            if chosen is None or metadata.total_num_frames <= n_frames:
                return np.arange(metadata.total_num_frames)
            return chosen(metadata=metadata, **settings)

        return load_video(video, backend=backend, sample_indices_fn=indices)

    video_processor.fetch_videos = fetch
