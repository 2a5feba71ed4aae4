"""A finished run, read from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...integrations.errors import InputError
from ..text import printable
from ..token_grid import TokenGrid


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
    """

    folder: Path
    record: dict[str, Any]
    grid: TokenGrid
    scores: np.ndarray
    labels: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray

    @property
    def video_name(self) -> str:
        """The video's file name, short enough for a title."""
        name = printable(Path(self.record["video"]).name)
        return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"


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
        for name in ("video", "model", "question", "config"):
            record[name]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be read as a finished run ({type(error).__name__}: {error}): run `videoanchor run` again"
        ) from error
    wanted = {"scores": (grid.n_tokens,), "labels": (grid.n_tokens,), "frame_indices": timestamps.shape}
    found = {"scores": scores.shape, "labels": labels.shape, "frame_indices": indices.shape}
    if found != wanted or len(timestamps) < grid.t:
        raise InputError(
            f"{folder}: anchors.safetensors {found} does not fit the grid of result.json, {grid}: the files are of "
            f"different runs; run `videoanchor run` again"
        )
    return FinishedRun(folder, record, grid, scores, labels, timestamps, indices)
