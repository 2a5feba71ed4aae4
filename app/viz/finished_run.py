"""A finished run, read from its folder, and its frames, read again from its video."""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ...integrations.errors import InputError
from ..text import printable
from ..token_grid import Grid, JoinedGrid, TokenGrid, joined
from ..video.limits import MAX_PIXELS
from ..video.names import Video, each, sha256s_of
from ..video.reader import VideoClip, read_video, refuse_url, stream_video
from ..video.remote import MAX_DOWNLOAD, located, shown_url
from ..video.sampling import Progress

Frames: TypeAlias = Sequence[np.ndarray] | np.ndarray
"""The sampled frames of a run, each (H, W, 3) uint8; those of several videos may differ in size."""


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What `videoanchor run` left in a folder.

    Args:
        folder: the folder.
        record: what result.json holds.
        grid: where the visual tokens lie; of several videos and images one grid after another.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 subspace of each token.
        timestamps: (T,) float64 seconds of the sampled frames, of all videos.
        indices: (T,) int64 positions of the sampled frames in their video.
        groups: (N,) int64 group of each token, -1 of one that was dropped; None where none were merged.
    """

    folder: Path
    record: dict[str, Any]
    grid: Grid
    scores: np.ndarray
    labels: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    groups: np.ndarray | None = None

    @property
    def video_name(self) -> str:
        """The video's file name, short enough for a title; of several the number of each before it."""
        names = [printable(Path(video).name) for video in each(self.record["video"])]
        if len(names) == 1:
            return names[0] if len(names[0]) <= 40 else f"{names[0][:24]}…{names[0][-15:]}"
        more = f", and {len(names) - 4} more" if len(names) > 4 else ""
        return ", ".join(f"{n} {_short(name, 24)}" for n, name in enumerate(names[:4], 1)) + more

    @property
    def caption(self) -> str:
        """What the run was, for a title: video, question and answer, model and strength of the gate."""
        record = self.record
        question, answer = (_short(printable(record[name]), 70) for name in ("question", "answer"))
        strengths = ", ".join(
            f"{name} {record['config'][name]:g}"
            for name in ("alpha_q", "alpha_k", "alpha_v")
            if name in record["config"]
        )
        model = _short(printable(Path(record["model"]).name), 40)
        return f"{self.video_name}: {question} → {answer or '(empty)'}\n{model}, {strengths}"

    @property
    def n_frames(self) -> tuple[int, ...]:
        """Sampled frames of each video."""
        return self.grid.n_frames if isinstance(self.grid, JoinedGrid) else (len(self.indices),)

    @property
    def video_of_frame(self) -> np.ndarray:
        """(T,) int64 which video each sampled frame is of, from 0."""
        return np.repeat(np.arange(len(self.n_frames)), self.n_frames)

    @property
    def video_of_token(self) -> np.ndarray:
        """(N,) int64 which video each token is of, from 0."""
        grids = self.grid.grids if isinstance(self.grid, JoinedGrid) else (self.grid,)
        return np.repeat(np.arange(len(grids)), [grid.n_tokens for grid in grids])

    def moments(self, frames: np.ndarray, digits: int = 2) -> list[str]:
        """When sampled frames are, for people: "1.50 s", of several videos "2: 1.50 s", of an image only its number.

        Args:
            frames: (n,) which of them.
        """
        found = []
        for frame in frames:
            seconds, video = f"{self.timestamps[frame]:.{digits}f} s", self.video_of_frame[frame]
            alone = self.n_frames[video] == 1
            found.append(seconds if len(self.n_frames) == 1 else f"{video + 1}" + ("" if alone else f": {seconds}"))
        return found

    @property
    def first_frames(self) -> np.ndarray:
        """(t,) int64 first sampled frame of each step of the grid."""
        return self.grid.first_frames(len(self.indices))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def read_run(folder: Path) -> FinishedRun:
    """Reads result.json and anchors.safetensors.

    Raises:
        InputError: when one of them is missing, cannot be read, or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for name in ("result.json", "anchors.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: give the --out folder of a finished `videoanchor run`")
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        one = isinstance(record["grid"], dict)
        grids = [TokenGrid(**grid) for grid in ([record["grid"]] if one else record["grid"])]
        n_frames = [len(frames["indices"]) for frames in ([record["frames"]] if one else record["frames"])]
        tensors = load_file(folder / "anchors.safetensors")
        scores, labels, timestamps, indices = (
            tensors[name] for name in ("scores", "labels", "timestamps", "frame_indices")
        )
        groups = tensors.get("groups")
        for name in ("video", "model", "question", "answer", "config"):
            record[name]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be read as a finished run ({type(error).__name__}: {error}): run `videoanchor run` again"
        ) from error
    grid = joined(grids, n_frames)
    wanted = {"scores": (grid.n_tokens,), "labels": (grid.n_tokens,), "frame_indices": timestamps.shape}
    found = {"scores": scores.shape, "labels": labels.shape, "frame_indices": indices.shape}
    if groups is not None:
        wanted["groups"], found["groups"] = (grid.n_tokens,), groups.shape
    if found != wanted or len(timestamps) != sum(n_frames) or len(timestamps) < grid.t:
        raise InputError(
            f"{folder}: anchors.safetensors {found} does not fit the grid of result.json, {grid}: the files are of "
            f"different runs; run `videoanchor run` again"
        )
    return FinishedRun(folder, record, grid, scores, labels, timestamps, indices, groups)


def videos_of(
    run: FinishedRun,
    asked: Sequence[Video] | None,
    max_download: int = MAX_DOWNLOAD,
    progress: Progress | None = None,
) -> list[Path]:
    """Where the run's videos, images or folders of views are: `asked`, else where the run had them; of URLs their
    copies.

    Raises:
        InputError: when nothing is there, or `asked` are more or fewer.
    """
    recorded = each(run.record["video"])
    if asked is not None and len(asked) != len(recorded):
        raise InputError(f"--video: expected the {len(recorded)} of the run, in their order, got {len(asked)}")
    paths = [located(video, max_download, progress) for video in asked or recorded]
    if asked is None and sha256s_of(recorded) != run.record.get("sha256"):
        names = ", ".join(map(shown_url, recorded))
        raise InputError(f"the video at {names} is not the one of this run: give --video FILE")
    for path in paths:
        if not path.exists():
            refuse_url(path)
            known = "the video of this run is no longer at" if asked is None else "no video at"
            raise InputError(f"{known} {path}: give --video FILE")
    return paths


def read_clip(run: FinishedRun, path: Path, which: int = 0, **options: Any) -> VideoClip:
    """The run's sampled frames of one video.

    Args:
        path: see `videos_of`.
        which: of the run's videos, from 0.
        options: `strict`, `timeout` and `progress` of `read_video`.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    mine = run.video_of_frame == which
    with _or_elsewhere():
        clip = read_video(path, indices=run.indices[mine].tolist(), **_known(run, mine), **options)
        if len(clip.frames) < mine.sum():
            lost = mine.sum() - len(clip.frames)
            raise InputError(f"{path}: {lost} of the run's frames cannot be decoded any more")
    return clip


def source_frames(run: FinishedRun, path: Path, **options: Any) -> Generator[tuple[float, np.ndarray]]:
    """All frames of the video of a run about one, or views of its folder, one at a time: seconds and (H, W, 3) uint8,
    see `stream_video`.

    Args:
        path, options: as in `read_clip`.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    with _or_elsewhere():
        yield from stream_video(path, **_known(run, run.video_of_frame == 0), **options)


def _known(run: FinishedRun, mine: np.ndarray) -> dict[str, Any]:
    times = dict(zip(run.indices[mine].tolist(), run.timestamps[mine].tolist(), strict=True))
    return {"known_times": times, "max_pixels": run.record.get("max_pixels", MAX_PIXELS)}


@contextmanager
def _or_elsewhere() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; where the run's video is elsewhere, give --video FILE") from error
