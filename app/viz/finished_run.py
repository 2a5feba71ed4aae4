"""A finished run, read from its folder, and its frames, read again from its video."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...integrations.errors import InputError
from ..text import printable
from ..token_grid import TokenGrid
from ..video.limits import MAX_PIXELS
from ..video.reader import VideoClip, read_video, refuse_url, stream_video
from ..video.remote import MAX_DOWNLOAD, located, sha256_of
from ..video.sampling import Progress


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What `videoanchor run` left in a folder.

    Args:
        folder: the folder.
        record: what result.json holds.
        grid: where the visual tokens lie.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 subspace of each token.
        timestamps: (T,) float64 seconds of the sampled frames.
        indices: (T,) int64 positions of the sampled frames in the video.
        groups: (N,) int64 group of each token, -1 of one that was dropped; None where none were merged.
    """

    folder: Path
    record: dict[str, Any]
    grid: TokenGrid
    scores: np.ndarray
    labels: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    groups: np.ndarray | None = None

    @property
    def video_name(self) -> str:
        """The video's file name, short enough for a title."""
        name = printable(Path(self.record["video"]).name)
        return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"

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
        grid = TokenGrid(**record["grid"])
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
    wanted = {"scores": (grid.n_tokens,), "labels": (grid.n_tokens,), "frame_indices": timestamps.shape}
    found = {"scores": scores.shape, "labels": labels.shape, "frame_indices": indices.shape}
    if groups is not None:
        wanted["groups"], found["groups"] = (grid.n_tokens,), groups.shape
    if found != wanted or len(timestamps) < grid.t:
        raise InputError(
            f"{folder}: anchors.safetensors {found} does not fit the grid of result.json, {grid}: the files are of "
            f"different runs; run `videoanchor run` again"
        )
    return FinishedRun(folder, record, grid, scores, labels, timestamps, indices, groups)


def video_of(
    run: FinishedRun, asked: Path | str | None, max_download: int = MAX_DOWNLOAD, progress: Progress | None = None
) -> Path:
    """Where the run's video, or folder of views, is: `asked`, else where the run had it; of a URL its copy.

    Raises:
        InputError: when nothing is there.
    """
    recorded = run.record["video"]
    path = located(recorded if asked is None else asked, max_download, progress)
    if asked is None and sha256_of(recorded) != run.record.get("sha256"):
        raise InputError(f"the video at {recorded} is not the one of this run: give --video FILE")
    if not path.exists():
        refuse_url(path)
        known = "the video of this run is no longer at" if asked is None else "no video at"
        raise InputError(f"{known} {path}: give --video FILE")
    return path


def read_clip(run: FinishedRun, path: Path, **options: Any) -> VideoClip:
    """The run's sampled frames.

    Args:
        path: see `video_of`.
        options: `strict`, `timeout` and `progress` of `read_video`.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    with _or_elsewhere():
        clip = read_video(path, indices=run.indices.tolist(), **_known(run), **options)
        if len(clip.frames) < len(run.indices):
            lost = len(run.indices) - len(clip.frames)
            raise InputError(f"{path}: {lost} of the run's frames cannot be decoded any more")
    return clip


def source_frames(run: FinishedRun, path: Path, **options: Any) -> Generator[tuple[float, np.ndarray]]:
    """All frames of the run's video, or views of its folder, one at a time: seconds and (H, W, 3) uint8, see
    `stream_video`.

    Args:
        path, options: as in `read_clip`.

    Raises:
        InputError: when the video cannot be read, or has no frames at the run's times.
    """
    with _or_elsewhere():
        yield from stream_video(path, **_known(run), **options)


def _known(run: FinishedRun) -> dict[str, Any]:
    times = dict(zip(run.indices.tolist(), run.timestamps.tolist(), strict=True))
    return {"known_times": times, "max_pixels": run.record.get("max_pixels", MAX_PIXELS)}


@contextmanager
def _or_elsewhere() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; where the run's video is elsewhere, give --video FILE") from error
