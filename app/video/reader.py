"""Frames out of a video file or images, with their exact timestamps."""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ...integrations.errors import InputError
from ..atomic_write import replacing
from . import process
from .limits import MAX_PIXELS
from .remote import MAX_DOWNLOAD, located
from .sampling import Progress, Request, Sampling, SoundRequest
from .views import SUFFIXES, is_views

Source = str | Path | Sequence[str | Path]
"""A video file, an image, a folder of images, or a list of images."""
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
            among the images of the folder, in natural order of their names, or of the list.
        n_source_frames: frames in the file, or images in the folder.
        source_fps: frames per second of the file, on average; 1 for views.
        n_decoded: frames that were decoded to get these.
        notes: what the user should know: the file is cut short, images were scaled.
        names: (T,) file names of views; empty for a video.

    Examples:
        >>> import numpy as np
        >>> import videoanchor_triton as va
        >>> frames = np.zeros((4, 112, 168, 3), dtype=np.uint8)  # from a decoder of yours: 4 of 40 frames, 10 a second
        >>> clip = va.VideoClip(frames, np.arange(4.0), 10 * np.arange(4), n_source_frames=40, source_fps=10.0)
        >>> clip.duration, clip.sampled_fps
        (4.0, 1.0)

    See Also:
        read_video: makes one from a file.
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
    def is_image(self) -> bool:
        """It is one image, not a video or one view of several."""
        return self.n_source_frames == len(self.names) == 1

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


Clips: TypeAlias = VideoClip | Sequence[VideoClip]
"""What a prompt is about: one, or several in its order."""


def each_clip(clips: Clips) -> Sequence[VideoClip]:
    """All of them, also where there is one."""
    return [clips] if isinstance(clips, VideoClip) else clips


def frames_of(clips: Clips) -> list[np.ndarray]:
    """Each (H, W, 3) uint8, of all clips after one another."""
    return [frame for clip in each_clip(clips) for frame in clip.frames]


def read_video(
    path: Source,
    *,
    fps: float | None = None,
    max_frames: int = 32,
    sampling: Sampling = "uniform",
    indices: Sequence[int] | None = None,
    known_times: Mapping[int, float] | None = None,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    max_download: int = MAX_DOWNLOAD,
    progress: Progress | None = None,
) -> VideoClip:
    """Decodes a video, in a process of its own, and keeps some of its frames; or reads images as the views of a scene.

    No broken file can hang or end the calling process, or take more memory than `limits` allows. All packets of a video
    are read for the exact times of its frames; decoded is only what lies between a kept frame and the keyframe before
    it.

    Args:
        path: a file that FFmpeg can read, an image, a folder of images (in natural order of their names: view2 before
            view10), or a list of images; or the URL of a video or an image (`http`, `s3`, `hf` and whatever fsspec
            knows), which is fetched into a folder of this machine, see `remote.located`. Several videos are several
            clips: read each by itself.
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
        max_download: bytes that the file of a URL may have.
        progress: see `Progress`.

    Returns:
        frames (T, H, W, 3) uint8, RGB, upright, with timestamps (T,) float64 in seconds; see `VideoClip`. Frames that
        cannot be decoded are left out, which a note says; images of several sizes get black bars.

    Raises:
        InputError: (a ValueError) when the file is missing, no video, or too large, or holds no frame that can
            be decoded; when it is damaged and `strict` is set; when the process that reads it crashes or hangs; when an
            argument is out of its range; when the frames would not fit the memory.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from videoanchor_triton.app.video.reader import read_video, write_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_video(f"{folder}/grey.mp4", np.full((12, 48, 64, 3), 128, np.uint8), fps=4)
        ...     clip = read_video(f"{folder}/grey.mp4", max_frames=3)
        >>> clip.frames.shape, clip.frames.dtype.name
        ((3, 48, 64, 3), 'uint8')
        >>> clip.indices.tolist(), clip.timestamps.tolist(), clip.duration
        ([2, 6, 10], [0.5, 1.5, 2.5], 3.0)
    """
    source = _source(located(path, max_download, progress) if isinstance(path, str) else path)
    request = Request(source, max_pixels, strict, fps, max_frames, sampling, indices, dict(known_times or {}))
    frames, n_frames, fields = np.empty((0, 0, 0, 3), np.uint8), 0, dict[str, Any]()
    with closing(_answers(request, timeout, progress)) as answers:
        for kind, *content in answers:
            if kind == "clip":
                fields = content[0]
                continue
            pixels, _, count = content
            if n_frames == 0:
                frames = _empty_frames(request.name, count, *pixels.shape[:2])
            frames[n_frames] = pixels
            n_frames += 1
            if progress is not None:
                progress("decode", n_frames, count)
    return VideoClip(frames=frames[:n_frames], **fields)


def stream_video(
    path: Source,
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
    request = Request(_source(path), max_pixels, strict, known_times=dict(known_times or {}))
    with closing(_answers(request, timeout, progress)) as answers:
        for kind, *content in answers:
            if kind == "frame":
                yield content[1], content[0]


def add_sound(
    pictures: Path, path: Path, start: float, *, timeout: float = DEFAULT_TIMEOUT, progress: Progress | None = None
) -> str | None:
    """Puts the sound of a video, as it is, under pictures that were made from it; read in a process of its own.

    Args:
        pictures: an MP4 without sound, which is replaced; as it was where there is no sound.
        path: the video with the sound.
        start: seconds, counted from the first frame of the video, at which the pictures begin.
        timeout, progress: see `read_video`.

    Returns:
        why the sound had to be left out; None where it is there, or there is none.

    Raises:
        InputError: `path` cannot be read.
    """
    with (
        replacing(pictures) as out,
        closing(_answers(SoundRequest(path, pictures, out, start), timeout, progress)) as a,
    ):
        ((_, found),) = a
    if found["left_out"] is None:
        return None
    return f"its sound ({found['sound']}) does not fit into MP4 and is left out: {found['left_out']}"


def _answers(request: Request | SoundRequest, timeout: float, progress: Progress | None) -> Generator[tuple[Any, ...]]:
    """("frame", pixels, seconds, count) for each, and at last ("clip", the other fields of `VideoClip`)."""
    if not (np.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout: expected a positive number of seconds, got {timeout}")
    return process.answers(request, timeout, progress or (lambda *_: None))


def _source(path: Source) -> Path | list[Path]:
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise InputError("path: expected a video, an image, a folder or a list of images, got an empty list")
    for one in paths:
        check_path(one)
        if len(paths) > 1 and not (one.is_file() and is_views(one)):
            suffixes = ", ".join(sorted(SUFFIXES))
            raise InputError(f"{one} is no image ({suffixes}): a list is one scene; read each video by itself")
    return paths if len(paths) > 1 else paths[0]


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
        raise InputError(f"{url[1]}//{url[2]}: a URL goes in as text, alone and not as a Path")


def _empty_frames(name: str, count: int, height: int, width: int) -> np.ndarray:
    needed = count * height * width * 3
    if needed > _CHECKED_BYTES:
        import torch

        from ...anchor.memory import available_memory_bytes

        free = available_memory_bytes(torch.device("cpu"))
        if free is not None and needed > free:
            raise InputError(
                f"{name}: {count} frames of {width} x {height} pixels take {needed / 2**30:.1f} GiB and "
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
