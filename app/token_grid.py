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
