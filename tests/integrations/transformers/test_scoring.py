"""Equal rows of a batch are scored once, rows that differ never share a result."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.scores import AnchorResult
from videoanchor_triton.integrations.transformers import scoring

CONFIG = VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0)


class Scorer:
    """Numbers the rows that it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, *_: Any, **__: Any) -> AnchorResult:
        self.seen.append(tokens)
        return AnchorResult(
            torch.full((len(tokens),), float(len(self.seen))), torch.zeros(len(tokens), dtype=torch.long)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_that_differ_are_never_merged(dtype: torch.dtype) -> None:
    """The same elements in another place, another sign, one bit, another shape, or another frame for a token: each has
    the sum of its neighbour, or nearly."""
    row = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    bit = row.clone()
    bit[2, 1] = (
        torch.nextafter(bit[2, 1].double(), torch.tensor(9.0)).to(dtype) if dtype == torch.float64 else bit[2, 1] * 2
    )
    rows = [row, row.flip(0), row.flip(1), -row, bit, row[:5], row[:0], row.reshape(4, 6), row.reshape(12, 2), row + 0]
    scorer = Scorer()
    results = scoring.score_rows(rows, CONFIG, [], score=scorer)
    found = [None if result is None else int(result.scores[0]) for result in results]
    assert found == [1, 2, 3, 4, 5, 6, None, 7, 8, 1]
    assert all(result is None or len(result.scores) == len(rows[n]) for n, result in enumerate(results))


def test_frames_tell_rows_apart() -> None:
    row, scorer = torch.ones(3, 2), Scorer()
    frames = [torch.tensor(one) for one in ([0, 0, 1], [0, 1, 1], [0, 0, 1])]
    results = scoring.score_rows([row] * 3, CONFIG, [], frames=frames, score=scorer)
    assert [int(result.scores[0]) for result in results if result is not None] == [1, 2, 1]


def test_what_is_known_is_not_scored_again() -> None:
    rows = list(torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)))
    known: scoring.Known = []
    scorer = Scorer()
    first = scoring.score_rows(rows[:3], CONFIG, known, score=scorer)
    strided = [torch.stack([row, row], 2)[..., 0] for row in reversed(rows)]  # other bytes in between
    again = scoring.score_rows(strided, CONFIG, known, score=scorer)
    assert again[1:] == first[::-1]
    assert (len(scorer.seen), len(known)) == (4, 4)


def test_one_row_is_held_at_a_time_and_none_is_kept() -> None:
    alive: list[StorageWeakRef] = []
    known: scoring.Known = []

    def rows() -> Iterator[torch.Tensor]:
        for n in range(4):
            row = torch.full((5, 3), float(n // 2))
            alive.append(StorageWeakRef(row.untyped_storage()))
            yield row
            del row
            assert all(ref.expired() for ref in alive)

    def score(tokens: torch.Tensor, *_: Any, **__: Any) -> AnchorResult:
        return AnchorResult(tokens.new_zeros(len(tokens)), torch.zeros(len(tokens), dtype=torch.long))

    first, same, other, _ = scoring.score_rows(rows(), CONFIG, known, score=score)
    assert first is same
    assert first is not other
    assert len(known) == 2
    assert all(ref.expired() for ref in alive)


def test_rows_without_tokens() -> None:
    scorer = Scorer()
    assert scoring.score_rows([], CONFIG, [], score=scorer) == []
    empty = torch.zeros(0, 4)
    assert scoring.score_rows([empty, empty], CONFIG, [], score=scorer) == [None, None]
    assert not scorer.seen
