"""How much the tokens of one frame express those of another: W's mass between the frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from ..token_grid import Grid
from .plain_text import plain_text, wrapped
from .table import Row

MAX_TICKS = 12


@dataclass(frozen=True, eq=False)
class FrameAffinity:
    """W's affinity between the steps of the grid.

    Args:
        share: (t, t) float64, share[i, j] of the mass of |W| lies on coefficients W[a, b] by which a token a of step i
            expresses a token b of step j; sums to 1 (0 if W is 0).
        by_chance: (t, t) float64, the share if every token expressed any other as much.
        outside: share of all of |W| that joins a token without a place in time (one after the grid) and is left out.
    """

    share: np.ndarray
    outside: float
    by_chance: np.ndarray

    @property
    def between(self) -> float:
        """Share of the mass that joins different steps."""
        return float(self.share.sum() - np.trace(self.share))

    @property
    def chance(self) -> float:
        """`between`, by chance."""
        return float(self.by_chance.sum() - np.trace(self.by_chance))


def frame_affinity(indices: Tensor, values: Tensor, grid: Grid) -> FrameAffinity:
    """Adds up sparse coefficients by step; never (N, N).

    Args:
        indices: (N, k) int64 and values: (N, k), as `SelfExpression` has them: token j is expressed by the tokens
            indices[j] with these weights.
        grid: where the N tokens lie.

    Raises:
        ValueError: when the coefficients are not of `grid.n_tokens` tokens.
    """
    if len(indices) != grid.n_tokens or indices.shape != values.shape:
        raise ValueError(
            f"indices, values: expected ({grid.n_tokens}, k) for {grid}, got {tuple(indices.shape)} and "
            f"{tuple(values.shape)}"
        )
    step = grid.places()[:, 0]
    by = step[indices.cpu().numpy()]
    expressed = np.broadcast_to(step[:, None], by.shape)
    mass = np.abs(values.detach().cpu().double().numpy())
    placed = (by >= 0) & (expressed >= 0)
    share = np.bincount(by[placed] * grid.t + expressed[placed], mass[placed], grid.t**2).reshape(grid.t, grid.t)
    inside, outside = float(share.sum()), float(mass[~placed].sum())
    per_step = np.bincount(step[step >= 0], minlength=grid.t)
    pairs = np.outer(per_step, per_step) - np.diag(per_step)  # no token expresses itself
    return FrameAffinity(share / (inside or 1.0), outside / (inside + outside or 1.0), pairs / max(pairs.sum(), 1))


@plain_text()
def draw(path: Path, affinity: FrameAffinity, moments: Sequence[str], caption: str) -> None:
    """Draws the matrix. `moments` (t,) names the time of each step; the suffix of `path` is the format."""
    percent = 100 * affinity.share
    norm = PowerNorm(0.5, vmin=0, vmax=float(percent.max()) or 1.0)
    figure = Figure((5.4, 4.8), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(percent, cmap="viridis", norm=norm, interpolation="nearest")
    ticks = np.arange(0, len(moments), -(-len(moments) // MAX_TICKS))
    names = [moments[tick].removesuffix(" s") for tick in ticks.tolist()]
    axis.set_xticks(ticks, names, fontsize=8, rotation=90 if len(ticks) > 6 else 0)
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set_xlabel("time of the expressed tokens (s)")
    axis.set_ylabel("time of the tokens that express them (s)")
    said = f"{100 * affinity.between:.0f}% of |W| joins different time steps ({100 * affinity.chance:.0f}% by chance)"
    figure.suptitle(f"{wrapped(caption, 62)}\n{said}", fontsize=9)
    least, most = (f"{100 * one:.2g}" for one in (affinity.by_chance.min(), affinity.by_chance.max()))
    label = f"share of |W| (%), square root scale; by chance {least if least == most else f'{least} to {most}'}"
    figure.colorbar(picture, ax=axis, format="%.3g").set_label(label, labelpad=9)
    figure.savefig(path, dpi=300)


def rows(affinity: FrameAffinity, seconds: np.ndarray) -> Iterator[Row]:
    """The names of the columns, then a row for each pair of steps, with their times in seconds and the share."""
    yield "step", "time_s", "expressed_step", "expressed_time_s", "share"
    for (i, j), share in np.ndenumerate(affinity.share):
        yield i, f"{seconds[i]:.6f}", j, f"{seconds[j]:.6f}", share
