"""Packed sequences and caches for backends without a kernel of their own: one dense call a sequence.

The lengths and the block table are read on the host: each call waits for the device, and no CUDA graph can hold it.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from .validation import check_cache_values, check_offset_values

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]


def varlen_by_sequence(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each packed sequence, differentiable where `attend` is.

    Args:
        attend: (q (1, Hq, Nq, D), k, v (1, Hkv, Nk, D), gamma_k, gamma_v) -> out (1, Hq, Nq, D), lse (1, Hq, Nq).
            Nq and Nk may be 0.
        q: (Tq, Hq, D).
        k, v: (Tk, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) integers, nondecreasing from 0 to Tq and Tk.
        max_seqlen_q, max_seqlen_k: at least the longest lengths.
        gamma_k, gamma_v: (Tk,), (Tk, Hkv) or (Tk, Hq), gamma_k as `attend` takes it.

    Returns:
        out (Tq, Hq, D) and lse (Tq, Hq) fp32.

    Raises:
        ValueError: cu_seqlens do not run from 0 to the number of tokens, or decrease, or a sequence is longer than the
            longest named.
    """
    tokens, longest = (q.shape[0], k.shape[0]), (max_seqlen_q, max_seqlen_k)
    bounds_q, bounds_k = map(pairwise, check_offset_values(cu_seqlens_q, cu_seqlens_k, tokens, longest))

    # an empty part first: nothing else is there to concatenate when there is no sequence
    outs, lses = [q[:0]], [q.new_empty((0, q.shape[1]), dtype=torch.float32)]
    for (first_q, last_q), (first_k, last_k) in zip(bounds_q, bounds_k, strict=True):
        heads_first = [x.transpose(0, 1)[None] for x in (q[first_q:last_q], k[first_k:last_k], v[first_k:last_k])]
        gates = [None if gate is None else _heads_first(gate[first_k:last_k]) for gate in (gamma_k, gamma_v)]
        out, lse = attend(*heads_first, *gates)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].T)
    return torch.cat(outs), torch.cat(lses)


def decode_by_sequence(
    attend: Attend,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last queries of each sequence over the used part of its cache, which alone is read.

    Args:
        attend: as in `varlen_by_sequence`.
        q: (B, Hq, Nq, D).
        k_cache, v_cache: (B, Hkv, N, D), or (n_pages, Hkv, page_size, D) with a block_table.
        cache_seqlens: (B,) integers, the keys of each sequence.
        block_table: None or (B, max_pages) integers, the pages of each sequence in order.
        gamma_k, gamma_v: (N',), (B, N'), (B, Hkv, N') or (B, Hq, N') by logical position, gamma_k as `attend` takes it.

    Returns:
        out (B, Hq, Nq, D) and lse (B, Hq, Nq) fp32.

    Raises:
        ValueError: a length is negative or beyond the cache, or a page that a sequence uses does not exist.
    """
    page_size = k_cache.shape[2]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    lengths = check_cache_values(cache_seqlens, capacity, block_table, k_cache.shape[0], page_size)

    outs, lses = [q[:0]], [q.new_empty((0, *q.shape[1:3]), dtype=torch.float32)]
    for b, length in enumerate(lengths):
        if block_table is None:
            k, v = (cache[b : b + 1, :, :length] for cache in (k_cache, v_cache))
        else:
            index = block_table[b, : -(-length // page_size)].long()
            # (pages, Hkv, page_size, D) -> (1, Hkv, length, D)
            k, v = (cache[index].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in (k_cache, v_cache))
        gates = [None if gate is None else _gate_of_entry(gate, b, length) for gate in (gamma_k, gamma_v)]
        out, lse = attend(q[b : b + 1], k, v, *gates)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _heads_first(gate: torch.Tensor) -> torch.Tensor:
    # (N,), or (N, H) -> (1, H, N)
    return gate if gate.dim() == 1 else gate.T[None]


def _gate_of_entry(gate: torch.Tensor, b: int, length: int) -> torch.Tensor:
    # (N',), or (B, N') -> (1, N'), or (B, H, N') -> (1, H, N')
    return (gate if gate.dim() == 1 else gate[b : b + 1])[..., :length]
