"""The attention's operators on an emulated card: waits for it, mixed devices, a card that is not current, graphs."""

from typing import Any

import pytest
import torch
from emulated_cuda.attention_calls import CALLS, Inputs, Sizes, operator
from emulated_cuda.budgets import assert_within
from emulated_cuda.device import EmulatedCuda

import videoanchor_triton as va
from videoanchor_triton.kernels import validation
from videoanchor_triton.kernels.plan import make_plan

CPU, FIRST, SECOND = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))
# roundings of some twenty terms; what comes from a wrong card or row is off by a part of the whole
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = {"triton": Sizes(), "sdpa": Sizes(dtype=torch.float64), "reference": Sizes()}


@pytest.mark.parametrize("backend", SIZES)
@pytest.mark.parametrize("call", CALLS)
def test_right_on_a_card_that_is_not_current_and_within_its_budget(
    call: str, backend: str, two_cards: EmulatedCuda
) -> None:
    expected = CALLS[call](Inputs(SIZES[backend], CPU), backend="reference")
    inputs = Inputs(SIZES[backend], SECOND)
    two_cards.reset()
    found = CALLS[call](inputs, backend=backend)
    if backend != "reference":  # dense, for tests: it may wait
        assert_within(two_cards, "merge" if operator(call) == "merge" else f"{operator(call)}, {backend}")
    assert torch.cuda.current_device() == 0
    assert (two_cards.launches > 0) == (backend == "triton" and operator(call) != "merge")
    for mine, exact in zip(found, expected, strict=True):
        assert mine.device == SECOND
        tolerance = TOLERANCES[mine.dtype]
        torch.testing.assert_close(mine.cpu(), exact, rtol=tolerance, atol=tolerance)


def test_gates_of_another_card_are_named(two_cards: EmulatedCuda) -> None:
    inputs = Inputs(Sizes(), FIRST)
    inputs.slot_gates["written"] = va.GatePages(inputs.slot_gates["written"].values.to(SECOND), "written")
    for call in ("paged: written gates", "write: written gates"):
        two_cards.reset()
        with pytest.raises(ValueError, match="gate_pages must be on the cache's device cuda:0, got cuda:1"):
            CALLS[call](inputs)
        assert not two_cards.launches


def test_the_plan_of_another_card_waits_for_nothing(two_cards: EmulatedCuda) -> None:
    inputs = Inputs(Sizes(), SECOND)
    two_cards.reset()
    with torch.cuda.device(SECOND):
        plan = make_plan(
            inputs.mixed, inputs.lengths, sequences=2, queries=7, total_queries=20, keys=32, kv_heads=2, group=2,
            rows=16, tile_keys=16, programs=3, causal=True, window=None, device=SECOND,
        )  # fmt: skip
    assert_within(two_cards, "plan")
    assert two_cards.launches == 1
    assert {x.device for x in plan} == {SECOND}


def arguments() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The public operators with all of their arguments by name."""
    x = Inputs(Sizes(), FIRST)
    q, q_gate = x.q[:, :, :2], torch.ones(2).to(FIRST)
    dense = {"q": q, "k": x.k, "v": x.v, "key_padding_mask": x.mask, "gamma_q": q_gate, **x.gates}
    cached = {"cache_seqlens": x.lengths, "block_table": x.table, "gamma_q": q_gate, **x.gates}
    packed = {"q": x.packed_q, "k": x.packed_k, "v": x.packed_v, "gamma_q": torch.ones(20).to(FIRST), **x.packed_gates}
    offsets = {"cu_seqlens_q": x.offsets, "cu_seqlens_k": x.offsets}
    parts = {"out_a": q, "lse_a": q[..., 0].float(), "out_b": q, "lse_b": q[..., 0].float()}
    of_pages = {"k_pages": x.k_pages, "v_pages": x.v_pages}
    tables = {"cu_seqlens_q": x.mixed, "seqlens_k": x.lengths, "block_table": x.table, "sinks": x.sinks}
    gates = {
        "gate_pages": x.slot_gates["apart"],
        "gamma_k": x.packed_gates["gamma_k"],
        "gamma_v": torch.ones(20).to(FIRST),
    }
    return {
        "paged": (va.anchored_attention_paged, {"q": x.packed_q, **of_pages, **tables, "max_seqlen_q": 7}),
        "quantised": (
            va.anchored_attention_paged,
            {"q": x.packed_q, "k_pages": x.codes[0], "v_pages": x.codes[1], **tables, **x.scales, "max_seqlen_q": 7},
        ),
        "write": (va.write_pages, {"k": x.packed_k, "v": x.packed_v, **of_pages, "slot_mapping": x.slots, **gates}),
        "attention": (va.anchored_attention, dense),
        "decode": (va.anchored_attention_decode, {"q": q, "k_cache": x.k_pages, "v_cache": x.v_pages, **cached}),
        "varlen": (va.anchored_attention_varlen, {**packed, **offsets, "max_seqlen_q": 20, "max_seqlen_k": 20}),
        "merge": (va.merge_attention, parts),
    }


@pytest.mark.parametrize("other", [CPU, SECOND], ids=str)
@pytest.mark.parametrize("name", ["attention", "decode", "paged", "quantised", "write", "varlen", "merge"])
def test_one_argument_on_another_device_is_named(name: str, other: torch.device, two_cards: EmulatedCuda) -> None:
    call, given = arguments()[name]
    call(**given)
    first = next(iter(given))
    two_cards.reset()
    for argument, x in given.items():
        if isinstance(x, torch.Tensor) and argument != first:
            with pytest.raises(ValueError, match=rf"^{argument} must be on {first}'s device cuda:0, got {other}"):
                call(**{**given, argument: x.to(other)})
    assert not two_cards.launches


@pytest.mark.parametrize(
    "call",
    ["decode: one query", "cache: one query", "pages: two queries", "paged: written gates", "paged: int8, sinks"],
)
def test_a_graph_of_decode_replays_with_other_lengths_and_gates(call: str, card: EmulatedCuda) -> None:
    inputs, graph = Inputs(Sizes(), FIRST), torch.cuda.CUDAGraph()
    card.reset()
    with torch.cuda.graph(graph):
        held = CALLS[call](inputs, backend="triton")
    assert not card.reads + card.uploads
    before = [x.clone() for x in held]
    inputs.lengths.copy_(torch.tensor([5, 24], dtype=torch.int32))
    inputs.gates["gamma_k"].mul_(2 + torch.arange(24.0).to(FIRST))
    inputs.q.neg_()
    inputs.mixed.copy_(torch.tensor([0, 1, 6], dtype=torch.int32))
    graph.replay()
    for mine, old, fresh in zip(held, before, CALLS[call](inputs, backend="triton"), strict=True):
        assert not torch.equal(mine, old)
        assert torch.equal(mine, fresh)


def test_capture_raises_where_something_waits(card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    check = validation.check_cache

    def waiting(q: torch.Tensor, k: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor | None) -> int:
        assert lengths.max().item() <= 24
        return check(q, k, lengths, table)

    monkeypatch.setattr(validation, "check_cache", waiting)
    inputs = Inputs(Sizes(), FIRST)
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        inputs.cache(backend="triton")


def test_a_budget_that_is_passed_names_the_line(card: EmulatedCuda) -> None:
    card.reads.update({("item", "tests/test_it.py:2"): 5, ("item", "kernels/paged.py:1"): 1})
    with pytest.raises(AssertionError, match=r"cache, triton: 1 reads, 0 allowed\n  1 item  kernels/paged.py:1"):
        assert_within(card, "cache, triton")
