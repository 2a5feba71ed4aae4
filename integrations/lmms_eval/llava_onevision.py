"""`lmms-eval --model llava_onevision_videoanchor`."""

import os
from typing import Any

from lmms_eval.models.chat.llava_hf import LlavaHf  # pyright: ignore[reportMissingImports]

from .frames import sample_evenly, set_frame_sampling
from .gated_model import GatedModel


class LlavaOnevisionVideoAnchor(GatedModel, LlavaHf):
    """lmms-eval's `llava_hf` with the gate, for LLaVA-OneVision checkpoints in transformers' own format (-hf): its
    arguments, and those of `split_settings`.

    Where `llava_hf` gives the model every frame of a video, this gives it `max_frames_num` of them. Several images of
    one question are given whole, as LLaVA-OneVision was trained; `llava_hf` cuts each into tiles.
    """

    def __init__(self, **arguments: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            arguments.setdefault("device_map", arguments.get("device") or "cuda")
        super().__init__(**arguments)
        processor = self._image_processor
        set_frame_sampling(processor.video_processor, self.max_frames_num, sample_evenly(self.max_frames_num))
        self._image_processor = _OneQuestionProcessor(processor)


class _OneQuestionProcessor:
    """A processor that takes the list of images of one question, which may be empty."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, images: list[Any], **inputs: Any) -> Any:
        return self._processor(images=[images] if images else None, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)
