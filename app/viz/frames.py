"""The frames of a finished run, read again from its video."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...integrations.errors import InputError
from ..video.limits import MAX_PIXELS
from ..video.reader import DEFAULT_TIMEOUT, Progress, VideoClip, read_video, refuse_url, stream_video
from .finished_run import FinishedRun


def video_of(run: FinishedRun, asked: Path | None) -> Path:
    """Where the run's video, or folder of views, is: `asked`, else where the run had it.

    Raises:
        InputError: when nothing is there.
    """
    path = Path(run.record["video"]) if asked is None else asked
    if not path.exists():
        refuse_url(path)
        known = "the video of this run is no longer at" if asked is None else "no video at"
        raise InputError(f"{known} {path}: give --video FILE")
    return path


def read_clip(
    run: FinishedRun, path: Path, progress: Progress, timeout: float = DEFAULT_TIMEOUT, strict: bool = False
) -> VideoClip:
    """The run's sampled frames.

    Args:
        path, progress, timeout, strict: see `read_video`.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    with _or_elsewhere():
        clip = read_video(
            path,
            indices=run.indices.tolist(),
            known_times=_times(run),
            max_pixels=_max_pixels(run),
            strict=strict,
            timeout=timeout,
            progress=progress,
        )
        if len(clip.frames) < len(run.indices):
            lost = len(run.indices) - len(clip.frames)
            raise InputError(f"{path}: {lost} of the run's frames cannot be decoded any more")
    return clip


def source_frames(
    run: FinishedRun, path: Path, progress: Progress, timeout: float = DEFAULT_TIMEOUT, strict: bool = False
) -> Generator[tuple[float, np.ndarray]]:
    """All frames of the run's video, or views of its folder, one at a time: see `stream_video`.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    with _or_elsewhere():
        yield from stream_video(
            path,
            known_times=_times(run),
            max_pixels=_max_pixels(run),
            strict=strict,
            timeout=timeout,
            progress=progress,
        )


def _max_pixels(run: FinishedRun) -> int:
    return run.record.get("max_pixels", MAX_PIXELS)


def _times(run: FinishedRun) -> dict[int, float]:
    return dict(zip(run.indices.tolist(), run.timestamps.tolist(), strict=True))


@contextmanager
def _or_elsewhere() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; where the run's video is elsewhere, give --video FILE") from error
