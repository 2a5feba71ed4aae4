"""Where the visual tokens of videos lie in time and space."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..integrations.errors import InputError


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

    def some_steps(self, most: int) -> np.ndarray:
        """int64, ascending: all steps, or `most` of them at even distances, the first and the last among them."""
        return np.unique(np.linspace(0, self.t - 1, min(self.t, most)).round().astype(int))

    def steps_of_frames(self, n_frames: int) -> np.ndarray:
        """(n_frames,) int64 step of each sampled frame. A step covers equally many, the last one maybe fewer."""
        return np.arange(n_frames) // self._frames_per_step(n_frames)

    def first_frames(self, n_frames: int) -> np.ndarray:
        """(t,) int64 first sampled frame of each step."""
        return np.minimum(np.arange(self.t) * self._frames_per_step(n_frames), n_frames - 1)

    def _frames_per_step(self, n_frames: int) -> int:
        return -(-n_frames // self.t)


@dataclass(frozen=True)
class JoinedGrid:
    """The grids of several videos and images after one another in time, for pictures. Each step has as many rows and
    columns as the finest grid, so that a token of a coarser one fills several places.

    Args:
        grids: of two or more, each with places.
        n_frames: sampled of each.
    """

    grids: tuple[TokenGrid, ...]
    n_frames: tuple[int, ...]

    @property
    def t(self) -> int:
        return sum(grid.t for grid in self.grids)

    @property
    def h(self) -> int:
        return max(grid.h for grid in self.grids)

    @property
    def w(self) -> int:
        return max(grid.w for grid in self.grids)

    @property
    def n_tokens(self) -> int:
        return sum(grid.n_tokens for grid in self.grids)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """(n_tokens,) -> (t, h, w)."""
        parts = np.split(values, np.cumsum([grid.n_tokens for grid in self.grids])[:-1])
        rows, columns = np.arange(self.h), np.arange(self.w)
        return np.concatenate(
            [
                grid.arrange(part)[:, rows * grid.h // self.h][:, :, columns * grid.w // self.w]
                for grid, part in zip(self.grids, parts, strict=True)
            ]
        )

    def places(self) -> np.ndarray:
        """(n_tokens, 3) int64 step, and row and column in its own grid, of each token; see `TokenGrid.places`."""
        found = []
        for grid, before in zip(self.grids, self._steps_before, strict=True):
            places = grid.places()
            places[places[:, 0] >= 0, 0] += before
            found.append(places)
        return np.concatenate(found)

    def some_steps(self, most: int) -> np.ndarray:
        """int64, ascending: all steps, or some, of each grid one at least; no more than `most` where these are not."""
        counts = [max(most * grid.t // self.t, 1) for grid in self.grids]
        while sum(counts) > max(most, len(counts)):
            counts[counts.index(max(counts))] -= 1
        parts = zip(self.grids, counts, self._steps_before, strict=True)
        return np.concatenate([grid.some_steps(n) + before for grid, n, before in parts])

    def steps_of_frames(self, n_frames: int) -> np.ndarray:
        """See `TokenGrid.steps_of_frames`; those of all videos after one another."""
        assert n_frames == sum(self.n_frames)
        parts = zip(self.grids, self.n_frames, self._steps_before, strict=True)
        return np.concatenate([grid.steps_of_frames(n) + before for grid, n, before in parts])

    def first_frames(self, n_frames: int) -> np.ndarray:
        """See `TokenGrid.first_frames`."""
        assert n_frames == sum(self.n_frames)
        frames_before = np.cumsum([0, *self.n_frames[:-1]])
        parts = zip(self.grids, self.n_frames, frames_before, strict=True)
        return np.concatenate([grid.first_frames(n) + before for grid, n, before in parts])

    @cached_property
    def _steps_before(self) -> list[int]:
        return np.cumsum([0, *(grid.t for grid in self.grids[:-1])]).tolist()


Grid = TokenGrid | JoinedGrid


def joined(grids: Sequence[TokenGrid], n_frames: Sequence[int]) -> Grid:
    """The grid of one video, or those of several as one.

    Raises:
        InputError: the tokens of one have no places.
    """
    if len(grids) != len(n_frames) or not all(grid.t for grid in grids):
        raise InputError(
            "the pictures show where tokens lie, which is not known of this model's images: ask about videos, or of an "
            "image alone"
        )
    return grids[0] if len(grids) == 1 else JoinedGrid(tuple(grids), tuple(n_frames))
