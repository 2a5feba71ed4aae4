"""The launch of the work list: its size is of what the host knows, all else is counted on the device."""

from typing import Any

import torch
import triton

from .plan_kernel import OVERHEAD, Heads, Plan, plan_kernel

BLOCK = 1024
MOST = 2**31


def item_count(sequences: int, total_queries: int, kv_heads: int, group: int, rows: int, *, packed: bool) -> int:
    """Items that any batch of this many queries may have; packed ones may be of any lengths, and padded."""
    if not packed:
        return sequences * kv_heads * -(-total_queries // sequences * group // rows)
    return kv_heads * (total_queries * group // rows + min(sequences + 1, total_queries))


def plan_arguments(
    cu_seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    *,
    sequences: int,
    total_queries: int,
    keys: int,
    kv_heads: int,
    group: int,
    rows: int,
    tile_keys: int,
    programs: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """What `plan_kernel` is launched and compiled with, its outputs and scratch allocated on `device`."""
    n_items = item_count(sequences, total_queries, kv_heads, group, rows, packed=cu_seqlens_q is not None)
    cost = n_items * max(-(-keys // tile_keys) + int(OVERHEAD), 8)
    if max(cost, total_queries * group) >= MOST:
        raise ValueError(f"the call must have less than 2**31 tiles of keys, got up to {cost}: split the batch")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return {
        "cu_seqlens_q": cu_seqlens_q,
        "seqlens_k": seqlens_k,
        "plan": Plan(empty(n_items + 1, 8), empty(programs + 1, 2), empty(1)),
        "sequence_ends": empty(sequences + 1),
        "heads": Heads(kv_heads, group),
        "sequences": sequences,
        "total_queries": total_queries,
        "keys": keys,
        "n_items": n_items,
        "programs": programs,
        "window": MOST // 2 if window is None else min(window, MOST // 2),
        "BM": rows,
        "BN": tile_keys,
        "CAUSAL": causal,
        "BLOCK": BLOCK,
        "BP": triton.next_power_of_2(programs + 1),
        "num_warps": 8,
    }


def make_plan(
    cu_seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    *,
    sequences: int,
    queries: int,
    total_queries: int,
    keys: int,
    kv_heads: int,
    group: int,
    rows: int,
    tile_keys: int,
    programs: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Plan:
    """Launch `plan_kernel`; nothing is read on the host, and the sizes are of these numbers alone.

    cu_seqlens_q: (sequences + 1,) int32; None: each sequence has `queries`. seqlens_k: (sequences,) int32, at most
    `keys`; None: each has `keys`. An item has `rows` packed rows of q, a tile `tile_keys` keys.
    """
    given = plan_arguments(
        cu_seqlens_q,
        seqlens_k,
        sequences=sequences,
        total_queries=sequences * queries if cu_seqlens_q is None else total_queries,
        keys=keys,
        kv_heads=kv_heads,
        group=group,
        rows=rows,
        tile_keys=tile_keys,
        programs=programs,
        causal=causal,
        window=window,
        device=device,
    )
    plan_kernel[(1,)](**given)
    return given["plan"]
