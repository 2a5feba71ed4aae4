"""Where the visual tokens of a video lie in time and space."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenGrid:
    """Where the visual tokens of a video lie: token i < t*h*w is at (i // (h*w), i // w % h, i % w).

    Args:
        t: grid steps in time (Qwen merges two frames into one step).
        h: rows; w: columns.
        n_extra: tokens after the grid that belong to no place (LLaVA's newline).
    """

    t: int
    h: int
    w: int
    n_extra: int = 0

    @property
    def n_tokens(self) -> int:
        return self.t * self.h * self.w + self.n_extra

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """(n_tokens,) -> (t, h, w)."""
        return values[: self.t * self.h * self.w].reshape(self.t, self.h, self.w)
