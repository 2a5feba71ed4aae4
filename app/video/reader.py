"""Frames out of a video file, an image or a folder of images, with their exact timestamps."""

import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...integrations.errors import InputError
from .limits import MAX_PIXELS
from .process import Answers, child
from .sampling import Choice

Sampling = Literal["uniform", "scene"]
Progress = Callable[[str, int, int], None]
"""Called with a stage ("read", "decode"), how much of it is done, and how much there is (0: not known)."""
DEFAULT_TIMEOUT = 120.0
_URL = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+:)/+(.*)")
"""A `Path` has one slash where a URL has two; the path of a folder may stand before it."""
_CHECKED_BYTES = 2**30
"""Clips larger than this are compared with the free memory before they are read."""


@dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames of one video, or the views of a scene.

    Args:
        frames: (T, H, W, 3) uint8, RGB, upright.
        timestamps: (T,) float64, seconds from the start of the video, as recorded in the file; views count as one a
            second.
        indices: (T,) int64, positions of the frames among all frames of the file, in display order, or of the views
            among the images of the folder, in natural order of their names.
        n_source_frames: frames in the file, or images in the folder.
        source_fps: frames per second of the file, on average; 1 for views.
        n_decoded: frames that were decoded to get these.
        notes: what the user should know: the file is cut short, images were scaled.
        names: (T,) file names of views; empty for a video.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    n_source_frames: int
    source_fps: float
    n_decoded: int = 0
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.n_source_frames / self.source_fps

    @property
    def sampled_fps(self) -> float:
        """Sampled frames per second of video."""
        return len(self.frames) / self.duration

    def take(self, positions: np.ndarray) -> "VideoClip":
        """The clip of the frames at `positions`, (t,) ascending indices into `frames`."""
        names = tuple(self.names[n] for n in positions) if self.names else ()
        return replace(
            self,
            frames=self.frames[positions],
            timestamps=self.timestamps[positions],
            indices=self.indices[positions],
            names=names,
        )


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    max_frames: int = 32,
    sampling: Sampling = "uniform",
    indices: Sequence[int] | None = None,
    known_times: Mapping[int, float] | None = None,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    progress: Progress | None = None,
) -> VideoClip:
    """Decodes `path`, in a process of its own, and keeps some of its frames.

    No broken file can hang or end the calling process, or take more memory than `limits` allows. All packets of a video
    are read for the exact times of its frames; decoded is only what lies between a kept frame and the keyframe before
    it.

    Args:
        path: a file that FFmpeg can read, an image, or a folder of images.
        fps: frames to keep per second of video; None for `max_frames` over the whole video.
        max_frames: at most so many frames, then spread over the whole video.
        sampling: "uniform" keeps the middles of equal shares of the duration; "scene" (videos only) at least one frame
            of each scene, and more of long ones, found between keyframes where there are twice as many as frames to
            keep, else between all frames.
        indices: keep these frames, ascending positions among all frames (or images) in the file, whatever the above
            say; those of a clip read before give that clip again.
        known_times: seconds of some frames by their position, from when the file was read before: one that shows them
            at other times is refused as another video.
        max_pixels: larger frames are scaled down to at most so many, which a note says; at most `limits.SOURCE_PIXELS`
            are decoded at all.
        strict: refuse a file that shows a sign of damage, of which there is a note otherwise. Not every damage shows:
            there is no sign of it inside the frames of VP8 and VP9, mostly none in HEVC and AV1, and none in JPEG.
        timeout: seconds without progress after which the process is ended.
        progress: see `Progress`.

    Raises:
        InputError: when the file is missing, a URL, no video, or too large, or holds no frame that can be decoded; when
            it is damaged and `strict` is set; when the process that reads it crashes or hangs; when an argument is out
            of its range; when the frames would not fit the memory.
    """
    path = Path(path)
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise InputError(f"fps: expected a positive number, got {fps}")
    if max_frames < 1:
        raise InputError(f"max_frames: expected 1 or more, got {max_frames}")
    if sampling not in get_args(Sampling):
        raise InputError(f"sampling: expected one of {', '.join(get_args(Sampling))}, got {sampling!r}")
    asked = None if indices is None else [int(index) for index in indices]
    frames, n_frames = np.empty((0, 0, 0, 3), np.uint8), 0
    choice = _choice(fps, max_frames, sampling, asked, known_times)
    with _child(path, choice, max_pixels, timeout) as answers:
        while "clip" not in (answer := answers.line()):
            if "frame" in answer:
                height, width, count = answer["frame"]
                if n_frames == 0:
                    frames = _empty_frames(path, count, height, width)
                answers.fill(frames[n_frames])
                n_frames += 1
            if progress is not None:
                progress(*answer.get("progress", ("decode", n_frames, len(frames))))
    clip = answer["clip"]
    if strict:
        _refuse_damage(path, clip)
    return VideoClip(
        frames=frames[:n_frames],
        timestamps=np.array(clip["timestamps"], dtype=np.float64),
        indices=np.array(clip["indices"], dtype=np.int64),
        n_source_frames=clip["n_source_frames"],
        source_fps=clip["source_fps"],
        n_decoded=clip["n_decoded"],
        notes=(*clip["damage"], *clip["notes"]),
        names=tuple(clip.get("names", ())),
    )


