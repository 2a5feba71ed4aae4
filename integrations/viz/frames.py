"""The frames of a finished run, read again from its video."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..video.reader import VideoClip, read_video
from .finished_run import FinishedRun

if TYPE_CHECKING:
    from ..video.decoding import VideoFile

Progress = Callable[[str, int, int], None]
_ALL_VIEWS = 1_000_000


def video_of(run: FinishedRun, asked: Path | None) -> Path:
    """Where the run's video, or folder of views, is: `asked`, else where the run had it.

    Raises:
        InputError: when nothing is there.
    """
    path = Path(run.record["video"]) if asked is None else asked
    if not path.exists():
        known = "the video of this run is no longer at" if asked is None else "no video at"
        raise InputError(f"{known} {path}: give --video FILE")
    return path


def read_clip(run: FinishedRun, path: Path, progress: Progress) -> VideoClip:
    """The run's sampled frames.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    if _is_views(path):
        clip = read_video(path, max_frames=_ALL_VIEWS, progress=progress)
        _check_times(run, path, clip.timestamps)
        return clip.take(run.indices)
    with _open(path, progress) as file:
        _check_times(run, path, file.table.seconds)
        frames = [frame for _, frame in _pictures(file, run.indices)]
        if len(frames) < len(run.indices):
            raise InputError(f"{path}: {len(run.indices) - len(frames)} of the run's frames cannot be decoded any more")
        return VideoClip(np.stack(frames), run.timestamps, run.indices, len(file.table.times), file.table.fps)


def source_frames(path: Path, progress: Progress) -> Iterator[tuple[float, np.ndarray]]:
    """All frames of a video, or views of a folder, as (seconds, (H, W, 3) uint8 RGB); a video's one at a time.

    Raises:
        InputError: when it cannot be read.
    """
    if _is_views(path):
        clip = read_video(path, max_frames=_ALL_VIEWS, progress=progress)
        yield from zip(clip.timestamps, clip.frames, strict=True)
        return
    with _open(path, progress) as file:
        for index, frame in _pictures(file, np.arange(len(file.table.times))):
            yield float(file.table.seconds[index]), frame


def _is_views(path: Path) -> bool:
    from ..video.views import is_views

    return is_views(path)


def _open(path: Path, progress: Progress) -> "closing[VideoFile]":
    import av.error

    from ..video.decoding import VideoFile

    try:
        return closing(VideoFile(path, progress))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}): give --video FILE") from error


def _pictures(file: "VideoFile", wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Index and pixels; a frame of another size than the first is scaled into it."""
    from ..video.views import letterbox

    size = None
    for index, frame in file.frames(wanted):
        pixels = file.picture(frame)
        size = size or pixels.shape[:2]
        yield index, letterbox(pixels, *size)


def _check_times(run: FinishedRun, path: Path, seconds: np.ndarray) -> None:
    if run.indices[-1] >= len(seconds) or np.abs(seconds[run.indices] - run.timestamps).max() > 1e-3:
        raise InputError(
            f"{path} has no frames at the times at which the run had them: it is another video; give --video FILE"
        )
