"""The algorithm that "auto" takes, by size and budget."""

import pytest
import torch

from videoanchor_triton.anchor import memory


@pytest.mark.parametrize(
    ("n_tokens", "rank", "budget", "expected"),
    [
        (0, 0, None, "dense"),
        (1, 64, None, "dense"),
        (2, 2, None, "dense"),
        (1023, 16, None, "dense"),
        (1024, 41, None, "working-set"),
        (1024, 42, None, "dense"),
        (1559, 64, None, "dense"),
        (1560, 64, None, "working-set"),
        (2048, 128, None, "blocked"),
        (3096, 128, None, "working-set"),
        (100_000, 64, 2**30, "working-set"),
        (1023, 16, 2**25, "blocked"),
        (4096, 3584, None, "blocked"),
        (30_000, 1024, 3 * 2**30, "blocked"),  # the atoms of 16 tokens' candidates take 1.4 GiB alone
    ],
)
def test_auto_takes_the_fastest_that_fits(n_tokens, rank, budget, expected, monkeypatch):
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _: 2**36)
    plan = memory.plan_solver(n_tokens, rank, torch.float32, torch.device("cpu"), "auto", budget)
    assert plan.algorithm == expected
    assert plan.n_bytes <= (budget or 2**35)
    assert plan == memory.plan_solver(n_tokens, rank, torch.float32, torch.device("cpu"), expected, budget)


def test_available_memory_is_known_here():
    assert (memory.available_memory_bytes(torch.device("cpu")) or 0) > 2**20
