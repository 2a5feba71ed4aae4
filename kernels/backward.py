"""The launch of backward: gates, layouts and the memory of the gradients for the two kernels."""

import math
from typing import Any

import torch
import triton

from .backward_kernel import d_keys_kernel, d_queries_kernel
from .gates import expand_gate, pad_gate, per_query_head
from .tiles import Tile, backward_tiles


def tile_options(tile: Tile) -> dict[str, Any]:
    """Launch options of a tile."""
    return {
        "BM": tile.queries,
        "BN": tile.keys,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def named_strides(**tensors: torch.Tensor | None) -> dict[str, int]:
    """stride_qb, stride_qh, stride_qn of q (B, H, N, D); stride_gkb, stride_gkh of the gate gk (B, H, N); and so on."""
    return {
        f"stride_{name}{dim}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, dim in enumerate("bh" if name.startswith("g") else "bhn")
    }


def sum_of_gate(d_gate: torch.Tensor, gamma: torch.Tensor, packed: bool) -> torch.Tensor:
    """Sum a gradient (B, Nk, Hkv), or packed (Tk, Hkv), over what a gate of gamma's shape serves."""
    if packed:
        return d_gate.sum(1) if gamma.dim() == 1 else d_gate
    d_gate = d_gate[:, : gamma.shape[-1]].transpose(1, 2)
    return d_gate if gamma.dim() == 3 else d_gate.sum(1) if gamma.dim() == 2 else d_gate.sum((0, 1))


def gradient_of_gamma_k(d_log_gate: torch.Tensor, gamma_k: torch.Tensor, packed: bool) -> torch.Tensor:
    """From that of log gamma_k; 0 where no weight reaches: gamma_k is 0 there, or hidden and then perhaps NaN."""
    d_gamma_k = sum_of_gate(d_log_gate, gamma_k, packed)
    return torch.where(d_gamma_k == 0, 0.0, d_gamma_k / gamma_k.float())


def repeated(k, v, gamma_k, gamma_v, group):
    if per_query_head(gamma_k, k.shape[1]) or per_query_head(gamma_v, k.shape[1]):
        kv = k.shape[1]
        gamma_k, gamma_v = (x.repeat_interleave(group, 1) if x is not None and x.dim() == 3 and not per_query_head(x, kv) else x for x in (gamma_k, gamma_v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return k, v, gamma_k, gamma_v


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    masks,
    target: str,
    *,
    log_gate: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of validated inputs. Rows of q, k, v and out must be contiguous and less than 2**23 elements apart.

    Args:
        q, out, d_out: (B, Hq, Nq, D), or packed (Tq, Hq, D); d_out may have any strides.
        k, v: (B, Hkv, Nk, D), or packed (Tk, Hkv, D).
        gamma_k, gamma_v: (N,), (B, N) or (B, Hkv, N) with N <= Nk, or packed (Tk,) or (Tk, Hkv).
        key_padding_mask: (B, Nk) bool, not with packed sequences.
        lse, d_lse: (B, Hq, Nq), or packed (Tq, Hq), in fp32: the natural logarithm of the forward, without gamma_q.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: offsets (B + 1,) int32 and longest lengths of packed
            sequences.

    Returns:
        dq, dk, dv in the dtypes and shapes of q, k, v, and in fp32 d_gamma_k and d_gamma_v of the gates' shapes, None
        where there is no gate. What no weight reaches is 0: hidden keys, rows without a visible key, gamma_k = 0.
    """
    packed = cu_seqlens_q is not None
    group = q.shape[1] // k.shape[1]
    heads_of = [x.T[None] if packed and x is not None and x.dim() == 2 else x for x in (gamma_k, gamma_v)]
    if any(per_query_head(x, k.shape[1]) for x in heads_of):
        wide = [x.transpose(0, 1)[None] if packed else x for x in (k, v)]
        wide = repeated(*wide, *heads_of, group)
        wide_k, wide_v = (x[0].transpose(0, 1) if packed else x for x in wide[:2])
        wide_g = (x[0].T if packed and x is not None and x.dim() == 3 else x for x in wide[2:])
        d_q, d_k, d_v, d_gk, d_gv = backward(
            q, wide_k.contiguous(), wide_v.contiguous(), *wide_g, key_padding_mask, out, lse, d_out, d_lse, masks, target, log_gate=log_gate,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        d_k, d_v = (x.unflatten(1, (-1, group)).sum(2) for x in (d_k, d_v))
        axis = 1
        def of(d, g):
            if g is None or d.shape == g.shape: return d
            return d.unflatten(axis, (-1, group)).sum(axis + 1)
        return d_q, d_k, d_v, of(d_gk, gamma_k), of(d_gv, gamma_v)
    scale, causal, window, softcap = masks
    gate_key, log_key_gate = gamma_k, log_gate
    # packed sequences are one batch entry, which each of them sees
    batch = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)[None].expand(batch, *(-1,) * x.dim()) if packed else x

    def tokens_first(x: torch.Tensor) -> torch.Tensor:
        return x if packed else x.transpose(1, 2)

    def gate_of_keys(gate: torch.Tensor, neutral: float) -> torch.Tensor:
        gate = gate.T[None] if packed and gate.dim() == 2 else pad_gate(gate, keys, neutral)
        return expand_gate(gate.contiguous(), batch, kv_heads)

    # the gradients are (tokens, heads, ...) in memory; tokens of no packed sequence have 0
    made = torch.zeros if packed else torch.empty
    d_q, d_k, d_v = (made(tokens_first(x).shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        d_gamma_k, d_gamma_v = (None if x is None else torch.zeros_like(x).float() for x in (gamma_k, gamma_v))
        return *(tokens_first(x.zero_()) for x in (d_q, d_k, d_v)), d_gamma_k, d_gamma_v  # pyright: ignore[reportReturnType]
    d_log_gate, d_value_gate = (
        None if x is None else made(d_k.shape[:-1], device=k.device) for x in (gamma_k, gamma_v)
    )
    if out.stride() != d_out.stride():
        out, d_out = out.contiguous(), d_out.contiguous()
    # (B, Hq, Nq), or packed (Hq, Tq), in memory
    lse = (lse.T if packed else lse).contiguous()
    d_lse = None if d_lse is None else (d_lse.T if packed else d_lse).contiguous()
    delta = torch.empty_like(lse)
    q, k, v, out, d_out = (heads_first(x) for x in (q, k, v, out, d_out))
    query_heads, queries, head_dim = q.shape[1:]
    kv_heads, keys = k.shape[1:3]
    log_gate = None if gamma_k is None else gate_of_keys(
        gamma_k.float() * math.log2(math.e) if log_key_gate else gamma_k.float().log2(), 0.0)
    value_gate = None if gamma_v is None else gate_of_keys(gamma_v.float(), 1.0)
    if key_padding_mask is not None:
        # a hidden key's weight is 0, and what it holds is cleared, since 0 * NaN is NaN
        hidden = ~key_padding_mask[:, None]
        k, v = k.masked_fill(hidden[..., None], 0), v.masked_fill(hidden[..., None], 0)
        log_gate = torch.zeros_like(hidden, dtype=torch.float32) if log_gate is None else log_gate
        log_gate = log_gate.masked_fill(hidden, float("-inf")).expand(batch, kv_heads, keys)
        value_gate = None if value_gate is None else value_gate.masked_fill(hidden, 1)
    shared: dict[str, Any] = named_strides(q=q, k=k, v=v, o=out, gk=log_gate, gv=value_gate) | {
        "q": q,
        "k": k,
        "v": v,
        "log_gate": log_gate,
        "value_gate": value_gate,
        "d_out": d_out,
        "lse": lse,
        "delta": delta,
        "cu_q": cu_seqlens_q,
        "cu_k": cu_seqlens_k,
        "scale_log2": scale * math.log2(math.e),
        "cap_log2": 0.0 if softcap is None else softcap * math.log2(math.e),
        "Nq": queries,
        "Nk": keys,
        "group": query_heads // kv_heads,
        "window": 0 if window is None else min(window, keys),
        "stride_lb": 0 if packed else query_heads * queries,
        "stride_lh": queries,
        "D": head_dim,
        "BD": triton.next_power_of_2(head_dim),
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "SOFTCAP": softcap is not None,
        "enable_fp_fusion": True,
    }
    tiles = backward_tiles(target, head_dim, q.element_size())
    longest_q = queries if max_seqlen_q is None else max(max_seqlen_q, 1)
    longest_k = keys if max_seqlen_k is None else max(max_seqlen_k, 1)
    # this one writes delta, which the next one reads
    d_queries_kernel[(triton.cdiv(longest_q, tiles[0].queries), query_heads, batch)](
        **shared, **tile_options(tiles[0]), out=out, d_lse=d_lse, d_q=d_q
    )
    d_keys_kernel[(triton.cdiv(longest_k, tiles[1].keys), kv_heads, batch)](
        **shared,
        **tile_options(tiles[1]),
        d_k=d_k,
        d_v=d_v,
        d_log_gate=d_log_gate,
        d_value_gate=d_value_gate,
    )
    d_gamma_k = d_gamma_v = None
    if gamma_k is not None and d_log_gate is not None:
        d_gamma_k = (sum_of_gate if log_key_gate else gradient_of_gamma_k)(d_log_gate, gamma_k, packed)
    if gamma_v is not None and d_value_gate is not None:
        d_gamma_v = sum_of_gate(d_value_gate, gamma_v, packed)
    return tokens_first(d_q), tokens_first(d_k), tokens_first(d_v), d_gamma_k, d_gamma_v
