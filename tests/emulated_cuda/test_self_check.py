"""The check of first calls on an emulated card: one read at the first call of a variant, none later or in a graph."""

from typing import Any

import pytest
import torch
from emulated_cuda.attention_calls import CALLS, Inputs, Sizes, operator
from emulated_cuda.budgets import of_the_package
from emulated_cuda.device import EmulatedCuda

from videoanchor_triton.kernels import ops, ops_cache, ops_paged, self_check

CARD, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
CHECKED = [call for call in CALLS if operator(call) not in ("merge", "write")]


@pytest.fixture(autouse=True)
def verdicts(monkeypatch: pytest.MonkeyPatch) -> dict[self_check.Variant, bool]:
    monkeypatch.setenv(self_check.SWITCH, "first")
    found: dict[self_check.Variant, bool] = {}
    monkeypatch.setattr(self_check, "_right", found)
    return found


@pytest.mark.parametrize("call", CHECKED)
def test_one_read_for_each_variant_and_none_afterwards(
    call: str, two_cards: EmulatedCuda, verdicts: dict[self_check.Variant, bool]
) -> None:
    inputs = Inputs(Sizes(), SECOND)
    for first in (True, False):
        two_cards.reset()
        CALLS[call](inputs, backend="triton")
        assert of_the_package(two_cards.reads).total() == (len(verdicts) if first else 0)
        assert not of_the_package(two_cards.uploads)
    assert list(verdicts.values()) == [True] * (2 if "backward" in operator(call) else 1)


def test_a_graph_is_not_held_up(card: EmulatedCuda, verdicts: dict[self_check.Variant, bool]) -> None:
    inputs = Inputs(Sizes(), CARD)
    card.reset()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        CALLS["cache: one query"](inputs, backend="triton")
    assert not card.reads + card.uploads
    assert not verdicts


READ = {
    "cache": "cache_seqlens",
    "paged": "cu_seqlens_q, seqlens_k and block_table",
}


@pytest.mark.parametrize("call", ["decode: one query", "cache: one query", "paged: written gates"])
def test_a_graph_of_a_wrong_kernel(call: str, card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = ops.paged

    def faulty(*args: Any, **named: Any) -> None:
        launcher(*args, **named)
        args[3].mul_(1.02)

    for module in (ops, ops_cache, ops_paged):
        monkeypatch.setattr(module, "paged", faulty)
    inputs, graph = Inputs(Sizes(), CARD), torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning, match="a Triton kernel gave wrong results on"):
        expected = CALLS[call](inputs, backend="triton")
    card.reset()
    if call.startswith("decode"):
        with torch.cuda.graph(graph):
            held = CALLS[call](inputs, backend="triton")
        assert not card.reads + card.uploads
        graph.replay()
        torch.testing.assert_close([x.cpu() for x in held], [x.cpu() for x in expected])
    else:
        refusal = f"SDPA cannot answer while a CUDA graph is captured: it reads {READ[operator(call)]} on the host"
        with pytest.raises(RuntimeError, match=refusal), torch.cuda.graph(graph):
            CALLS[call](inputs, backend="triton")
