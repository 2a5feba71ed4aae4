"""Frames out of a video file, with their exact timestamps (PyAV)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError


@dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames of one video.

    Args:
        frames: (T, H, W, 3) uint8, RGB.
        timestamps: (T,) float64, seconds from the start of the video, as recorded in the file.
        indices: (T,) int64, positions of the frames among all frames of the file, in display order.
        n_source_frames: frames in the file.
        source_fps: frames per second of the file, on average.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    n_source_frames: int
    source_fps: float

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.n_source_frames / self.source_fps

    @property
    def sampled_fps(self) -> float:
        """Sampled frames per second of video."""
        return len(self.frames) / self.duration


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    max_frames: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> VideoClip:
    """Decodes `path` and keeps evenly spaced frames.

    Args:
        path: a file that FFmpeg can read.
        fps: frames to keep per second of video; None for `max_frames` over the whole video.
        max_frames: at most so many frames, then spread over the whole video.
        progress: called with ("decode", frames decoded, frames in the file).

    Raises:
        InputError: when the file is missing, is no video, or holds no frame that can be decoded; when an argument is
            not positive.
    """
    import av
    import av.error

    path = Path(path)
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise InputError(f"fps: expected a positive number, got {fps}")
    if max_frames < 1:
        raise InputError(f"max_frames: expected 1 or more, got {max_frames}")
    if not path.is_file():
        raise InputError(f"no video file at {path}: check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream: give a file with pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            times = _frame_times(container, stream)
            time_base = float(stream.time_base or 1.0)
            wanted = _choose(times * time_base, fps, max_frames)
            container.seek(0, stream=stream)
            frames: dict[int, np.ndarray] = {}
            for n, frame in enumerate(container.decode(stream)):
                index = int(np.searchsorted(times, frame.pts)) if frame.pts is not None else n
                if index in wanted and index not in frames:
                    frames[index] = frame.to_ndarray(format="rgb24")
                if progress is not None:
                    progress("decode", min(n + 1, len(times)), len(times))
                if len(frames) == len(wanted):
                    break
            mean_fps = _mean_fps(times, time_base, float(stream.average_rate or 0))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}): check the file, or convert it to MP4") from error
    if not frames:
        raise InputError(f"{path} holds no frame that can be decoded: check the file, or convert it to MP4")
    indices = np.array(sorted(frames), dtype=np.int64)
    return VideoClip(
        frames=np.stack([frames[index] for index in indices]),
        timestamps=(times[indices] - times[0]) * time_base,
        indices=indices,
        n_source_frames=len(times),
        source_fps=mean_fps,
    )


def _frame_times(container, stream) -> np.ndarray:
    """Presentation times of all frames, sorted, in units of the stream's time base. Reads packets, decodes nothing."""
    times = [packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size]
    if not times:
        raise InputError(
            f"{container.name} holds no frame with a timestamp: give a video with at least one (a bare stream has to "
            "be put into a container first: ffmpeg -i FILE out.mp4)"
        )
    return np.unique(np.array(times, dtype=np.int64))


def _choose(seconds: np.ndarray, fps: float | None, max_frames: int) -> set[int]:
    """Indices of the frames that are shown in the middle of equal shares of the video's duration."""
    frame = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    duration = seconds[-1] - seconds[0] + frame  # the last frame lasts too
    count = max_frames if fps is None else min(max_frames, max(round(duration * fps), 1))
    if count >= len(seconds):
        return set(range(len(seconds)))
    middles = seconds[0] + (np.arange(count) + 0.5) * duration / count
    return {int(index) for index in np.searchsorted(seconds, middles, side="right") - 1}


def _mean_fps(times: np.ndarray, time_base: float, declared: float) -> float:
    seconds = float(times[-1] - times[0]) * time_base
    return (len(times) - 1) / seconds if seconds > 0 else declared or 1.0


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
