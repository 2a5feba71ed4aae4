"""`tokens.csv`: a row for each visual token."""

import csv
from pathlib import Path

from .finished_run import FinishedRun
from .layout import first_frames, token_places
from .palette import rank_name, size_ranks

COLUMNS = ("token", "step", "frame", "time_s", "row", "column", "score", "subspace", "label")


def write(path: Path, run: FinishedRun) -> None:
    """Writes the table in the order of the tokens.

    Columns: `token`, its number; `step`, the step of the grid in time; `frame` and `time_s`, position in the video and
    seconds of the first frame of that step; `row` and `column` of the grid, from the top left; `score` in [0, 1], with
    all digits of its float32; `subspace`, its name in the legends of the pictures, "1" for the largest or "rest";
    `label`, its number in anchors.safetensors. The newline of a row has no column, a token after the grid no place at
    all: these cells are empty.
    """
    first, ranks = first_frames(run.grid, len(run.indices)), size_ranks(run.labels).tolist()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for token, (step, row, column) in enumerate(token_places(run.grid).tolist()):
            where = (
                (step, int(run.indices[first[step]]), f"{run.timestamps[first[step]]:.6f}") if step >= 0 else ("",) * 3
            )
            place = (value if value >= 0 else "" for value in (row, column))
            named = rank_name(ranks[token]), int(run.labels[token])
            writer.writerow((token, *where, *place, str(run.scores[token]), *named))
