"""The gradients of attention by their dense formula (backward_kernel.py), for a block of queries and keys at a time.

Whole, it answers where the backward kernels are wrong; for a few rows of dQ and a few keys of dK, dV and the gates, in
fp64, it is what they are compared with.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .backward import gradient_of_gamma_k, sum_of_gate
from .dense_rows import ROUNDING, rounded, sum_roundings
from .gates import grouped_gate, log_of, pad_gate, per_query_head
from .sampled import Masks, seen_from

BLOCK = 2**22  # scores at a time


class Operands(NamedTuple):
    """What gradients are made of. Packed sequences are one batch entry; G is a KV head's group of query heads.

    q, d_out (B, Hkv, G, Nq, D); k, v (B, Hkv, Nk, D); gates (B, Hkv, G or 1, Nk), neutral where there is none; lse and
    delta (<dO, O> - dLse) (B, Hkv, G, Nq); present (B, Nk). `sequence_q` (Nq,) and `sequence_k` (Nk,) number the
    packed sequences, `position_q` and `position_k` are places within them.
    """

    q: torch.Tensor
    d_out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    sequence_q: torch.Tensor
    position_q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_gamma_k: torch.Tensor
    gamma_v: torch.Tensor
    present: torch.Tensor
    sequence_k: torch.Tensor
    position_k: torch.Tensor

    def queries(self, rows: torch.Tensor | slice) -> "Operands":
        """With some queries only."""
        return self._replace(
            q=self.q[:, :, :, rows],
            d_out=self.d_out[:, :, :, rows],
            lse=self.lse[..., rows],
            delta=self.delta[..., rows],
            sequence_q=self.sequence_q[rows],
            position_q=self.position_q[rows],
        )

    def keys(self, rows: torch.Tensor | slice) -> "Operands":
        """With some keys only."""
        return self._replace(
            k=self.k[:, :, rows],
            v=self.v[:, :, rows],
            log_gamma_k=self.log_gamma_k[..., rows],
            gamma_v=self.gamma_v[..., rows],
            present=self.present[:, rows],
            sequence_k=self.sequence_k[rows],
            position_k=self.position_k[rows],
        )

    def head(self, batch: int, kv_head: int) -> "Operands":
        """With one KV head of one batch entry."""
        b, h = slice(batch, batch + 1), slice(kv_head, kv_head + 1)
        names = ("q", "d_out", "lse", "delta", "k", "v", "log_gamma_k", "gamma_v")
        return self._replace(**{name: getattr(self, name)[b, h] for name in names}, present=self.present[b])

    def blocks(self) -> Iterator["Operands"]:
        """All queries, as many at a time as keep a block small."""
        step = max(1, BLOCK // (self.lse[..., 0].numel() * self.k.shape[2]))
        return (self.queries(slice(start, start + step)) for start in range(0, self.q.shape[3], step))


class Gradients(NamedTuple):
    """Gradients of a block's q (B, Hkv, G, M, D), k and v (B, Hkv, J, D), log gamma_k and gamma_v (B, Hkv, G, J)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_gamma_k: torch.Tensor
    gamma_v: torch.Tensor


def operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    log_gate: bool = False,
) -> Operands:
    """Of the arguments of `backward_op`, (B, H, N, D) or packed (T, H, D): views, except for delta and the gates."""
    if cu_seqlens_q is not None:
        q, k, v, out, d_out = (x.transpose(0, 1)[None] for x in (q, k, v, out, d_out))
        lse, d_lse = lse.T[None], d_lse.T[None]
        gamma_k, gamma_v = (x if x is None or x.dim() == 1 else x.T[None] for x in (gamma_k, gamma_v))
    batch, kv_heads, keys, _ = k.shape
    present = k.new_ones((batch, keys), dtype=torch.bool) if key_padding_mask is None else key_padding_mask

    def gate(given: torch.Tensor | None, neutral: float) -> torch.Tensor:
        given = k.new_empty(0) if given is None else given
        given = grouped_gate(pad_gate(given.double(), keys, neutral), batch, kv_heads)
        return given if key_padding_mask is None else given.masked_fill(~present[:, None, None], neutral)

    delta = torch.linalg.vecdot(out.double(), d_out.double()) - d_lse
    q, d_out, lse, delta = (x.unflatten(1, (kv_heads, -1)) for x in (q, d_out, lse, delta))
    (sequence_q, position_q), (sequence_k, position_k) = _places(q.shape[3], keys, cu_seqlens_q, cu_seqlens_k, q.device)
    of_q = q, d_out, lse, delta, sequence_q, position_q
    gates = gate(None if gamma_k is None else log_of(gamma_k.double(), log_gate), 0.0), gate(gamma_v, 1.0)
    return Operands(*of_q, k, v, *gates, present, sequence_k, position_k)


