"""Colours of the pictures: which colour a subspace has in every frame, and the colour map of the scores."""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap

SCORE_MAP = colormaps["viridis"]
COLOURS = (
    *("#00B4FF", "#E17800", "#5A0F69", "#C3F04B", "#C31E0F", "#4B3CC3"),
    *("#FFD2FF", "#00FFB4", "#C34BB4", "#78000F", "#C3965A", "#781E4B"),
)
"""Chosen by a search for colours that stay apart, and from `OTHER`, by 20 and more in CIELAB for normal sight and under
full protanopia, deuteranopia and tritanopia (Machado et al. 2009)."""
OTHER = "#8A8A8A"
"""The colour of all smaller subspaces."""
SUBSPACE_MAP = ListedColormap([*COLOURS, OTHER])
"""From the ranks of `size_ranks`."""
ALPHA = 0.62
"""Weight of a subspace's colour over the picture."""
SCORE_ALPHA = 0.8
"""Weight of the colour of score 1; that of a score is as much smaller, so that a frame is untouched at score 0."""
_LEVELS = np.linspace(0, 1, 256)[:, None]
SCORE_SCALE = ListedColormap(1 - SCORE_ALPHA * _LEVELS * (1 - SCORE_MAP(_LEVELS[:, 0])[:, :3]))
"""The colours of scores as they lie over white, for legends."""
CONTRAST = 0.7
"""Contrast that is left of the picture under the colours, so that a colour looks alike in light and in shade."""


def by_size(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 rank of each token's subspace by its number of tokens, 0 for the largest, ties by label; (C,) int64
    sizes of the subspaces in that order."""
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")
    return np.argsort(order)[labels], sizes[order][: np.count_nonzero(sizes)]


def size_ranks(labels: np.ndarray) -> np.ndarray:
    """(N,) int64 ranks of `by_size`; subspaces from `len(COLOURS)` on share the last rank, that of `OTHER`."""
    return np.minimum(by_size(labels)[0], len(COLOURS))


def rank_name(rank: int) -> str:
    """What legends and tables call a rank of `size_ranks`: "1" is the largest subspace, "rest" all small ones."""
    return str(rank + 1) if rank < len(COLOURS) else "rest"


def subspace_names(labels: np.ndarray) -> list[tuple[str, str]]:
    """What a legend lists: (name, colour) of each rank that occurs, the largest subspace first."""
    return [(rank_name(rank), (*COLOURS, OTHER)[rank]) for rank in np.unique(size_ranks(labels))]


def backdrop(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB in [0, 255] -> (H, W, 1) float64 grey in [0, 255], of less contrast, to paint on."""
    return 127.5 + CONTRAST * (frame.mean(-1, keepdims=True) - 127.5)
