"""`anchors.png`: frames with the scores and with the subspaces laid over them."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .finished_run import FinishedRun, Frames
from .palette import ALPHA, SCORE_ALPHA, SCORE_MAP, SCORE_SCALE, SUBSPACE_MAP, backdrop, size_ranks, subspace_names
from .plain_text import plain_text, wrapped

MAX_COLUMNS = 8
MAX_ROW_HEIGHT = 3.5
"""In inches: what is narrower than half its height is drawn narrower than its column."""


@plain_text()
def draw(path: str | Path, frames: Frames, run: FinishedRun) -> None:
    """Writes the contact sheet, in the format of the suffix of `path`.

    Args:
        path: file to write.
        frames: the run's, each (H, W, 3) uint8.
    """
    grid, scores, labels = run.grid, run.scores, run.labels
    scorer = run.record["config"].get("scorer", "ssc")
    title = f"{run.caption}, {grid.n_tokens} visual tokens, scorer {scorer}"
    steps = grid.some_steps(MAX_COLUMNS)
    frame_of_step = run.first_frames[steps]
    in_grid = grid.arrange(scores)
    painted = SCORE_MAP(in_grid), SUBSPACE_MAP(grid.arrange(size_ranks(labels)))
    painted[0][..., 3] = SCORE_ALPHA * in_grid
    painted[1][..., 3] = ALPHA

    highest = max(frames[frame].shape[0] / frames[frame].shape[1] for frame in frame_of_step)
    figure_width, row_height = 1.75 * len(steps) + 1.9, min(max(1.75 * highest, 0.55), MAX_ROW_HEIGHT)
    figure = Figure((figure_width, 3 * row_height + 1.6), layout="constrained")  # no pyplot: a notebook keeps its own
    axes = figure.subplots(3, len(steps), squeeze=False)
    axes[0, 0].set(ylabel="frame")
    axes[1, 0].set(ylabel="score")
    axes[2, 0].set(ylabel="subspace")
    moments = run.moments(frame_of_step)
    for (top, *below), step, frame, moment in zip(axes.T, steps, frame_of_step, moments, strict=True):
        picture = frames[frame]
        height, width = picture.shape[:2]
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        grey = np.repeat(backdrop(picture) / 255, 3, -1)
        top.imshow(picture)
        top.set_title(moment, fontsize=9)
        for axis, backdrop_of, colours in zip(below, (picture, grey), painted, strict=True):
            axis.imshow(backdrop_of)
            axis.imshow(colours[step], extent=extent, interpolation="nearest")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    scale = ScalarMappable(Normalize(0, 1), SCORE_SCALE)
    place: Any = {"ax": axes.ravel().tolist(), "pad": 0.01, "fraction": 0.05, "shrink": 0.3, "aspect": 10}
    figure.colorbar(scale, **place).set_label("score", fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in subspace_names(labels)]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), int(figure_width / 0.5)),
        fontsize=8,
        frameon=False,
        title="subspaces by size, the largest first",
        title_fontsize=8,
        handlelength=1.0,
        columnspacing=1.0,
    )
    figure.suptitle(wrapped(title, int(11 * figure_width)), fontsize=11)
    figure.savefig(path, dpi=200)
