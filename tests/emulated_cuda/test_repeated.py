"""Steps of the solver as CUDA graphs, on the emulated card."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_cuda.device import EmulatedCuda
from torch import Tensor

from videoanchor_triton.anchor import interior_point
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.repeated import Repeated
from videoanchor_triton.anchor.solver import self_expression


def test_a_graph_from_the_second_time_on(card: EmulatedCuda) -> None:
    x = torch.zeros(3, device="cuda")
    times = []

    def call() -> Tensor:
        times.append(1)
        return x.add_(1) * 2

    repeated = Repeated(call, x.device)
    assert repeated().tolist() == [2.0, 2.0, 2.0]
    second = repeated()
    assert second.tolist() == [4.0, 4.0, 4.0], "a capture runs nothing, its replay once"
    x.fill_(10)
    assert repeated() is second
    assert second.tolist() == [22.0, 22.0, 22.0]
    assert len(times) == 2
    assert card.captured is None
    plain = Repeated(call, torch.device("cpu"))
    assert [plain() is plain() for _ in range(2)] == [False, False]


def test_what_asks_the_host_cannot_be_repeated(card: EmulatedCuda) -> None:
    x = torch.ones(3, device="cuda")
    repeated = Repeated(lambda: x.sum().item(), x.device)
    assert repeated() == 3
    with pytest.raises(RuntimeError, match="capturing"):
        repeated()
    assert card.captured is None


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_solves_by_graphs(affine: bool, card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU finds: tokens of which some end earlier and stay until half of them have left."""
    made: list[Repeated] = []
    ended: list[tuple[int, list[int]]] = []
    passes = interior_point.over_changing_atoms

    def recorded(*args: Any) -> Iterator[interior_point.Found]:
        for found in passes(*args):
            ended.append((found.n_iter, found.token.tolist()))
            yield found

    monkeypatch.setattr(interior_point, "Repeated", lambda *args: made.append(Repeated(*args)) or made[-1])
    generator = torch.Generator().manual_seed(0)
    atoms, tokens = (torch.randn(4, n, dtype=torch.float64, generator=generator) for n in (120, 7))
    tokens *= torch.tensor([0.01, 0.1, 0.3, 0.01, 0.02, 3.0, 10.0])  # near 0, and in a hull, they end before others
    options = SolverOptions(tol=1e-3, affine=affine)
    expected = self_expression(tokens, options, atoms=atoms)
    card.reset()
    monkeypatch.setattr(interior_point, "over_changing_atoms", recorded)
    ours = self_expression(tokens.to("cuda"), options, atoms=atoms.to("cuda"))
    assert ours.converged
    assert sorted(token for _, tokens in ended for token in tokens) == [*range(7)], "each once"
    assert len({n_iter for n_iter, tokens in ended if tokens}) > 1
    torch.testing.assert_close(ours.to_dense().cpu(), expected.to_dense(), rtol=0, atol=1e-2)
    assert any(one._graph is not None for one in made)
    assert len(made) <= 1 + len(tokens).bit_length()
