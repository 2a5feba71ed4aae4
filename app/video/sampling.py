"""Which frames of a video to keep, from the times at which its frames are shown."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...integrations.errors import InputError

SCENE_THRESHOLD = 0.1
"""Mean absolute difference of two grey pictures in [0, 1] from which there is a cut between them: the default of
FFmpeg's filter `scdet` (10 on its scale of 0 to 100)."""
SAME_TIME = 1e-3
"""Seconds by which two times of one frame may differ."""


@dataclass(frozen=True)
class Choice:
    """Which frames are asked for; the arguments of `read_video`."""

    fps: float | None
    max_frames: int
    sampling: str
    indices: list[int] | None
    known_times: list[tuple[int, float]]

    def count(self, seconds: np.ndarray) -> int:
        return frame_count(seconds, self.fps, self.max_frames)

    def check_known_times(self, seconds: np.ndarray, path: Path) -> None:
        """
        Args:
            seconds: (N,) float64: when each frame of the file is shown.
            path: the file.

        Raises:
            InputError: a frame of `known_times` is not there, or is shown at another time.
        """
        for index, time in self.known_times:
            if not (0 <= index < len(seconds) and abs(seconds[index] - time) <= SAME_TIME):
                raise InputError(f"{path} has no frame {index} at {time:.3f} s, as it had before: it is another video")


def frame_count(seconds: np.ndarray, fps: float | None, max_frames: int) -> int:
    """How many frames to keep: `fps` a second of video where given, `max_frames` at most, and 1 at least."""
    count = max_frames if fps is None else min(max_frames, max(round(_duration(seconds) * fps), 1))
    return min(count, len(seconds))


def uniform(seconds: np.ndarray, count: int) -> np.ndarray:
    """The frames that are shown in the middle of `count` equal shares of the video's duration.

    Args:
        seconds: (N,) float64, ascending: when each frame is shown.
        count: frames to keep; with a variable frame rate two shares may show the same frame, which is kept once.

    Returns:
        (at most `count`,) int64, ascending indices into `seconds`.
    """
    if count >= len(seconds):
        return np.arange(len(seconds))
    duration = _duration(seconds)
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
    kept = []
    for first, last, duration, share in zip(edges, edges[1:], durations, shares, strict=False):
        middles = ends[first] + (np.arange(share) + 0.5) * duration / share
        within = np.searchsorted(seconds, middles, side="right") - 1
        kept.append(np.clip(within, first, last - 1) if share < last - first else np.arange(first, last))
    return np.unique(np.concatenate(kept))


def _duration(seconds: np.ndarray) -> float:
    """From the first frame to the end of the last, which is taken to last as long as a frame does on average."""
    span = float(seconds[-1] - seconds[0])
    return span + span / max(len(seconds) - 1, 1)


def check_indices(indices: list[int], n_frames: int) -> np.ndarray:
    """(t,) int64.

    Raises:
        InputError: they are not ascending, or not within the `n_frames` that there are.
    """
    wanted = np.array(indices, dtype=np.int64)
    if not len(wanted) or wanted[0] < 0 or wanted[-1] >= n_frames or (np.diff(wanted) <= 0).any():
        raise InputError(f"indices: expected ascending numbers from 0 to {n_frames - 1}, got {indices}")
    return wanted
