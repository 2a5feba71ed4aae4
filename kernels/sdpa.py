"""Gated attention by torch's scaled_dot_product_attention, on any device and differentiable, never an Nq x Nk tensor.

log gamma_K rides in extra columns of the head dim, q' = [q | c] and k' = [k | log(gamma_K) / (scale c)]: exact for any
positive gate, where an additive mask in bf16 would round it. Half-precision inputs split the column in three, whose sum
keeps 22 bits or more.

What the fused kernels cannot do whole (a mask other than the square causal one, a softcap, the lse) runs on a chunk of
query rows at a time. Autograd would keep the scores or the mask of every chunk, Nq x Nk in all; instead backward runs
each chunk again (torch.utils.checkpoint). Dense scores are fp32 products of a chunk of keys at a time: in 16 bits they
would be rounded, and the lse with them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .gates import grouped_gate, log_of, pad_gate
from .validation import transforms, values_are_free

CHUNK = 256
DENSE_KEYS = 4096
R = TypeVar("R")


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    positive_gate: bool,
    return_lse: bool,
    softcap: float | None = None,
    log_gate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of validated inputs: out (B, Hq, Nq, D) and, if asked for, lse (B, Hq, Nq) in fp32.

    `positive_gate` promises that no gamma_k is 0, which saves the masks that such keys need. With `log_gate` gamma_k
    holds log gamma_k.
    """
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = query_heads // kv_heads
    dtype, precise = q.dtype, torch.promote_types(q.dtype, torch.float32)
    dense = queries == 1 or softcap is not None or q.numel() == 0 or keys == 0
    if dtype == torch.float16 and not dense and (gamma_v is not None or log_gate or not 2**-14 < scale < 2**14):
        # fp16 holds neither gV V where it is large, nor the columns of any log gate or of an extreme scale
        q, k, v = q.float(), k.float(), v.float()

    # (B * Hkv, group, Nq, D) and (B * Hkv, 1, Nk, D): a KV head is a batch entry and its group the heads
    q = q.reshape(batch * kv_heads, group, queries, head_dim)
    k, v = (x.reshape(batch * kv_heads, 1, keys, head_dim) for x in (k, v))
    seen = None
    if key_padding_mask is not None and not _all_seen(key_padding_mask):
        seen = key_padding_mask.repeat_interleave(kv_heads, 0)[:, None]
        k, v = k.masked_fill(~seen[..., None], 0), v.masked_fill(~seen[..., None], 0)

    def gate_of_keys(gate: torch.Tensor, neutral: float) -> torch.Tensor:
        # (B * Hkv, 1, Nk), or (B * Hkv, group, Nk) of a gate per query head
        gate = grouped_gate(pad_gate(gate.to(precise), keys, neutral), batch, kv_heads).flatten(0, 1)
        return gate if seen is None else gate.masked_fill(~seen, neutral)

    gain = None if gamma_v is None else gate_of_keys(gamma_v, 1.0)
    bias = None
    if gamma_k is not None:
        hidden, neutral = (float("-inf"), 0.0) if log_gate else (0.0, 1.0)
        gate = gate_of_keys(gamma_k, neutral)
        if not positive_gate:
            seen = gate != hidden if seen is None else seen & (gate != hidden)
            gate = torch.where(gate == hidden, neutral, gate)
        bias = log_of(gate, log_gate)

    visible = Visibility(seen, queries, keys, causal, window, q.device)
    lse = None
    if dense:
        out, lse = dense_attention(q, k, v, gain, bias, visible, scale, softcap)
    else:
        out = fused_rows(q, k, v if gain is None else (v * gain[..., None]).to(v.dtype), bias, visible, scale)
        lse = row_lse(q, k, bias, visible, scale) if return_lse else None
    out = out.reshape(batch, query_heads, queries, head_dim).to(dtype)
    return out, lse.reshape(batch, query_heads, queries).float() if return_lse and lse is not None else None


