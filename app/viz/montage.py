"""`subspaces.png`: a row for each subspace, its tokens over frames."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from .finished_run import FinishedRun, Frames
from .palette import COLOURS, OTHER, by_size
from .plain_text import plain_text, wrapped

MAX_ROWS, MAX_COLUMNS = 24, 16
_ALL_WIDTH, _MOST_WIDTH, _MOST_HEIGHT = 1440, 180, 260
"""In pixels: of all pictures of a row, and of one, at most."""
_LEAST_WIDTH, _LEAST_HEIGHT = 90, 60
"""Of what a picture stands in, so that names do not touch."""
_GAP, _BAND, _DPI = 6, 12, 150
_FADED = 0.18
"""Contrast that is left of a picture where tokens are of other subspaces."""


@plain_text()
def draw(path: str | Path, frames: Frames, run: FinishedRun) -> None:
    """Writes the montage, in the format of the suffix of `path`: the largest subspace first, a column a step in time,
    of many some at even distances; a frame is as it is where its tokens are of the subspace, and faded elsewhere.

    Args:
        path: file to write.
        frames: the run's, each (H, W, 3) uint8.
    """
    ranks, sizes = by_size(run.labels)
    steps = run.grid.some_steps(MAX_COLUMNS)
    width = min(_MOST_WIDTH, _ALL_WIDTH // len(steps))
    small = [_small(frames[frame], width) for frame in run.first_frames[steps]]
    height, width = (max(one.shape[side] for one in small) for side in (0, 1))
    in_small = [_enlarged(one, picture) for one, picture in zip(run.grid.arrange(ranks)[steps], small, strict=True)]
    step, _, column = run.grid.places().T
    seen = np.bincount(ranks[np.isin(step, steps) & (column >= 0)], minlength=len(sizes))
    n_rows = min(len(sizes), MAX_ROWS)
    pitch_y, pitch_x = max(height, _LEAST_HEIGHT) + _GAP, max(width, _LEAST_WIDTH) + _GAP
    canvas = np.ones((n_rows * pitch_y - _GAP, _BAND + len(steps) * pitch_x, 3))
    for rank in range(n_rows):
        top = rank * pitch_y
        canvas[top : top + pitch_y - _GAP, :_BAND] = to_rgb(COLOURS[rank] if rank < len(COLOURS) else OTHER)
        for column, (frame, ranks_here) in enumerate(zip(small, in_small, strict=True)):
            left, its = _BAND + _GAP + column * pitch_x, (ranks_here == rank)[..., None]
            height_here, width_here = frame.shape[:2]
            faded = 1 - _FADED * (1 - frame.mean(-1, keepdims=True))
            canvas[top : top + height_here, left : left + width_here] = np.where(its, frame, faded)

    several = "s" * (len(sizes) > 1)
    title = f"{run.caption}, {len(sizes)} subspace{several} of {run.grid.n_tokens} visual tokens"
    if n_rows < len(sizes):
        rest = int(sizes[n_rows:].sum())
        title += f"; the {len(sizes) - n_rows} smallest, {rest} tokens in all, are not shown"
    inches = max(canvas.shape[1] / _DPI + 1.4, 5.0), canvas.shape[0] / _DPI + 1.1
    title = wrapped(title, int(11 * inches[0]))
    figure = Figure((inches[0], inches[1] + 0.16 * title.count("\n")), layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="antialiased")
    middles = np.arange(n_rows) * pitch_y + (pitch_y - _GAP) / 2
    names = [
        f"{rank + 1}: {size} token{'s' * (size > 1)}\n{100 * size / len(ranks):.1f}%"
        + f"\n{size - shown} not shown" * (shown < size)
        for rank, (size, shown) in enumerate(zip(sizes[:n_rows].tolist(), seen.tolist(), strict=False))
    ]
    axis.set_yticks(middles, names, fontsize=8)
    places = _BAND + _GAP + np.arange(len(steps)) * pitch_x + width / 2
    shown = run.first_frames[steps]
    axis.set_xticks(places, run.moments(shown, 0 if run.timestamps[shown].max() >= 100 else 2), fontsize=8)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=_DPI)


def _enlarged(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """(h, w) -> (H, W) of a picture (H, W, 3)."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(picture.shape, values.shape, strict=False))
    return values[rows][:, columns]


def _small(frame: np.ndarray, most: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) float64 in [0, 1], scaled to at most this width; small frames are enlarged."""
    height, width = frame.shape[:2]
    scale = min(most / width, _MOST_HEIGHT / height)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(frame).resize(size, how)) / 255
