"""The section of mixed batches: what other engines are given, beside stand-ins that do what theirs document."""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from videoanchor_triton.kernels.reference import reference_attention

CPU = torch.device("cpu")
engines: Any = importlib.import_module("benchmarks.attention.helpers.engines")
mixed: Any = importlib.import_module("benchmarks.attention.helpers.mixed")
mixed_tasks: Any = importlib.import_module("benchmarks.attention.helpers.mixed_tasks")
decisions: Any = importlib.import_module("benchmarks.helpers.decisions")

Tensor = torch.Tensor
BATCHES = mixed.batches(False)


def over_pages(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    """Causal attention of packed q (Tq, Hq, D) over pages (P, page, Hkv, D), as both engines lay them out."""
    assert table.dtype == offsets.dtype == lengths.dtype == torch.int32
    outs = []
    for b, rows in enumerate(q.split(offsets.diff().tolist())):
        used = table[b, : -(-int(lengths[b]) // k.shape[1])].long()
        keys, values = (x[used].flatten(0, 1)[: lengths[b]].transpose(0, 1)[None] for x in (k, v))
        outs.append(reference_attention(rows.transpose(0, 1)[None], keys, values, causal=True)[0][0].transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


def flash_attn(factor: float) -> dict[str, Callable[..., Tensor]]:
    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, *, causal: bool,
        block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        return factor * over_pages(q, k, v, cu_q, cu_k.diff(), block_table)

    def kvcache(q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, causal: bool) -> Tensor:
        assert causal
        offsets = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
        return factor * over_pages(q.flatten(0, 1), k, v, offsets, cache_seqlens, block_table).view_as(q)

    return {"flash_attn_varlen_func": varlen, "flash_attn_with_kvcache": kvcache}


def vllm(factor: float, of_today: bool) -> dict[str, Callable[..., None]]:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, seqused_k: Tensor,
        max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int, int], block_table: Tensor,
        softcap: float, q_descale: None, k_descale: None, v_descale: None,
    ) -> None:  # fmt: skip
        assert causal
        assert window_size == (-1, -1)
        assert softcap == 0
        assert q_descale is k_descale is v_descale is None
        assert softmax_scale == q.shape[-1] ** -0.5
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(seqused_k.max()))
        out.copy_(factor * over_pages(q, k, v, cu_seqlens_q, seqused_k, block_table))

    def with_segments(
        *, seq_threshold_3D: int, num_par_softmax_segments: int, softmax_segm_output: Tensor,
        softmax_segm_max: Tensor, softmax_segm_expsum: Tensor, **given: Any,
    ) -> None:  # fmt: skip
        q = given["q"]
        assert seq_threshold_3D == 128 // given["k"].shape[2]
        assert softmax_segm_max.shape == softmax_segm_expsum.shape == (*q.shape[:2], num_par_softmax_segments)
        assert softmax_segm_output.shape == (*softmax_segm_max.shape, q.shape[-1])
        attend(**given)

    return {"unified_attention": with_segments if of_today else attend}


def put(monkeypatch: pytest.MonkeyPatch, name: str, functions: dict[str, Any]) -> None:
    for i in range(name.count(".") + 1):
        part = ".".join(name.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    for function, value in functions.items():
        setattr(sys.modules[name], function, value)


def row_of(short: str, contender: str) -> Any:
    mixed_tasks._held.clear()
    tasks = mixed_tasks.mixed_tasks(CPU)
    task = next(t for t in tasks if (t.row.case, t.row.contender) == (BATCHES[short].name, contender))
    return task.run(task.row)


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.05, "wrong")], ids=["right", "wrong"])
@pytest.mark.parametrize("short", BATCHES)
def test_what_other_engines_are_given(short: str, factor: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn", flash_attn(factor))
    names = ["flash-attn varlen, ungated"]
    if BATCHES[short].equal:
        names.append("flash-attn kvcache, ungated")
    for name in names:
        assert row_of(short, name).status == status
    for of_today in (True, False):
        put(monkeypatch, engines.VLLM, vllm(factor, of_today))
        assert row_of(short, "vLLM Triton, ungated").status == status


def test_what_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    row = row_of("b", "flash-attn varlen, ungated")
    assert row.status == "skipped"
    assert row.reason.startswith("flash_attn cannot be imported: ModuleNotFoundError")
    row = row_of("c", "FlexAttention paged, gated")
    assert (row.status, row.reason) == ("skipped", "takes sequences of equally many queries")


def test_a_wrong_call_of_ours_is_seen_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mixed_tasks.va.anchored_attention_paged
    monkeypatch.setattr(mixed_tasks.va, "anchored_attention_paged", lambda *given, **o: 1.02 * right(*given, **o))
    for caller in mixed_tasks.CALLERS:
        if caller.name.startswith("ours") and "position" not in caller.name:
            assert row_of("c", caller.name).status == "wrong", caller.name


def test_a_plan_that_leaves_out_rows_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_of("c", "ours, the plan alone").status == "ok"
    right = mixed_tasks.make_plan

    def without_one(*given: Any, **options: Any) -> Any:
        plan = right(*given, **options)
        plan.items[0, 7] = 0
        return plan

    monkeypatch.setattr(mixed_tasks, "make_plan", without_one)
    assert row_of("c", "ours, the plan alone").status == "wrong"


def test_what_is_not_written_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = [task for task in mixed_tasks.mixed_tasks(CPU) if task.row.case.startswith("write")]
    assert {task.row.contender for task in writing} == {*mixed_tasks.WRITERS}
    assert {task.run(task.row).status for task in writing} == {"ok"}
    right = mixed_tasks.va.write_pages

    def without_the_last(
        k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *given: Any, **o: Any
    ) -> None:
        right(k, v, k_pages, v_pages, torch.cat([slots[:-1], slots.new_tensor([-1])]), *given, **o)

    monkeypatch.setattr(mixed_tasks.va, "write_pages", without_the_last)
    assert {task.run(task.row).status for task in writing if task.row.contender.startswith("ours")} == {"wrong"}


def test_the_floors_of_the_batches() -> None:
    """Work is what an ideal kernel does: bytes of the cache, or operations over visible pairs."""
    large = mixed.batches(True)
    assert large["b"].work == 131072 * 4 * 128 * 4
    pairs = 32 * 8192 + 4 * (2048 * 65536 - 2048 * 2047 // 2)
    assert large["c"].work == 4 * 28 * 128 * pairs
    assert all(len(batch.queries) == len(batch.keys) for batch in large.values())


def test_the_rows_of_a_tile_are_those_of_the_table() -> None:
    assert [decisions.paged_rows(n) for n in (1, 7, 16, 17, 64, 65, 100_000)] == [16, 16, 16, 32, 64, 128, 128]
