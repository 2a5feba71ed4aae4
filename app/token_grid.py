"""Where the visual tokens of a video lie in time and space."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenGrid:
    """Where the visual tokens of a video lie: by time, then row, then column.

    Args:
        t: grid steps in time (Qwen merges two frames into one step).
        h: rows; w: columns.
        n_extra: tokens after the grid that belong to no place (LLaVA-OneVision's newline).
        row_newlines: each row ends with a token that belongs to no place (LLaVA-Video).
    """

    t: int
    h: int
    w: int
    n_extra: int = 0
    row_newlines: bool = False

    @property
    def n_tokens(self) -> int:
        return self.t * self.h * (self.w + self.row_newlines) + self.n_extra

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """(n_tokens,) -> (t, h, w)."""
        rows = values[: self.n_tokens - self.n_extra].reshape(self.t, self.h, self.w + self.row_newlines)
        return rows[:, :, : self.w]

    def places(self) -> np.ndarray:
        """(n_tokens, 3) int64 step, row and column of each token. The newline of a row has column -1, and a token after
        the grid has -1 everywhere."""
        places = np.argwhere(np.ones((self.t, self.h, self.w + self.row_newlines), dtype=bool))
        places[places[:, 2] == self.w, 2] = -1
        return np.pad(places, ((0, self.n_extra), (0, 0)), constant_values=-1)

    def frames_per_step(self, n_frames: int) -> int:
        """Sampled frames that one step covers; the last step may cover fewer."""
        return -(-n_frames // self.t)

    def some_steps(self, most: int) -> np.ndarray:
        """int64, ascending: all steps, or `most` of them at even distances, the first and the last among them."""
        return np.unique(np.linspace(0, self.t - 1, min(self.t, most)).round().astype(int))

    def first_frames(self, n_frames: int) -> np.ndarray:
        """(t,) int64 first sampled frame of each step."""
        return np.minimum(np.arange(self.t) * self.frames_per_step(n_frames), n_frames - 1)
