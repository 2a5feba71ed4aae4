"""The launch of prefill: prescale, tiles and descriptors for `prefill_kernel`."""

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import measured
from .decode import repeated
from .prefill_kernel import prefill_kernel
from .prescale import prescale
from .tiles import TMA_TARGETS, Tile, prefill_tile, split_head_dim


def takes_tma(x: torch.Tensor) -> bool:
    """Whether the copy engine can address x: 16-byte aligned, no dimension repeated by stride 0."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    repeated = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return aligned and not repeated and x.data_ptr() % 16 == 0


def descriptors(x: torch.Tensor, keys: int, parts: tuple[int, int]) -> list[TensorDescriptor | None]:
    """Descriptors of (B, H, N, D) tiles of `keys` rows, one for each part of the head dim, None for a part of 0."""
    shape, strides = list(x.shape), list(x.stride())
    return [TensorDescriptor(x, shape, strides, [1, 1, keys, part]) if part else None for part in parts]


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks,
    post_exp: bool,
    target: str,
    *,
    log_gate=False,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor, int] | None = None,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> None:
    """Launch prescale and prefill. Rows of q, k, v and out must be contiguous and less than 2**23 elements apart.

    Packed sequences come as one batch entry (1, H, T, D) with `cu_seqlens`, the offsets of queries and keys (B + 1,)
    int32 and the longest query length. lse (B, Hq, Nq) has contiguous rows. `tile` and `tma` replace what the tables
    say for `target`; tensors that the copy engine cannot address are copied first.
    """
    scale, causal, window, softcap = masks
    batch, query_heads, queries, head_dim = q.shape
    k, v, gamma_k, gamma_v = repeated(k, v, gamma_k, gamma_v, query_heads // k.shape[1])
    kv_heads, keys = k.shape[1:3]
    cu_q, cu_k, longest = (None, None, queries) if cu_seqlens is None else cu_seqlens
    tile = tile or prefill_tile(
        target,
        head_dim,
        q.element_size(),
        padded=key_padding_mask is not None,
        varlen=cu_q is not None,
        window=window is not None,
        softcap=softcap is not None,
    )
    post_exp = post_exp and not measured.LOG_BIAS.get((target, head_dim), False)
    form, v, gate, rest = prescale(v, gamma_k, gamma_v, key_padding_mask, post_exp, tile.keys, log_gate=log_gate)
    # fp32 tiles spill with descriptors
    tma = target in TMA_TARGETS and q.element_size() < 4 if tma is None else tma
    if tma:
        k, v = (x if takes_tma(x) else x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    parts = split_head_dim(target, head_dim)
    programs = (triton.cdiv(max(longest, 1), tile.queries), query_heads, batch if cu_q is None else cu_q.numel() - 1)
    prefill_kernel[programs](
        q,
        k,
        v,
        *(descriptors(k, tile.keys, parts) if tma else (None, None)),
        *(descriptors(v, tile.keys, parts) if tma else (None, None)),
        gate,
        rest,
        out,
        lse,
        cu_q,
        cu_k,
        scale * math.log2(math.e),
        0.0 if softcap is None else softcap * math.log2(math.e),
        queries,
        keys,
        query_heads // kv_heads,
        0 if window is None else min(window, keys),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if gate is None else (gate.stride(0), gate.stride(1) if gate.shape[1] > 1 else 0)),
        *out.stride()[:3],
        *lse.stride()[:2],
        D0=parts[0],
        D1=parts[1],
        BM=tile.queries,
        BN=tile.keys,
        GATE=form,
        PADDED=key_padding_mask is not None,
        CAUSAL=causal,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