def _all_seen(key_padding_mask: torch.Tensor) -> bool:
    """Whether the mask hides nothing, looked up only where that waits for no device and breaks no graph."""
    return values_are_free(key_padding_mask) and bool(key_padding_mask.all())


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see. `seen` is (B * Hkv, 1 or group, Nk) bool, or None where every key may be seen."""

    seen: torch.Tensor | None
    queries: int
    keys: int
    causal: bool
    window: int | None
    device: torch.device

    def key_range(self, start: int, end: int) -> tuple[int, int]:
        """First and last (exclusive) key that some query of start..end may see."""
        offset = self.keys - self.queries
        first = 0 if self.window is None else max(0, start + offset - self.window + 1)
        return first, max(first, min(self.keys, end + offset)) if self.causal else self.keys

    def mask(self, start: int, end: int) -> torch.Tensor | None:
        """Bool mask (B * Hkv or 1, 1 or group, end - start or 1, keys of the range); None where all are visible."""
        first, last = self.key_range(start, end)
        mask = None if self.seen is None else self.seen[:, :, None, first:last]
        if self.causal and end - start > 1:  # one row sees its whole range
            position = torch.arange(start, end, device=self.device)[:, None] + self.keys - self.queries
            key = torch.arange(first, last, device=self.device)
            near = key <= position
            if self.window is not None:
                near = near & (key > position - self.window)
            mask = near[None, None] if mask is None else mask & near
        return mask


def fused_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, visible: Visibility, scale: float
) -> torch.Tensor:
    """Attention by the fused kernels: one call where no mask is needed, else a chunk of query rows at a time."""
    head_dim = q.shape[-1]
    if bias is not None:
        q, k, v = with_bias_columns(q, k, v, bias, scale)
    group = q.shape[1]
    k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
    if visible.seen is None and visible.window is None and (not visible.causal or visible.queries == visible.keys):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=visible.causal)[..., :head_dim]
    chunks = [
        recomputed(masked_rows, q, k, v, visible, scale, start, min(start + CHUNK, visible.queries))
        for start in range(0, visible.queries, CHUNK)
    ]
    return torch.cat(chunks, dim=2)[..., :head_dim]


def recomputed(function: Callable[..., R], *args: object) -> R:
    """`function(*args)`, of which autograd keeps the arguments only: backward runs it again."""
    followed = any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
    if not (followed and torch.is_grad_enabled()) or transforms():  # torch.func takes no checkpoints
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def masked_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float, start: int, end: int
) -> torch.Tensor:
    """The fused kernels with a mask, for query rows start..end."""
    first, last = visible.key_range(start, end)
    rows = q[:, :, start:end]
    if first == last:
        return torch.zeros_like(rows)
    mask = visible.mask(start, end)
    dead = None
    if mask is not None:
        # a row without a visible key looks at every key, and is cleared afterwards
        dead = ~mask.any(-1, keepdim=True)
        mask = (mask | dead).expand(-1, -1, end - start, -1)
    out = F.scaled_dot_product_attention(rows, k[:, :, first:last], v[:, :, first:last], attn_mask=mask, scale=scale)
    return out if dead is None else out.masked_fill(dead, 0)


def with_bias_columns(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengthen the head dim to a multiple of 8 so that scale * q'.k' = scale * q.k + bias; v gets zeros.

    A bias (B * Hkv, group, Nk) has columns for each head of the group, of which a head's q sees its own: k is not
    repeated.
    """
    parts = 1 if q.dtype == bias.dtype else 3
    heads = bias.shape[1]
    width = -(-(q.shape[-1] + heads * parts) // 8) * 8 - q.shape[-1]
    # a power of two, so that q's column is exact and k's column keeps the size of the bias
    factor = 2.0 ** min(15, max(-14, round(-math.log2(scale))))
    rest = bias / (scale * factor)
    columns = []
    for _ in range(parts):
        columns.append(rest.to(q.dtype))
        rest = rest - columns[-1]
    # (B * Hkv, heads, Nk, parts) -> (B * Hkv, 1, Nk, heads * parts)
    of_keys = torch.stack(columns, -1).transpose(1, 2).flatten(2)[:, None]
    k = F.pad(torch.cat([k, of_keys], dim=-1), (0, width - heads * parts))
    own = torch.eye(heads, dtype=q.dtype, device=q.device).repeat_interleave(parts, 1) * factor
    q = torch.cat([q, F.pad(own, (0, width - heads * parts))[:, None].expand(*q.shape[:3], -1)], dim=-1)
    return q, k, F.pad(v, (0, width))


def scores_of_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    visible: Visibility,
    scale: float,
    softcap: float | None,
    start: int,
    end: int,
) -> torch.Tensor:
    """Masked scores (B * Hkv, group, end - start, keys of the range) in fp32 (fp64 for fp64 inputs)."""
    first, last = visible.key_range(start, end)
    precise = torch.promote_types(q.dtype, torch.float32)
    # the group's heads are rows of one product, which does not repeat k
    rows = q[:, :, start:end].flatten(1, 2).to(precise)
    parts = [rows @ part.to(precise).transpose(-1, -2) for part in k[:, 0, first:last].split(DENSE_KEYS, 1)]
    product = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    scores = product.unflatten(1, (q.shape[1], end - start)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias[:, :, None, first:last]
    mask = visible.mask(start, end)
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def lse_of_rows(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, visible: Visibility, scale: float, start: int, end: int
) -> torch.Tensor:
    """The lse (B * Hkv, group, end - start) of query rows start..end."""
    return torch.logsumexp(scores_of_rows(q, k, bias, visible, scale, None, start, end), -1)


def row_lse(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, visible: Visibility, scale: float
) -> torch.Tensor:
    """The lse (B * Hkv, group, Nq) from dense scores of a few rows at a time."""
    chunks = [recomputed(lse_of_rows, q, k, bias, visible, scale, *rows) for rows in dense_chunks(q)]
    return torch.cat(chunks, dim=2)


def dense_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    visible: Visibility,
    scale: float,
    softcap: float | None,
    start: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of query rows start..end from their dense scores, without a whole copy of k or v."""
    scores = scores_of_rows(q, k, bias, visible, scale, softcap, start, end)
    lse = torch.logsumexp(scores, -1)
    first, last = visible.key_range(start, end)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
    if gain is not None:
        weights = weights * gain[:, :, None, first:last]
    weights = weights.flatten(1, 2).split(DENSE_KEYS, 2)
    values = v[:, 0, first:last].split(DENSE_KEYS, 1)
    out = reduce(torch.add, (part @ of_part.to(part.dtype) for part, of_part in zip(weights, values, strict=True)))
    return out.unflatten(1, (q.shape[1], end - start)), lse


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    visible: Visibility,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What no fused kernel of torch does well (one query) or at all (a softcap), a few rows at a time."""
    chunks = [recomputed(dense_rows, q, k, v, gain, bias, visible, scale, softcap, *rows) for rows in dense_chunks(q)]
    out, lse = zip(*chunks, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


def dense_chunks(q: torch.Tensor) -> list[tuple[int, int]]:
    """Bounds of the query rows (B * Hkv, group, Nq, D) whose dense scores are taken at once: CHUNK rows of a group."""
    step = max(1, CHUNK // q.shape[1])
    return [(start, min(start + step, q.shape[2])) for start in range(0, max(q.shape[2], 1), step)]
