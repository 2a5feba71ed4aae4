"""Which rows of a call the self-check looks at, and how far they are off. Nothing here waits for the device.

Chosen are queries at the edges of tiles, the first and the last, in the first, a middle (of several sequences the
longest) and the last head and batch entry.
"""

from collections.abc import Iterable
from typing import Any

import torch

from .dense_rows import Rows, dense_rows, worst_error
from .gates import grouped_gate, log_of, pad_gate, per_query_head
from .operands import Masks

EDGES = (0, 15, 16, 31, 32, 63, 64, 127, 128)


def indices(values: Iterable[int | torch.Tensor], device: torch.device) -> torch.Tensor:
    """An index of numbers of host and device, without an upload."""
    return torch.stack(
        [x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.long, device=device) for x in values]
    )


def edges(length: int) -> list[int]:
    """Rows at the edges of tiles of a sequence, its middle one and its last one."""
    return sorted({*(row for row in EDGES if row < length), length // 2, length - 1})


def seen_from(
    position: torch.Tensor, key: torch.Tensor, present: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor:
    """(R, N) bool: which keys at `key` (N,) the queries at `position` (R,) may see."""
    visible = present.expand(position.shape[0], -1)
    if causal:
        visible = visible & (key <= position[:, None])
    if window is not None:
        visible = visible & (key > position[:, None] - window)
    return visible


def places(sizes: tuple[int, int], middle: Any = None) -> list[tuple[Any, int]]:
    """(batch entry, head): the first of both, the middle, and the last of both. `middle` replaces the middle entry."""
    entries, heads = sizes
    between = entries // 2 if middle is None else middle
    return list(dict.fromkeys([(0, 0), (between, heads // 2), (entries - 1, heads - 1)]))


def gates_of_head(
    gamma_k: torch.Tensor | None, gamma_v: torch.Tensor | None, log_gate: bool, head: int, q_heads: int, k_shape: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """log gamma_k and gamma_v (B, N) of a query head, from gates for keys of shape (B, Hkv, N, ...)."""
    batch, kv_heads, keys = k_shape[:3]
    kv, i = divmod(head, q_heads // kv_heads)

    def of_head(gate: torch.Tensor, neutral: float) -> torch.Tensor:
        gate = grouped_gate(gate, batch, kv_heads)[:, kv]
        return pad_gate(gate[:, min(i, gate.shape[1] - 1)], keys, neutral)

    log_gamma_k = None if gamma_k is None else of_head(log_of(gamma_k.double(), log_gate), 0.0)
    return log_gamma_k, None if gamma_v is None else of_head(gamma_v, 1.0)


def dense_error(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
    log_gate: bool = False,
) -> torch.Tensor:
    """`worst_error` of attention of (B, H, N, D)."""
    batch, query_heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    rows, key = indices(edges(queries), q.device), torch.arange(keys, device=q.device)
    errors = []
    for b, h in places((batch, query_heads)):
        kv = h * kv_heads // query_heads
        gates = gates_of_head(gamma_k, gamma_v, log_gate, h, query_heads, k.shape)
        gate_k, gate_v = (gate if gate is None else gate[b] for gate in gates)
        present = torch.ones_like(key, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[b]
        visible = seen_from(rows + keys - queries, key, present, masks.causal, masks.window)
        chosen = Rows(q[b, h, rows], k[b, kv], v[b, kv], gate_k, gate_v, present, visible)
        errors += _errors(chosen, out[b, h, rows], lse[b, h, rows], masks)
    return torch.stack(errors).amax()


def packed_error(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
    log_gate: bool = False,
) -> torch.Tensor:
    """`worst_error` of packed attention, (T, H, D). What lies beyond the longest length named is not counted."""
    query_heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[0]
    starts, lengths = cu_seqlens_q.long(), cu_seqlens_q.diff().long()
    longest = lengths.argmax()
    errors = []
    for b, h in places((lengths.shape[0], query_heads), longest):
        kv = h * kv_heads // query_heads
        entry = indices([b], q.device)
        length = lengths.index_select(0, entry)
        # rows beyond the sequence are its last one
        row = torch.minimum(indices([*EDGES, length[0] // 2, length[0] - 1], q.device), length - 1)
        counted = (row >= 0) & (row < max_seqlen_q)
        rows = (starts.index_select(0, entry) + row).clamp(0, q.shape[0] - 1)
        first, last = (cu_seqlens_k.long().index_select(0, entry + end) for end in (0, 1))
        key = torch.arange(keys, device=q.device) - first
        present = (key >= 0) & (key < last - first)
        visible = seen_from(row + (last - first) - length, key, present, masks.causal, masks.window)
        of_tokens = (x if x is None or x.dim() == 1 else x.T[None] for x in (gamma_k, gamma_v))
        gates = gates_of_head(*of_tokens, log_gate, h, query_heads, (1, kv_heads, keys))
        gate_k, gate_v = (gate if gate is None else gate[0] for gate in gates)
        chosen = Rows(q[rows, h], k[:, kv], v[:, kv], gate_k, gate_v, present, visible)
        errors += _errors(chosen, out[rows, h], lse[rows, h], masks, counted)
    return torch.stack(errors).amax()


def cache_error(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    log_gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
) -> torch.Tensor:
    """`worst_error` of decode over a cache. A length that the cache cannot hold is not counted."""
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    lengths, key = cache_seqlens.long(), torch.arange(capacity, device=q.device)
    errors = []
    for b, kv in places((batch, kv_heads), lengths.argmax()):
        entry = indices([b], q.device)
        length = lengths.index_select(0, entry)
        present = key < length
        pages = entry
        if block_table is not None:
            # entries past a sequence's length may be anything
            pages = block_table.index_select(0, entry)[0].long().masked_fill(~present[::page_size], 0)
        k, v = (cache[:, kv].index_select(0, pages).reshape(capacity, head_dim) for cache in (k_cache, v_cache))
        group = query_heads // kv_heads
        alone = any(per_query_head(gate, kv_heads) for gate in (log_gamma_k, gamma_v))
        for first in range(kv * group, (kv + 1) * group, 1 if alone else group):
            heads = slice(first, first + (1 if alone else group))
            gates = gates_of_head(log_gamma_k, gamma_v, True, first, query_heads, (batch, kv_heads, capacity))
            gate_k, gate_v = (x if x is None else x.index_select(0, entry)[0] for x in gates)
            of_q, of_out, of_lse = (x[:, heads].index_select(0, entry)[0].flatten(0, 1) for x in (q, out, lse))
            position = (torch.arange(queries, device=q.device) + length - queries).repeat(heads.stop - first)
            visible = seen_from(position, key, present, masks.causal, masks.window)
            counted = ((length >= 0) & (length <= capacity)).expand_as(of_lse)
            errors += _errors(Rows(of_q, k, v, gate_k, gate_v, present, visible), of_out, of_lse, masks, counted)
    return torch.stack(errors).amax()


def _errors(
    rows: Rows, out: torch.Tensor, lse: torch.Tensor, masks: Masks, counted: torch.Tensor | None = None
) -> list[torch.Tensor]:
    counted = torch.ones_like(lse, dtype=torch.bool) if counted is None else counted
    of_out, of_lse = dense_rows(rows, masks.scale, masks.softcap)
    # an lse alone says nothing of the output
    of_lse_alone = worst_error(lse, of_lse, counted)
    return [worst_error(out, of_out, counted[:, None]), torch.where(of_lse_alone > 1, of_lse_alone, -1.0)]
