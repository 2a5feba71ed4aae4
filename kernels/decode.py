"""The launch of decode: how many splits, and the buffers between `split_kernel` and `merge_kernel`."""

import math
from functools import cache

import torch
import triton

from .decode_kernel import merge_kernel, split_kernel
from .gates import expand_gate, per_query_head
from .tiles import decode_tile, multiprocessors, split_keys

MERGE_BLOCK = 16


def padded_head_dim(head_dim: int) -> int:
    """Columns of a decode tile: a padded product costs less here than one 16 columns wide, which idles the warps."""
    return max(32, triton.next_power_of_2(head_dim))


@cache
def split_count(programs: int, most: int, slots: int) -> int:
    """Splits of a row block: the fewest, up to `most`, whose waves fill `slots` to 85% of the best filling."""
    if programs >= 0.8 * slots:
        return 1

    def filling(splits: int) -> float:
        waves = programs * splits / slots
        return waves / -(-programs * splits // slots)

    best = max(filling(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if filling(splits) >= 0.85 * best)


def repeated(k, v, gamma_k, gamma_v, group):
    if per_query_head(gamma_k, k.shape[1]) or per_query_head(gamma_v, k.shape[1]):
        kv = k.shape[1]
        gamma_k, gamma_v = (x.repeat_interleave(group, 1) if x is not None and x.dim() == 3 and not per_query_head(x, kv) else x for x in (gamma_k, gamma_v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return k, v, gamma_k, gamma_v


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    target: str,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    splits: int | None = None,
) -> None:
    """Launch split and merge. Rows of q, k, v and out must be contiguous and less than 2**23 elements apart.

    k and v are (B, Hkv, Nk, D), or pages (P, Hkv, page size, D) with `block_table` (B, pages of a sequence) int32.
    `cache_seqlens` (B,) int32 gives the keys of each sequence; without it all Nk are there.
    """
    batch, query_heads, queries, head_dim = q.shape
    k, v, gamma_k, gamma_v = repeated(k, v, gamma_k, gamma_v, query_heads // k.shape[1])
    kv_heads, page = k.shape[1:3]
    keys = page if block_table is None else page * block_table.shape[1]
    group = query_heads // kv_heads
    tile = decode_tile(target, head_dim, q.element_size(), queries * group)
    programs = triton.cdiv(queries * group, tile.queries) * kv_heads * batch
    if splits is None:
        seen_keys = keys if window is None else min(keys, window + queries - 1)
        splits = split_count(programs, max(seen_keys // split_keys(target, head_dim), 1), 2 * multiprocessors(q.device))
    part_out = torch.empty((batch, query_heads, queries, splits, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch, query_heads, queries, splits), dtype=torch.float32, device=q.device)
    if gamma_k is not None:
        gamma_k = expand_gate(gamma_k, batch, kv_heads)
    if gamma_v is not None:
        gamma_v = expand_gate(gamma_v, batch, kv_heads)
    split_kernel[(programs, splits)](
        q,
        k,
        v,
        gamma_k,
        gamma_v,
        None if key_padding_mask is None else key_padding_mask.view(torch.uint8),
        cache_seqlens,
        block_table,
        part_out,
        part_lse,
        scale * math.log2(math.e),
        0.0 if softcap is None else softcap * math.log2(math.e),
        queries,
        keys,
        0 if gamma_k is None else gamma_k.shape[-1],
        0 if gamma_v is None else gamma_v.shape[-1],
        kv_heads,
        group,
        0 if window is None else min(window, keys),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(gamma_k.stride()[:2] if gamma_k is not None else (0, 0)),
        *(gamma_v.stride()[:2] if gamma_v is not None else (0, 0)),
        key_padding_mask.stride(0) if key_padding_mask is not None else 0,
        block_table.stride(0) if block_table is not None else 0,
        D=head_dim,
        BD=padded_head_dim(head_dim),
        BM=tile.queries,
        BN=tile.keys,
        PAGE=1 if block_table is None else page,
        CAUSAL=causal and queries > 1,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    merge_kernel[(batch * query_heads * queries,)](
        part_out,
        part_lse,
        out,
        lse,
        query_heads,
        queries,
        splits,
        *out.stride()[:3],
        D=head_dim,
        BD=triton.next_power_of_2(head_dim),
        BS=MERGE_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
