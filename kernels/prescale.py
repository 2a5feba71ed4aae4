"""The forms of the gate in prefill, and the launch of the pass that makes them."""

from typing import Any

import torch
import triton

from .gates import expand_gate
from .operands import Rows, rows_of
from .prescale_kernel import RawGate, Shares, odd, prescale_kernel

# what the tile takes: nothing, a term of the logit, a factor of the row sum, or both
NO_GATE, LOG_BIAS, POST_EXP, SPLIT = 0, 1, 2, 3
KEYS = 64


def heads_of(gate: torch.Tensor | None) -> int:
    """Heads of a gate (N,), (B, N) or (B, H, N)."""
    return gate.shape[1] if gate is not None and gate.dim() == 3 else 1


def prescale_arguments(
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    gated: torch.Tensor | None,
    gate: torch.Tensor | None,
    rest: torch.Tensor | None,
    form: int,
    *,
    heads: int,
    log_gate: bool = False,
) -> dict[str, Any]:
    """What `prescale_kernel` is launched with for `heads` heads, and compiled ahead of time with."""
    batch, _, keys, head_dim = v.shape

    def raw(gamma: torch.Tensor | None) -> RawGate | None:
        if gamma is None:
            return None
        own = heads_of(gamma)
        strides = expand_gate(gamma, batch, own).stride()
        return RawGate(gamma, *map(odd, (*strides, gamma.shape[-1])), heads // own)

    return {
        "v": rows_of(v),
        "gamma_k": raw(gamma_k),
        "gamma_v": raw(gamma_v),
        "seen": None if key_padding_mask is None else key_padding_mask.view(torch.uint8),
        "gated": None if gated is None else rows_of(gated),
        "gate": None if gate is None else Rows(gate, *gate.stride()),
        "rest": rest,
        # where no V' is made, the gate's heads may be fewer than those of v
        "shares": Shares(*(max(heads // (1 if x is None else x.shape[1]), 1) for x in (v, gated, gate))),
        "Nk": keys,
        "stride_mb": 0 if key_padding_mask is None else key_padding_mask.stride(0),
        "D": head_dim,
        "BN": KEYS,
        "FORM": form,
        "LOG": log_gate,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def prescale(
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    post_exp: bool,
    room: int = 0,
    *,
    log_gate: bool = False,
) -> tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gate form, V' (v itself where nothing changes it), the gate (B, heads, at least Nk + room) in fp32, rest.

    v is (B, Hkv, Nk, D) with contiguous rows. Gates are (N,), (B, N), (B, Hkv, N) or (B, Hq, N) with N <= Nk, of any
    strides; with `log_gate`, gamma_k holds natural logarithms. The gate is gamma_k in the post-exp form, and log2
    gamma_k in the log-bias form with -inf where the mask hides a key; its last columns, at least `room`, are never
    written.

    gamma_v of query heads makes V' one of query heads, Hq / Hkv times as large as v. gamma_k of query heads does not:
    it takes the log-bias form, unless V' is of query heads anyhow.

    fp16 cannot hold gV V where it is large. There V' = 2**-s gV V with the least s >= 0 of a key that suits, the gate
    is log2 gamma_k + s, and `rest`, of the gate's shape and strides, is 2**-s, by which the key counts in the row sum.
    """
    batch, kv_heads, keys, _ = v.shape
    value_heads = max(kv_heads, heads_of(gamma_v))
    form = NO_GATE
    if v.dtype == torch.float16 and gamma_v is not None:
        form = SPLIT
    elif gamma_k is not None or key_padding_mask is not None:
        # a padded key's gate is 0, and fp16 cannot hold gK*V: both take the form that suits any gate
        suits = post_exp and key_padding_mask is None and v.dtype != torch.float16 and heads_of(gamma_k) <= value_heads
        form = POST_EXP if suits else LOG_BIAS
    changed = gamma_v is not None or key_padding_mask is not None or form == POST_EXP
    if form == NO_GATE and not changed:
        return form, v, None, None
    gate_heads = max(heads_of(gamma_k), value_heads if form == SPLIT else 1)
    gate = v.new_empty((batch, gate_heads, (keys + room + 15) // 16 * 16), dtype=torch.float32) if form else None
    rest = torch.empty_like(gate) if gate is not None and form == SPLIT else None
    gated = v.new_empty((batch, value_heads, *v.shape[2:])) if changed else None
    heads = max(gate_heads, value_heads) if changed else gate_heads
    arguments = prescale_arguments(
        v, gamma_k, gamma_v, key_padding_mask, gated, gate, rest, form, heads=heads, log_gate=log_gate
    )
    prescale_kernel[(triton.cdiv(keys, KEYS), heads, batch)](**arguments)
    return form, v if gated is None else gated, gate, rest
