"""The launch of prefill: prescale, tiles and descriptors for `prefill_kernel`."""

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import measured
from .operands import Masks, Offsets, logits_of, rows_of
from .prefill_kernel import Gate, Groups, prefill_kernel
from .prescale import POST_EXP, prescale
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


def prefill_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
    target: str,
    tile: Tile,
    *,
    padded: bool = False,
    offsets: Offsets | None = None,
    tma: bool = False,
) -> dict[str, Any]:
    """What `prefill_kernel` is launched with, and compiled ahead of time with.

    v, bias and weight as `prescale` makes them; `padded`: -inf in the bias hides a key. With `tma`, k and v must be as
    `takes_tma` says.
    """
    heads, (queries, keys) = q.shape[1], (x.shape[2] for x in (q, k))
    parts = split_head_dim(target, q.shape[-1])
    gate = weight if bias is None else bias
    (k_desc0, k_desc1), (v_desc0, v_desc1) = (descriptors(x, tile.keys, parts) if tma else (None, None) for x in (k, v))
    return {
        "q": rows_of(q),
        "k": rows_of(k),
        "v": rows_of(v),
        "k_desc0": k_desc0,
        "k_desc1": k_desc1,
        "v_desc0": v_desc0,
        "v_desc1": v_desc1,
        "gate": Gate(bias, weight, *((0, 0) if gate is None else gate.stride()[:2])),
        "out": rows_of(out),
        "lse": lse,
        "offsets": offsets,
        "logits": logits_of(masks),
        "groups": Groups(heads // k.shape[1], heads // v.shape[1], 1 if gate is None else heads // gate.shape[1]),
        "Nq": queries,
        "Nk": keys,
        "window": None if masks.window is None else min(masks.window, keys),
        "D": parts,
        "TILE": tile,
        "PADDED": padded,
        "CAUSAL": masks.causal,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
    post_exp: bool,
    target: str,
    *,
    log_gate: bool = False,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor, int] | None = None,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> None:
    """Launch prescale and prefill. Rows of q, k, v and out must be contiguous and less than 2**23 elements apart.

    Packed sequences come as one batch entry (1, H, T, D) with `cu_seqlens`, the offsets of queries and keys (B + 1,)
    int32 and the longest query length. lse (B, Hq, Nq) is contiguous. Gates as `prescale` takes them. `tile` and `tma`
    replace what the tables say for `target`; tensors that the copy engine cannot address are copied first.
    """
    batch, query_heads, queries, head_dim = q.shape
    offsets, longest = (None, queries) if cu_seqlens is None else (Offsets(*cu_seqlens[:2]), cu_seqlens[2])
    tile = tile or prefill_tile(
        target,
        head_dim,
        q.element_size(),
        padded=key_padding_mask is not None,
        varlen=offsets is not None,
        window=masks.window is not None,
        softcap=masks.softcap is not None,
    )
    post_exp = post_exp and not measured.LOG_BIAS.get((target, head_dim), False)
    form, v, gate, rest = prescale(v, gamma_k, gamma_v, key_padding_mask, post_exp, tile.keys, log_gate=log_gate)
    bias, weight = (None, gate) if form == POST_EXP else (gate, rest)
    # fp32 tiles spill with descriptors
    tma = target in TMA_TARGETS and q.element_size() < 4 if tma is None else tma
    if tma:
        k, v = (x if takes_tma(x) else x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    arguments = prefill_arguments(
        q, k, v, bias, weight, out, lse, masks, target, tile,
        padded=key_padding_mask is not None, offsets=offsets, tma=tma,
    )  # fmt: skip
    sequences = batch if offsets is None else offsets.q.numel() - 1
    prefill_kernel[(triton.cdiv(max(longest, 1), tile.queries), query_heads, sequences)](**arguments)
