"""The launch of backward: gates, layouts and the memory of the gradients for the two kernels."""

from typing import Any

import torch
import triton

from .backward_kernel import KeyGates, KeyGradients, RowSums, d_keys_kernel, d_queries_kernel
from .gates import pad_gate
from .operands import LOG2E, Masks, Offsets, logits_of, rows_of
from .tiles import Tile, backward_tiles

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def key_gates(log_gate: torch.Tensor | None, value_gate: torch.Tensor | None) -> KeyGates:
    """Of log2 gK and gV (B or 1, Hkv or 1, Nk) fp32, contiguous."""
    steps = (
        (0, 0) if x is None else (x.shape[1] * (x.shape[0] > 1), int(x.shape[1] > 1)) for x in (log_gate, value_gate)
    )
    return KeyGates(log_gate, value_gate, *(step for of_gate in steps for step in of_gate))


def shared_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    gates: KeyGates,
    sums: RowSums,
    masks: Masks,
    tile: Tile,
    offsets: Offsets | None,
) -> dict[str, Any]:
    """What both kernels take. q, d_out (B, Hq, Nq, D), k, v (B, Hkv, Nk, D); packed sequences as one batch entry."""
    keys = k.shape[2]
    return {
        "q": rows_of(q),
        "k": rows_of(k),
        "v": rows_of(v),
        "d_out": rows_of(d_out),
        "gates": gates,
        "sums": sums,
        "offsets": offsets,
        "logits": logits_of(masks),
        "group": q.shape[1] // k.shape[1],
        "Nq": q.shape[2],
        "Nk": keys,
        "window": None if masks.window is None else min(masks.window, keys),
        "D": q.shape[3],
        "TILE": tile,
        "CAUSAL": masks.causal,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def d_queries_arguments(out: torch.Tensor, d_q: torch.Tensor, **shared: Any) -> dict[str, Any]:
    """What `d_queries_kernel` is launched with, and compiled ahead of time with; `shared`: of `shared_arguments`.

    out (B, Hq, Nq, D); d_q is (B, Nq, Hq, D) in memory.
    """
    return shared_arguments(**shared) | {"out": rows_of(out), "d_q": d_q}


def d_keys_arguments(grads: KeyGradients, **shared: Any) -> dict[str, Any]:
    """What `d_keys_kernel` is launched with, and compiled ahead of time with; `shared`: of `shared_arguments`."""
    return shared_arguments(**shared) | {"grads": grads}


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
    masks: Masks,
    target: str,
    *,
    log_gate: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Gradients:
    """Gradients of validated inputs. Rows of q, k, v and out must be contiguous and less than 2**23 elements apart.

    Args:
        q, out, d_out: (B, Hq, Nq, D), or packed (Tq, Hq, D); d_out may have any strides.
        k, v: (B, Hkv, Nk, D), or packed (Tk, Hkv, D). For gates of query heads they are repeated for each of them.
        gamma_k, gamma_v: (N,), (B, N), (B, Hkv, N) or (B, Hq, N) with N <= Nk, or packed (Tk,), (Tk, Hkv) or (Tk, Hq).
        key_padding_mask: (B, Nk) bool, not with packed sequences.
        lse, d_lse: (B, Hq, Nq), or packed (Tq, Hq), in fp32: the natural logarithm of the forward, without gamma_q.
        log_gate: gamma_k holds natural logarithms, of which d_gamma_k is the gradient.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: offsets (B + 1,) int32 and longest lengths of packed
            sequences.

    Returns:
        dq, dk, dv in the dtypes and shapes of q, k, v, and in fp32 d_gamma_k and d_gamma_v of the gates' shapes, None
        where there is no gate. What no weight reaches is 0: hidden keys, rows without a visible key, gamma_k = 0.
    """
    packed = cu_seqlens_q is not None
    group, many = q.shape[1] // k.shape[1], 2 if packed else 3
    of_heads = [gate is not None and gate.dim() == many and gate.shape[1] == q.shape[1] for gate in (gamma_k, gamma_v)]
    if group > 1 and any(of_heads):

        def repeated(x: torch.Tensor | None) -> Any:
            return x if x is None or x.dim() < many or x.shape[1] == q.shape[1] else x.repeat_interleave(group, 1)

        def summed(grad: torch.Tensor | None, like: torch.Tensor | None) -> Any:
            same = grad is None or like is None or grad.shape == like.shape
            return grad if same else grad.unflatten(1, (-1, group)).sum(2)

        given = k, v, gamma_k, gamma_v
        d_q, *grads = backward(
            q, *map(repeated, given), key_padding_mask, out, lse, d_out, d_lse, masks, target, log_gate=log_gate,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip
        d_k, d_v, d_gamma_k, d_gamma_v = map(summed, grads, given)
        return d_q, d_k, d_v, d_gamma_k, d_gamma_v

    # packed sequences are one batch entry
    sequences = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]
    offsets = None if cu_seqlens_q is None or cu_seqlens_k is None else Offsets(cu_seqlens_q, cu_seqlens_k)

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)[None] if packed else x

    def tokens_first(x: torch.Tensor) -> torch.Tensor:
        return x if packed else x.transpose(1, 2)

    def gate_of_keys(gate: torch.Tensor, neutral: float) -> torch.Tensor:
        gate = gate.T[None] if packed and gate.dim() == 2 else gate[:, None] if gate.dim() == 2 else gate
        gate = gate[None, None] if gate.dim() == 1 else gate
        return (gate if gate.shape[-1] == keys else pad_gate(gate, keys, neutral)).contiguous()

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
    q, k, v, out, d_out = (heads_first(x) for x in (q, k, v, out, d_out))
    query_heads, queries, head_dim = q.shape[1:]
    kv_heads, keys = k.shape[1:3]
    log2_gate = None
    if gamma_k is not None:
        log2_gate = gate_of_keys(gamma_k.float() * LOG2E if log_gate else gamma_k.float().log2(), 0.0)
    value_gate = None if gamma_v is None else gate_of_keys(gamma_v.float(), 1.0)
    if key_padding_mask is not None:
        # a hidden key's weight is 0, and what it holds is cleared, since 0 * NaN is NaN
        hidden = ~key_padding_mask[:, None]
        k, v = k.masked_fill(hidden[..., None], 0), v.masked_fill(hidden[..., None], 0)
        log2_gate = torch.zeros_like(hidden, dtype=torch.float32) if log2_gate is None else log2_gate
        log2_gate = log2_gate.masked_fill(hidden, float("-inf")).contiguous()
        value_gate = None if value_gate is None else value_gate.masked_fill(hidden, 1).contiguous()
    shared: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "d_out": d_out,
        "gates": key_gates(log2_gate, value_gate),
        "sums": RowSums(lse, d_lse, torch.empty_like(lse)),
        "masks": masks,
        "offsets": offsets,
    }
    of_queries_tile, of_keys_tile = backward_tiles(target, head_dim, q.element_size())
    longest_q = queries if max_seqlen_q is None else max(max_seqlen_q, 1)
    longest_k = keys if max_seqlen_k is None else max(max_seqlen_k, 1)
    # this one writes delta, which the next one reads
    d_queries_kernel[(triton.cdiv(longest_q, of_queries_tile.queries), query_heads, sequences)](
        **d_queries_arguments(out, d_q, **shared, tile=of_queries_tile)
    )
    d_keys_kernel[(triton.cdiv(longest_k, of_keys_tile.keys), kv_heads, sequences)](
        **d_keys_arguments(KeyGradients(d_k, d_v, d_log_gate, d_value_gate), **shared, tile=of_keys_tile)
    )
    d_gamma_k = d_gamma_v = None
    if gamma_k is not None and d_log_gate is not None:
        of_gate = sum_of_gate if log_gate else gradient_of_gamma_k
        d_gamma_k = of_gate(d_log_gate, gamma_k, packed)
    if gamma_v is not None and d_value_gate is not None:
        d_gamma_v = sum_of_gate(d_value_gate, gamma_v, packed)
    return tokens_first(d_q), tokens_first(d_k), tokens_first(d_v), d_gamma_k, d_gamma_v
