"""Which frames and which places of them the visual tokens stand for."""

import numpy as np

from ..token_grid import TokenGrid


def frames_per_step(grid: TokenGrid, n_frames: int) -> int:
    """Sampled frames that one step of the grid covers; the last step may cover fewer."""
    return -(-n_frames // grid.t)


def first_frames(grid: TokenGrid, n_frames: int) -> np.ndarray:
    """(grid.t,) int64 first sampled frame of each step."""
    return np.minimum(np.arange(grid.t) * frames_per_step(grid, n_frames), n_frames - 1)


def token_places(grid: TokenGrid) -> np.ndarray:
    """(n_tokens, 3) int64 step, row and column of each token. The newline of a row has column -1, and a token after the
    grid has -1 everywhere."""
    width = grid.w + grid.row_newlines
    places = np.stack(np.unravel_index(np.arange(grid.t * grid.h * width), (grid.t, grid.h, width)), 1)
    places[places[:, 2] == grid.w, 2] = -1
    return np.concatenate([places, np.full((grid.n_extra, 3), -1)])
