"""The launch of attention over a cache: work list, kernel, merge."""

from typing import Any

import torch
import triton

from .gate_pages import GatePages
from .gates import expand_gate
from .operands import (
    Cache,
    Lengths,
    Masks,
    Parts,
    PositionGate,
    Rows,
    Scales,
    Shares,
    Sizes,
    Slots,
    logits_of,
)
from .paged_kernel import APART, POSITION, WRITTEN, merge_kernel, paged_kernel
from .plan import make_plan
from .plan_kernel import Plan
from .prescale_kernel import RawGate, odd
from .tiles import E4M3_TARGETS, Tile, paged_programs, paged_tile
from .validation_paged import per_token, value_scale

MERGE_ROWS = 4


def slots_of(x: torch.Tensor, heads: int) -> Slots:
    """Of (P, heads or 1, page) fp32, or (P, heads or 1, page, 2)."""
    pages = x if x.dim() == 3 else x.view(torch.int64).squeeze(-1)
    return Slots(pages, pages.stride(0), pages.stride(1) if pages.shape[1] == heads > 1 else 0, pages.stride(2))


def gates_of(
    gate: GatePages | PositionGate | None, sequences: int, kv_heads: int, heads: int
) -> tuple[int, tuple[Slots | None, RawGate | None, RawGate | None]]:
    """The form, and what the kernel takes of the gates, for `heads` planned heads."""
    if gate is None:
        return 0, (None, None, None)
    if isinstance(gate, GatePages):
        form = WRITTEN if gate.form == "written" else APART
        return form.value, (slots_of(gate.values, kv_heads), None, None)

    def raw(x: torch.Tensor | None) -> RawGate | None:
        if x is None:
            return None
        own = x.shape[1] if x.dim() == 3 else 1
        return RawGate(x, *map(odd, (*expand_gate(x, sequences, own).stride(), x.shape[-1])), heads // own)

    return POSITION.value, (None, raw(gate.log_gamma_k), raw(gate.gamma_v))


def paged_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    masks: Masks,
    *,
    seqlens_k: torch.Tensor | None,
    sequences: int,
    plan: Plan,
    parts: Parts,
    tile: Tile,
    block_table: torch.Tensor | None = None,
    gate: GatePages | PositionGate | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What `paged_kernel` is launched with, and compiled ahead of time with."""
    kv_heads, page, head_dim = k.shape[1:]
    heads = planned_heads(gate, q.shape[1], kv_heads)
    form, gates = gates_of(gate, sequences, kv_heads, heads)
    scales = token_scales = None
    if k_scale is not None and v_scale is not None:
        if per_token(k_scale):
            of_values = value_scale(gate if isinstance(gate, GatePages) else None, v_scale)
            of_slots = None if of_values is None else slots_of(of_values, kv_heads)
            token_scales = Scales(slots_of(k_scale, kv_heads), of_slots)
        else:
            scales = Scales(k_scale, v_scale)
    paged = block_table is not None
    return {
        "q": queries_of(q, q.dim() == 4),
        "cache": Cache(k, v, *k.stride()[:3], None if v.stride() == k.stride() else v.stride()[:3]),
        "slot_gate": gates[0],
        "gate_k": gates[1],
        "gate_v": gates[2],
        "scales": scales,
        "token_scales": token_scales,
        "sinks": sinks,
        "out": queries_of(out, q.dim() == 4),
        "lse": None if lse is None else Rows(lse, *map(odd, queries_of(lse, q.dim() == 4)[1:])),
        "lengths": Lengths(
            seqlens_k,
            block_table,
            0 if block_table is None else odd(block_table.stride(0)),
            None if seen is None else seen.view(torch.uint8),
            0 if seen is None else odd(seen.stride(0)),
        ),
        "plan": plan,
        "parts": parts,
        "logits": logits_of(masks),
        "sizes": Sizes(odd(sequences), odd(capacity(k, block_table))),
        "shares": Shares(q.shape[1] // heads, heads // kv_heads),
        "window": masks.window,
        "D": head_dim,
        "TILE": tile,
        "PAGE": page if paged else 0,
        "FORM": form,
        "CAUSAL": masks.causal,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def merge_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What `merge_kernel` is launched with after `paged_kernel` was with `given`."""
    taken = {name: given[name] for name in ("sinks", "out", "lse", "plan", "parts", "sizes", "shares", "D")}
    tile = given["TILE"]
    return taken | {"BM": tile.queries, "BN": tile.keys, "BR": MERGE_ROWS, "num_warps": 4, "enable_fp_fusion": True}


def queries_of(x: torch.Tensor, batched: bool) -> Rows:
    """Of (Tq, Hq, ...), or (B, Hq, Nq, ...) with rows counted through all sequences: b is what is left then."""
    if batched:
        return Rows(x, x.stride(0) - x.shape[2] * x.stride(2), x.stride(1), x.stride(2))
    return Rows(x, 0, x.stride(1), x.stride(0))


def planned_heads(gate: GatePages | PositionGate | None, query_heads: int, kv_heads: int) -> int:
    """Heads of which the work list makes items: those of the keys, or of the queries where gates are by query head."""
    gates = (gate.log_gamma_k, gate.gamma_v) if isinstance(gate, PositionGate) else ()
    by_query = any(x is not None and x.dim() == 3 and x.shape[1] > kv_heads for x in gates)
    return query_heads if by_query else kv_heads


def capacity(k: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Keys that a sequence may have."""
    return k.shape[2] * (1 if block_table is None else block_table.shape[1])


def paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    masks: Masks,
    target: str,
    *,
    seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    gate: GatePages | PositionGate | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    tile: Tile | None = None,
    programs: int | None = None,
) -> None:
    """Launch the work list, the kernel and the merge; nothing is read on the host.

    Args:
        q, out: (Tq, Hq, D) with contiguous rows, the queries of all sequences, or (B, Hq, Nq, D); out of q's dtype.
        k, v: pages (P, Hkv, page, D) with `block_table` (B, n) int32, or (B, Hkv, N, D) without, with
            contiguous rows; of q's dtype, or float8_e4m3fn or int8 with scales. Of equal strides they are read fastest.
        lse: (Tq, Hq), or (B, Hq, Nq), fp32, or None.
        seqlens_k: (B,) int32, or None where all sequences have N keys.
        max_seqlen_q: the longest query; it chooses the tile, results do not depend on it.
        cu_seqlens_q: (B + 1,) int32, or None for q (B, Hq, Nq, D).
        gate: by slot, or by position; that may have Hq heads.
        k_scale, v_scale: fp32, one element or (P, Hkv, page); by slot, gates that are "apart" hold v_scale in gV.
        sinks: (Hq,), one more logit for each head, of value 0.
        seen: (B, N) bool, False hides a key, which may hold NaN; without pages.
        tile, programs: in place of what the tables say for `target`.

    Raises:
        ValueError: the target has no products of such a cache.
    """
    kv_heads = k.shape[1]
    if k.dtype == torch.float8_e4m3fn and target not in E4M3_TARGETS:
        raise ValueError(f"a float8_e4m3fn cache needs sm_89 or later, got {target}: use int8 or backend='sdpa'")
    if cu_seqlens_q is not None:
        sequences = cu_seqlens_q.shape[0] - 1
    else:
        sequences = k.shape[0] if block_table is None else block_table.shape[0]
    heads = planned_heads(gate, q.shape[1], kv_heads)
    group = q.shape[1] // heads
    tile = tile or paged_tile(target, q.shape[-1], q.element_size(), max(max_seqlen_q, 1) * group)
    programs = programs or paged_programs(target, q.device, tile)
    plan = make_plan(
        cu_seqlens_q,
        seqlens_k,
        sequences=sequences,
        queries=max_seqlen_q,
        total_queries=q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[2],
        keys=capacity(k, block_table),
        kv_heads=heads,
        group=group,
        rows=tile.queries,
        tile_keys=tile.keys,
        programs=programs,
        causal=masks.causal,
        window=masks.window,
        device=q.device,
    )
    parts = Parts(
        torch.empty((2 * programs, tile.queries, q.shape[-1]), dtype=torch.float32, device=q.device),
        torch.empty((2 * programs, tile.queries), dtype=torch.float32, device=q.device),
    )
    given = paged_arguments(
        q, k, v, out, lse, masks, seqlens_k=seqlens_k, sequences=sequences, plan=plan, parts=parts, tile=tile,
        block_table=block_table, gate=gate, k_scale=k_scale, v_scale=v_scale, sinks=sinks, seen=seen,
    )  # fmt: skip
    paged_kernel[(programs,)](**given)
    merge_kernel[(programs, triton.cdiv(tile.queries, MERGE_ROWS))](**merge_arguments(given))
