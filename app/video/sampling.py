"""What is asked for, and which frames of a video that is, from the times at which they are shown."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ...integrations.errors import InputError
from .limits import MAX_PIXELS

Sampling = Literal["uniform", "scene"]
Progress = Callable[[str, int, int], None]
"""Called with a stage ("read", "decode"), how much of it is done, and how much there is (0: not known)."""
SCENE_THRESHOLD = 0.1
"""Mean absolute difference of two grey pictures in [0, 1] from which there is a cut between them: the default of
FFmpeg's filter `scdet` (10 on its scale of 0 to 100)."""
SAME_TIME = 1e-3
"""Seconds by which two times of one frame may differ."""


@dataclass(frozen=True)
class Request:
    """What to read: a video, an image, a folder of images, or several images; the others are arguments of `read_video`.

    Raises:
        InputError: one is out of its range.
    """

    source: Path | list[Path]
    max_pixels: int = MAX_PIXELS
    strict: bool = False
    fps: float | None = None
    max_frames: int = sys.maxsize
    sampling: Sampling = "uniform"
    indices: Sequence[int] | None = None
    known_times: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise InputError(f"max_pixels: expected 1 or more, got {self.max_pixels}")
        if self.fps is not None and not (np.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"fps: expected a positive number, got {self.fps}")
        if self.max_frames < 1:
            raise InputError(f"max_frames: expected 1 or more, got {self.max_frames}")
        if self.sampling not in get_args(Sampling):
            raise InputError(f"sampling: expected one of {', '.join(get_args(Sampling))}, got {self.sampling!r}")

    @property
    def name(self) -> str:
        """Of the source, for messages."""
        if isinstance(self.source, Path):
            return str(self.source)
        return f"{self.source[0]} and {len(self.source) - 1} other images"

    def frames(self, seconds: np.ndarray, scene_cuts: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """The frames to keep.

        Args:
            seconds: (N,) float64, ascending: when each frame of the source is shown.
            scene_cuts: called with how many frames to keep; returns `cuts` and `strengths` of `by_scene`.

        Returns:
            (t,) int64, ascending indices into `seconds`.

        Raises:
            InputError: a frame that is asked for is not there, or one of `known_times` is shown at another time.
        """
        for index, time in self.known_times.items():
            if not (0 <= index < len(seconds) and abs(seconds[index] - time) <= SAME_TIME):
                raise InputError(
                    f"{self.name} has no frame {index} at {time:.3f} s, as it had before: it is another video"
                )
        if self.indices is not None:
            wanted = np.array(self.indices, dtype=np.int64)
            if not len(wanted) or wanted[0] < 0 or wanted[-1] >= len(seconds) or (np.diff(wanted) <= 0).any():
                numbers = f"ascending numbers from 0 to {len(seconds) - 1}"
                raise InputError(f"indices: expected {numbers}, got {wanted.tolist()}")
            return wanted
        count = self.max_frames
        if self.fps is not None:
            count = min(count, max(round(_duration(seconds) * self.fps), 1))
        count = min(count, len(seconds))
        if self.sampling == "scene":
            return by_scene(seconds, *scene_cuts(count), count)
        return uniform(seconds, count)


@dataclass(frozen=True)
class SoundRequest:
    """What to put together: the pictures of one file and the sound of another, from which they were made.

    Args:
        source: the video with the sound.
        pictures: a video without sound.
        out: file to write.
        start: seconds of the source, counted from its first frame, at which the pictures begin.
    """

    source: Path
    pictures: Path
    out: Path
    start: float

    @property
    def name(self) -> str:
        """Of the source, for messages."""
        return str(self.source)


def uniform(seconds: np.ndarray, count: int, duration: float | None = None) -> np.ndarray:
    """The frames that are shown in the middle of `count` equal shares of the video's duration.

    Args:
        seconds: (N,) float64, ascending: when each frame is shown.
        count: frames to keep; with a variable frame rate two shares may show the same frame, which is kept once.
        duration: seconds; None for that of the frames.

    Returns:
        (at most `count`,) int64, ascending indices into `seconds`.
    """
    if count >= len(seconds):
        return np.arange(len(seconds))
    duration = _duration(seconds) if duration is None else duration
    middles = seconds[0] + (np.arange(count) + 0.5) * duration / count
    return np.unique(np.searchsorted(seconds, middles, side="right") - 1)


def by_scene(seconds: np.ndarray, cuts: np.ndarray, strengths: np.ndarray, count: int) -> np.ndarray:
    """At least one frame of every scene, further ones where scenes are long; evenly spaced within a scene.

    Args:
        seconds: (N,) float64, ascending: when each frame is shown.
        cuts: (C,) int64 indices into `seconds`, ascending, above 0: the first frame of each scene but the first.
        strengths: (C,) float64: with more than `count` scenes, the weakest cuts are passed over.
        count: frames to keep.

    Returns:
        (at most `count`,) int64, ascending indices into `seconds`.
    """
    strongest = np.sort(cuts[np.argsort(-strengths, kind="stable")[: count - 1]])
    edges = np.concatenate([[0], strongest, [len(seconds)]]).astype(np.int64)
    ends = np.append(seconds, seconds[0] + _duration(seconds))
    durations, n_frames = np.diff(ends[edges]), np.diff(edges)
    shares = np.ones(len(n_frames), dtype=np.int64)
    for _ in range(min(count, len(seconds)) - len(shares)):
        shares[np.argmax(np.where(shares < n_frames, durations / shares, -1.0))] += 1
    scenes = zip(edges, edges[1:], shares.tolist(), durations.tolist(), strict=False)
    kept = [first + uniform(seconds[first:end], share, duration) for first, end, share, duration in scenes]
    return np.concatenate(kept)


def _duration(seconds: np.ndarray) -> float:
    """From the first frame to the end of the last, which is taken to last as long as a frame does on average."""
    span = float(seconds[-1] - seconds[0])
    return span + span / max(len(seconds) - 1, 1)
