"""The dense specification of gated attention: what every other implementation is tested against."""

import torch

from .gates import expand_gate, grouped_gate, key_gate, log_of, pad_gate


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gamma_k: torch.Tensor | None = None,
    gamma_v: torch.Tensor | None = None,
    gamma_q: torch.Tensor | None = None,
    log_gamma_k: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(cap(scale Q K^T) + log gamma_K + mask) (gamma_V * V), dense, computed and returned in `dtype`.

    cap(s) = softcap * tanh(s / softcap), or s without a softcap. Shapes as in `anchored_attention`. Returns out
    (B, Hq, Nq, D) and lse (B, Hq, Nq), differentiable by autograd. A row without a visible key is 0 with lse = -inf; a
    key with gamma_K = 0, log gamma_K = -inf, is not visible.
    """
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = query_heads // kv_heads
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    position = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)
    visible = torch.ones((batch, query_heads, queries, keys), dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        visible = visible & (key > position - window)
    if key_padding_mask is not None:
        hidden = ~key_padding_mask[:, None, :, None]
        visible = visible & key_padding_mask[:, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)

    def gate_of_heads(gate: torch.Tensor, neutral: float) -> torch.Tensor:
        gate = grouped_gate(pad_gate(gate.to(dtype), keys, neutral), batch, kv_heads)
        gate = gate.expand(-1, -1, group, -1).flatten(1, 2)
        return gate if key_padding_mask is None else gate.masked_fill(~key_padding_mask[:, None], neutral)

    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    key_factors, log_gate = key_gate(gamma_k, log_gamma_k)
    if key_factors is not None:
        hidden, neutral = (float("-inf"), 0.0) if log_gate else (0.0, 1.0)
        gate = gate_of_heads(key_factors, neutral)[:, :, None]
        visible = visible & (gate != hidden)
        scores = scores + log_of(torch.where(gate == hidden, neutral, gate), log_gate)
    if gamma_v is not None:
        v = v * gate_of_heads(gamma_v, 1.0)[..., None]

    scores = scores.masked_fill(~visible, float("-inf"))
    dead = ~visible.any(-1)
    shift = scores.detach().amax(-1).masked_fill(dead, 0) if keys else scores.new_zeros(scores.shape[:-1])
    weights = (scores - shift[..., None]).exp()
    total = weights.sum(-1).masked_fill(dead, 1)
    lse = (shift + total.log()).masked_fill(dead, float("-inf"))
    if gamma_q is not None:
        lse = lse + expand_gate(gamma_q.to(dtype), batch, query_heads).log()
    return weights @ v / total[..., None], lse