def _places(
    queries: int, keys: int, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Numbers of sequences and positions within them, of queries and of keys. A token of no sequence sees none."""
    o_q, o_k = (torch.arange(length, device=device) for length in (queries, keys))
    if cu_q is None or cu_k is None:
        return (torch.zeros_like(o_q), o_q + keys - queries), (torch.zeros_like(o_k), o_k)
    cu_q, cu_k = cu_q.long(), cu_k.long()
    of_q, of_k = (torch.searchsorted(cu, o, right=True) - 1 for cu, o in ((cu_q, o_q), (cu_k, o_k)))
    last = cu_q.numel() - 2
    shift = cu_k.diff() - cu_q.diff() - cu_q[:-1]
    position_q = o_q + shift[of_q.clamp(0, last)]
    return (of_q.masked_fill(of_q > last, -1), position_q), (of_k, o_k - cu_k[of_k.clamp(0, last)])


def _visible(x: Operands, masks: Masks) -> torch.Tensor:
    """(B, 1, 1, M, J) bool."""
    of_sequence = torch.ones_like(x.sequence_k, dtype=torch.bool)
    visible = seen_from(x.position_q, x.position_k, of_sequence, masks.causal, masks.window)
    visible = visible & (x.sequence_q[:, None] == x.sequence_k)
    return (visible & x.present[:, None])[:, None, None]


def _weights(x: Operands, masks: Masks) -> tuple[torch.Tensor, torch.Tensor | float]:
    """P and the slope of the softcap, (B, Hkv, G, M, J)."""
    logits, slope = torch.einsum("bhgmd,bhjd->bhgmj", x.q, x.k) * masks.scale, 1.0
    if masks.softcap is not None:
        bent = (logits / masks.softcap).tanh()
        logits, slope = masks.softcap * bent, 1 - bent * bent
    log_gate = x.log_gamma_k[..., None, :]
    weights = (logits + log_gate - x.lse[..., None]).exp()
    dead = (x.lse == float("-inf"))[..., None] | (log_gate == float("-inf"))
    return weights.masked_fill(~_visible(x, masks) | dead, 0), slope


def prepared(x: Operands, dtype: torch.dtype) -> Operands:
    """In `dtype`, what lies in hidden keys cleared."""
    hidden = ~x.present[:, None, :, None]
    names = ("q", "d_out", "lse", "delta", "log_gamma_k", "gamma_v")
    x = x._replace(k=x.k.to(dtype).masked_fill(hidden, 0), v=x.v.to(dtype).masked_fill(hidden, 0))
    return x._replace(**{name: getattr(x, name).to(dtype) for name in names})


def _scores(x: Operands, masks: Masks) -> tuple[torch.Tensor, ...]:
    """P, <dO, V>, and the gradients of the logits with their gate and of the products, (B, Hkv, G, M, J)."""
    weights, slope = _weights(x, masks)
    # what no weight reaches may hold anything
    unseen = weights == 0
    d_weights = torch.einsum("bhgmd,bhjd->bhgmj", x.d_out, x.v).masked_fill(unseen, 0)
    d_logits = weights * (x.gamma_v[..., None, :] * d_weights - x.delta[..., None])
    d_logits = d_logits.masked_fill(unseen, 0)
    return weights, d_weights, d_logits, d_logits * slope


def _rounded_where_held(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    low = rounded(x, dtype)
    return torch.where(low.isfinite(), low, x)


def block_gradients(x: Operands, masks: Masks, eager: torch.dtype | None = None) -> Gradients:
    """What the queries of a block owe to its keys, of `prepared` operands.

    `eager` rounds P and dS to a dtype before they are multiplied, as the eager form does.
    """
    weights, d_weights, d_logits, d_products = _scores(x, masks)
    if eager is not None:
        weights, d_products = (_rounded_where_held(y, eager) for y in (weights, d_products))
    return Gradients(
        torch.einsum("bhgmj,bhjd->bhgmd", d_products, x.k) * masks.scale,
        torch.einsum("bhgmj,bhgmd->bhjd", d_products, x.q) * masks.scale,
        torch.einsum("bhgmj,bhgmd->bhjd", weights * x.gamma_v[..., None, :], x.d_out),
        d_logits.sum(3),
        (weights * d_weights).sum(3),
    )


def block_squares(x: Operands, masks: Masks) -> Gradients:
    """The sums of `block_gradients` whose terms are rounded to the operands' dtype, of the squares of their terms."""
    squares = [y.square() for y in _scores(x, masks)]
    weights, d_weights, d_logits, d_products = squares
    return Gradients(
        torch.einsum("bhgmj,bhjd->bhgmd", d_products, x.k.square()) * masks.scale**2,
        torch.einsum("bhgmj,bhgmd->bhjd", d_products, x.q.square()) * masks.scale**2,
        torch.einsum("bhgmj,bhgmd->bhjd", weights * x.gamma_v.square()[..., None, :], x.d_out.square()),
        torch.zeros_like(d_logits[:, :, :, 0]),
        (weights * d_weights).sum(3),
    )


def block_roundings(x: Operands, masks: Masks) -> Gradients:
    """What rounding to fp32 within the computation moves `block_gradients` by."""
    weights, _ = _weights(x, masks)
    norms = torch.einsum("bhgm,bhj->bhgmj", x.q.norm(dim=-1), x.k.norm(dim=-1)) * masks.scale
    sizes = norms + x.log_gamma_k.nan_to_num(neginf=0).abs()[..., None, :] + x.lse.abs()[..., None]
    weights = weights * (ROUNDING * (sum_roundings(x.q.shape[3]) + sizes))
    d_weights = torch.einsum("bhgm,bhj->bhgmj", x.d_out.norm(dim=-1), x.v.norm(dim=-1))
    weights, d_weights = (y.masked_fill(weights.isnan() | (weights == 0), 0) for y in (weights, d_weights))
    d_logits = weights * (x.gamma_v[..., None, :] * d_weights + x.delta.abs()[..., None])
    d_logits = d_logits.masked_fill(weights == 0, 0)
    return Gradients(
        torch.einsum("bhgmj,bhjd->bhgmd", d_logits, x.k.abs()) * masks.scale,
        torch.einsum("bhgmj,bhgmd->bhjd", d_logits, x.q.abs()) * masks.scale,
        torch.einsum("bhgmj,bhgmd->bhjd", weights * x.gamma_v[..., None, :], x.d_out.abs()),
        d_logits.sum(3),
        (weights * d_weights).sum(3),
    )


def dense_backward(
    x: Operands,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    masks: Masks,
    packed: bool,
    log_gate: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """What `backward` returns, in its dtypes and layouts, computed in fp32."""
    d_q, totals = [], None
    for block in prepared(x, torch.float32).blocks():
        first, *rest = block_gradients(block, masks)
        d_q.append(first)
        totals = rest if totals is None else [total.add_(part) for total, part in zip(totals, rest, strict=True)]
    assert totals is not None
    # (tokens, heads, D) in memory, and packed in shape too
    grads = (y.to(x.q.dtype).transpose(1, 2).contiguous() for y in (torch.cat(d_q, 3).flatten(1, 2), *totals[:2]))
    grads = (y[0] if packed else y.transpose(1, 2) for y in grads)
    return *grads, *gate_gradients(totals[2], totals[3], gamma_k, gamma_v, packed, log_gate)


def gate_gradients(
    d_log_gate: torch.Tensor,
    d_value_gate: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    packed: bool,
    log_gate: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the gates in their own shapes, from those of each key of each query head (B, Hkv, G, N)."""

    def of_tokens(d_gate: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        # (B, N, H), or packed (T, H), of the gate's heads
        heads_first = gate.T[None] if packed and gate.dim() == 2 else gate
        d_gate = d_gate.flatten(1, 2) if per_query_head(heads_first, d_gate.shape[1]) else d_gate.sum(2)
        return d_gate[0].T if packed else d_gate.transpose(1, 2)

    of_keys = sum_of_gate if log_gate else gradient_of_gamma_k
    return (
        None if gamma_k is None else of_keys(of_tokens(d_log_gate, gamma_k), gamma_k, packed),
        None if gamma_v is None else sum_of_gate(of_tokens(d_value_gate, gamma_v), gamma_v, packed),
    )
