"""The groups of merged tokens of a run with `keep`, outlined over its frames, with the number of members."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..token_grid import Grid
from .contact_sheet import MAX_COLUMNS, MAX_ROW_HEIGHT
from .finished_run import FinishedRun, Frames
from .plain_text import plain_text, wrapped

_CASING = [withStroke(linewidth=2.0, foreground="black")]
"""Around what is white, which is then seen on light and on dark."""


class GroupMaps(NamedTuple):
    """Groups by place.

    Attributes:
        groups: (t, h, w) int64 the group at each place, -1 where the token was dropped.
        counts: (t, h, w) int64 the tokens of that group in the whole video, those without a place among them; 0 of
            dropped ones.
    """

    groups: np.ndarray
    counts: np.ndarray


def group_maps(groups: np.ndarray, grid: Grid) -> GroupMaps:
    """Of the group (N,) of each token."""
    counts = np.where(groups < 0, 0, np.bincount(groups[groups >= 0])[groups])
    return GroupMaps(grid.arrange(groups), grid.arrange(counts))


def outlines(groups: np.ndarray) -> np.ndarray:
    """(E, 2, 2) ends (column, row) of the sides between places of a step (h, w) that are of different groups, and of
    the sides around all groups, in places from the upper left corner."""
    around = np.pad(groups, 1, constant_values=-1)
    rows, columns = np.nonzero(around[1:-1, :-1] != around[1:-1, 1:])  # to the left of each column
    upright = np.stack([np.stack([columns, rows], 1), np.stack([columns, rows + 1], 1)], 1)
    rows, columns = np.nonzero(around[:-1, 1:-1] != around[1:, 1:-1])  # above each row
    level = np.stack([np.stack([columns, rows], 1), np.stack([columns + 1, rows], 1)], 1)
    return np.concatenate([upright, level])


def numbered(groups: np.ndarray, counts: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, column, members) of each group of several in a step (h, w): once, at the place nearest to the middle of its
    places."""
    found = []
    for one in np.unique(groups[counts > 1]):
        places = np.argwhere(groups == one)
        row, column = places[np.square(places - places.mean(0)).sum(1).argmin()]
        found.append((int(row), int(column), int(counts[row, column])))
    return found


@plain_text()
def draw(path: str | Path, frames: Frames, run: FinishedRun) -> None:
    """Writes frames without and with the groups' outlines, in the format of the suffix of `path`.

    Args:
        path: file to write.
        frames: the run's, each (H, W, 3) uint8.
        run: a run with groups.
    """
    assert run.groups is not None
    grid, maps = run.grid, group_maps(run.groups, run.grid)
    config, sizes = run.record["config"], np.bincount(run.groups[run.groups >= 0])
    how = f"keep {config['keep']:g}, {config['group']}"
    if (run.groups < 0).any():
        said = f"{len(sizes)} of {grid.n_tokens} visual tokens ({how}); the others were dropped: dark"
    else:
        said = (
            f"{grid.n_tokens} visual tokens in {len(sizes)} groups of 1 to {sizes.max()} ({how}); the numbers: their "
        )
        said += "members in the whole video, where several"
    title = f"{run.caption}\n{said}"
    steps = grid.some_steps(MAX_COLUMNS)
    frame_of_step = run.first_frames[steps]
    highest = max(frames[frame].shape[0] / frames[frame].shape[1] for frame in frame_of_step)
    figure_width, row_height = 2.4 * len(steps) + 0.6, min(max(2.4 * highest, 0.75), MAX_ROW_HEIGHT)
    figure = Figure((figure_width, 2 * row_height + 1.3), layout="constrained")
    axes = figure.subplots(2, len(steps), squeeze=False)
    axes[0, 0].set(ylabel="frame")
    axes[1, 0].set(ylabel="groups")
    # a digit is some 0.6 as wide as high, and a number stays within its token
    points = 72 * min(2.4 / grid.w / 2.2, row_height / grid.h / 1.3)
    moments = run.moments(frame_of_step)
    for (top, below), step, frame, moment in zip(axes.T, steps, frame_of_step, moments, strict=True):
        height, width = frames[frame].shape[:2]
        side = np.array([width / grid.w, height / grid.h])
        for axis in (top, below):
            axis.imshow(frames[frame])
            axis.set(xticks=[], yticks=[])
        top.set_title(moment, fontsize=9)
        dark = np.zeros((grid.h, grid.w, 4))
        dark[..., 3] = np.where(maps.groups[step] < 0, 0.8, 0)
        below.imshow(dark, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        lines = outlines(maps.groups[step]) * side - 0.5
        below.add_collection(LineCollection(list(lines), colors="white", linewidths=0.8, path_effects=_CASING))
        for row, column, members in numbered(maps.groups[step], maps.counts[step]):
            x, y = (np.array([column, row]) + 0.5) * side - 0.5
            below.text(
                x, y, str(members), color="white", fontsize=min(points, 9), ha="center", va="center",
                path_effects=_CASING,
            )  # fmt: skip
    figure.suptitle(wrapped(title, int(11 * figure_width)), fontsize=11)
    figure.savefig(path, dpi=200)