def stream_video(
    path: str | Path,
    *,
    known_times: Mapping[int, float] | None = None,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    progress: Progress | None = None,
) -> Generator[tuple[float, np.ndarray]]:
    """All frames of a video, or views of a folder, one at a time; decoded as by `read_video`, in a process that is
    ended when the generator is. Frames that cannot be decoded are left out.

    Args:
        path, known_times, max_pixels, strict, timeout, progress: see `read_video`.

    Yields:
        seconds from the start of the video, and (H, W, 3) uint8 RGB, upright, of the first frame's size.

    Raises:
        InputError: as `read_video` does, when the first frame is asked for or at the frame that cannot be had; for
            `strict` after the last.
    """
    choice = _choice(None, sys.maxsize, "uniform", None, known_times)
    with _child(Path(path), choice, max_pixels, timeout) as answers:
        while "clip" not in (answer := answers.line()):
            if "frame" in answer:
                height, width, _ = answer["frame"]
                frame = np.empty((height, width, 3), np.uint8)
                answers.fill(frame)
                yield answer["seconds"], frame
            elif progress is not None:
                progress(*answer["progress"])
    if strict:
        _refuse_damage(path, answer["clip"])


def check_path(path: Path) -> None:
    """
    Raises:
        InputError: it is a URL, or there is no file or folder.
    """
    if not (path.is_file() or path.is_dir()):
        refuse_url(path)
        raise InputError(f"no video file at {path}: check the path")


def refuse_url(path: Path) -> None:
    """For what is not there.

    Raises:
        InputError: it is a URL.
    """
    if url := _URL.search(str(path)):
        raise InputError(f"{url[1]}//{url[2]}: URLs are not supported: download it first, and give the file's path")


def _refuse_damage(path: str | Path, clip: dict[str, Any]) -> None:
    if clip["damage"]:
        raise InputError(f"{path} is refused (--strict): {'; '.join(clip['damage'])}")


def _choice(
    fps: float | None,
    max_frames: int,
    sampling: Sampling,
    indices: list[int] | None,
    known_times: Mapping[int, float] | None,
) -> Choice:
    known = [(int(index), float(time)) for index, time in (known_times or {}).items()]
    return Choice(fps, max_frames, sampling, indices, known)


def _child(path: Path, choice: Choice, max_pixels: int, timeout: float) -> AbstractContextManager[Answers]:
    if not (np.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout: expected a positive number of seconds, got {timeout}")
    if max_pixels < 1:
        raise InputError(f"max_pixels: expected 1 or more, got {max_pixels}")
    check_path(path)
    return child({"path": str(path), "max_pixels": max_pixels, "choice": asdict(choice)}, timeout)


def _empty_frames(path: Path, count: int, height: int, width: int) -> np.ndarray:
    needed = count * height * width * 3
    if needed > _CHECKED_BYTES:
        import torch

        from ...anchor.memory import available_memory_bytes

        free = available_memory_bytes(torch.device("cpu"))
        if free is not None and needed > free:
            raise InputError(
                f"{path}: {count} frames of {width} x {height} pixels take {needed / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free: try --max-frames {max(free // 2 * count // needed, 1)}, or "
                "a smaller --max-pixels"
            )
    return np.empty((count, height, width, 3), np.uint8)


def write_video(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Writes (T, H, W, 3) uint8 RGB frames as H.264 in MP4 (H and W even)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]  # pyright: ignore[reportAttributeAccessIssue]
        stream.pix_fmt = "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))  # pyright: ignore
        container.mux(stream.encode(None))  # pyright: ignore
