"""One fused pass before prefill: the gate vector in the form that the tile takes, and V' = gV V or gK gV V."""

import torch
import triton
import triton.language as tl

from .gates import expand_gate
from .steps import fp16_shift

# what the tile takes: nothing, a term of the logit, a factor of the row sum, or both
NO_GATE, LOG_BIAS, POST_EXP, SPLIT = 0, 1, 2, 3
KEYS = 64
# what grows with the sequence: no new kernel for each divisibility of it
LENGTHS = ["Nk", "Nk_gk", "Nk_gv", "stride_gkb", "stride_gkh", "stride_gvb", "stride_gvh", "stride_mb"]


@triton.jit(do_not_specialize=LENGTHS)
def prescale_kernel(
    v,
    gamma_k,
    gamma_v,
    seen,
    out_v,
    gate,
    rest,
    Nk,
    Nk_gk,
    Nk_gv,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gkb,
    stride_gkh,
    stride_gkn,
    stride_gvb,
    stride_gvh,
    stride_gvn,
    stride_mb,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gb,
    stride_gh,
    gate_heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    FORM: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    i_kv = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < Nk
    m_seen = m_n
    if seen is not None:
        m_seen = m_n & (tl.load(seen + i_b * stride_mb + o_n, mask=m_n, other=0) != 0)
    o_row = o_n.to(tl.int64)
    # [BN]
    b_weight = tl.full([BN], 1.0, tl.float32)
    if gamma_v is not None:
        p_gate = gamma_v + i_b * stride_gvb + i_kv * stride_gvh + o_row * stride_gvn
        b_weight = tl.load(p_gate, mask=m_seen & (o_n < Nk_gv), other=1.0).to(tl.float32)
    if out_v is not None:
        o_d = tl.arange(0, BD)[None, :]
        m_v = m_seen[:, None] & (o_d < D)
        # [BN, BD]; hidden rows are cleared, since 0 * NaN is NaN
        p_v = v + i_b * stride_vb + i_kv * stride_vh + o_row[:, None] * stride_vn
        b_v = tl.load(p_v + o_d, m_v, other=0).to(tl.float32)
    if FORM != 0:
        b_gate = tl.full([BN], 1.0, tl.float32)
        if gamma_k is not None:
            p_gate = gamma_k + i_b * stride_gkb + i_kv * stride_gkh + o_row * stride_gkn
            b_gate = tl.load(p_gate, mask=m_seen & (o_n < Nk_gk), other=1.0).to(tl.float32)
        if FORM == 2:
            b_weight *= b_gate
        else:
            b_gate = tl.log2(b_gate)
        o_gate = i_b * stride_gb + i_kv * stride_gh + o_n
        if FORM == 3:
            b_shift = fp16_shift(tl.log2(b_weight) + tl.log2(tl.max(tl.abs(b_v), 1)))
            b_gate += b_shift
            b_rest = tl.exp2(-b_shift)
            b_weight *= b_rest
            tl.store(rest + o_gate, b_rest, mask=m_n)
        if seen is not None:
            b_gate = tl.where(m_seen, b_gate, float("-inf"))
        if i_kv < gate_heads:
            tl.store(gate + o_gate, b_gate, mask=m_n)
    if out_v is not None:
        p_out = out_v + i_b * stride_ob + i_kv * stride_oh + o_row[:, None] * stride_on
        tl.store(p_out + o_d, (b_v * b_weight[:, None]).to(v.dtype.element_ty), mask=m_n[:, None] & (o_d < D))


def prescale(
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    post_exp: bool,
    room: int = 0,
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
        num_warps=4,
        enable_fp_fusion=True,
    )
    return form, v if gated is None else gated, gate, rest
