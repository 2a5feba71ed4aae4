"""Tables as CSV; `tokens.csv` has a row for each visual token."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .finished_run import FinishedRun
from .palette import rank_name, size_ranks

Row = tuple[Any, ...]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows, the first with the names of the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def token_rows(run: FinishedRun) -> Iterator[Row]:
    """The names of the columns, then the tokens in their order.

    Columns: `token`, its number; `step`, the step of the grid in time; `frame` and `time_s`, position in the video and
    seconds of the first frame of that step; `row` and `column` of the grid, from the top left; `score` in [0, 1], with
    all digits of its float32; `subspace`, its name in the legends of the pictures, "1" for the largest or "rest";
    `label`, its number in anchors.safetensors; `video`, which of the run's it is of, from 1. The newline of a row has
    no column, a token after the grid no place at all: these cells are empty.
    """
    yield "token", "step", "frame", "time_s", "row", "column", "score", "subspace", "label", "video"
    first, ranks = run.first_frames, size_ranks(run.labels).tolist()
    tokens = zip(run.video_of_token.tolist(), run.grid.places().tolist(), strict=True)
    for token, (video, (step, row, column)) in enumerate(tokens):
        frame = first[step]
        when = (step, run.indices[frame], f"{run.timestamps[frame]:.6f}") if step >= 0 else ("",) * 3
        where = (value if value >= 0 else "" for value in (row, column))
        yield token, *when, *where, run.scores[token], rank_name(ranks[token]), run.labels[token], video + 1
