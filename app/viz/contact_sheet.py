"""`anchors.png`: frames with the scores and with the subspaces laid over them."""

from pathlib import Path
from textwrap import fill

import numpy as np

from ..token_grid import TokenGrid
from ..video.reader import VideoClip
from .layout import first_frames
from .palette import ALPHA, COLOURS, OTHER, SCORE_MAP, backdrop, size_ranks, subspace_names
from .plain_text import plain_text

MAX_COLUMNS = 8


@plain_text()
def draw(
    path: str | Path, clip: VideoClip, grid: TokenGrid, scores: np.ndarray, labels: np.ndarray, title: str
) -> None:
    """Writes the contact sheet, in the format of the suffix of `path`.

    Args:
        path: file to write.
        clip: the sampled frames.
        grid: where the visual tokens lie.
        scores: (N,) in [0, 1]; labels: (N,) subspace of each token.
        title: above the frames.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    steps = np.unique(np.linspace(0, grid.t - 1, min(grid.t, MAX_COLUMNS)).round().astype(int))
    frame_of_step = first_frames(grid, len(clip.frames))[steps]
    score_grid, rank_grid = grid.arrange(scores), grid.arrange(size_ranks(labels))
    names = subspace_names(labels)

    height, width = clip.frames.shape[1:3]
    cell, row_height = 1.75, max(1.75 * height / width, 0.55)
    rows = ("frame", "score", "subspace")
    # no pyplot: a caller's notebook keeps its backend
    figure_width = cell * len(steps) + 1.9
    figure = Figure((figure_width, 3 * row_height + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(steps), squeeze=False)
    palette = ListedColormap([*COLOURS, OTHER])
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    heat = None
    for column, (step, frame) in enumerate(zip(steps, frame_of_step, strict=True)):
        picture = clip.frames[frame]
        grey = np.repeat(backdrop(picture) / 255, 3, -1)
        axes[0, column].imshow(picture)
        axes[0, column].set_title(f"{clip.timestamps[frame]:.2f} s", fontsize=9)
        axes[1, column].imshow(grey)
        heat = axes[1, column].imshow(
            score_grid[step], extent=extent, cmap=SCORE_MAP, vmin=0, vmax=1, alpha=ALPHA, interpolation="nearest"
        )
        axes[2, column].imshow(grey)
        axes[2, column].imshow(
            rank_grid[step],
            extent=extent,
            cmap=palette,
            vmin=-0.5,
            vmax=len(COLOURS) + 0.5,
            alpha=ALPHA,
            interpolation="nearest",
        )
    for row, name in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=10)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    assert heat is not None
    bar = figure.colorbar(heat, ax=axes.ravel().tolist(), pad=0.01, fraction=0.05, shrink=0.3, aspect=10)
    bar.set_label("score", fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in names]
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
    figure.suptitle(fill(title, int(11 * figure_width)), fontsize=11)
    figure.savefig(path, dpi=200)
