"""The forms of the gate in prefill, and the launch of the pass that makes them."""

import torch
import triton

from .gates import expand_gate
from .prescale_kernel import prescale_kernel

# what the tile takes: nothing, a term of the logit, a factor of the row sum, or both
NO_GATE, LOG_BIAS, POST_EXP, SPLIT = 0, 1, 2, 3
KEYS = 64


def prescale(
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    post_exp: bool,
    room: int = 0,
    *,
    log_gate=False,
) -> tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gate form, V' (v itself where nothing changes it), the gate (B, Hkv or 1, at least Nk + room) in fp32, rest.

    v is (B, Hkv, Nk, D) with contiguous rows. The gate is gamma_k in the post-exp form, and log2 gamma_k in the
    log-bias form with -inf where the mask hides a key; its last columns, at least `room`, are never written.

    fp16 cannot hold gV V where it is large. There V' = 2**-s gV V with the least s >= 0 of a key that suits, the gate
    is log2 gamma_k + s, and `rest`, of the gate's shape and strides, is 2**-s, by which the key counts in the row sum.
    """
    batch, kv_heads, keys, head_dim = v.shape
    form = NO_GATE
    if v.dtype == torch.float16 and gamma_v is not None:
        form = SPLIT
    elif gamma_k is not None or key_padding_mask is not None:
        # a padded key's gate is 0, and fp16 cannot hold gK*V: both take the form that suits any gate
        suits = post_exp and key_padding_mask is None and v.dtype != torch.float16
        form = POST_EXP if suits else LOG_BIAS
    changed = gamma_v is not None or key_padding_mask is not None or form == POST_EXP
    if form == NO_GATE and not changed:
        return form, v, None, None
    gate_heads = kv_heads if form == SPLIT or (gamma_k is not None and gamma_k.dim() == 3) else 1
    gate = v.new_empty((batch, gate_heads, (keys + room + 15) // 16 * 16), dtype=torch.float32) if form else None
    rest = torch.empty_like(gate) if gate is not None and form == SPLIT else None
    gated = torch.empty_like(v, memory_format=torch.contiguous_format) if changed else None
    gamma_k = None if gamma_k is None else expand_gate(gamma_k, batch, kv_heads)
    gamma_v = None if gamma_v is None else expand_gate(gamma_v, batch, kv_heads)
    prescale_kernel[(triton.cdiv(keys, KEYS), kv_heads if changed else gate_heads, batch)](
        v,
        gamma_k,
        gamma_v,
        None if key_padding_mask is None else key_padding_mask.view(torch.uint8),
        gated,
        gate,
        rest,
        keys,
        0 if gamma_k is None else gamma_k.shape[-1],
        0 if gamma_v is None else gamma_v.shape[-1],
        *v.stride()[:3],
        *((0, 0, 0) if gamma_k is None else gamma_k.stride()),
        *((0, 0, 0) if gamma_v is None else gamma_v.stride()),
        0 if key_padding_mask is None else key_padding_mask.stride(0),
        *((0, 0, 0) if gated is None else gated.stride()[:3]),
        *((0, 0) if gate is None else gate.stride()[:2]),
        gate_heads,
        D=head_dim,
        BD=triton.next_power_of_2(head_dim),
        BN=KEYS,
        FORM=form,
        LOG=log_gate,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return form, v if gated is None else gated, gate, rest
