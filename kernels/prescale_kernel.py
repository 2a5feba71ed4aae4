"""One fused pass before prefill: the gate vector in the form that the tile takes, and V' = gV V or gK gV V."""

import triton
import triton.language as tl

from .steps import fp16_shift

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
    LOG: tl.constexpr,
):
    """One program: BN keys of one KV head of one batch entry.

    Reads v (B, Hkv, Nk, D), gamma_k (B, Hkv, Nk_gk) and gamma_v (B, Hkv, Nk_gv) (strides of 0 where heads or batch
    entries share a gate; None: 1 everywhere), seen (B, Nk) uint8 (None: all keys are). Writes out_v (B, Hkv, Nk, D) in
    v's dtype (None: v serves as it is), and for FORM (prescale.py) gate, and rest with SPLIT, of (B, gate_heads, >= Nk)
    fp32. BD is D rounded up to a power of two.
    """
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
            b_gate = tl.load(p_gate, mask=m_seen & (o_n < Nk_gk), other=0.0 if LOG else 1.0).to(tl.float32)
        if FORM == 2:
            if LOG and gamma_k is not None:
                b_gate = tl.exp(b_gate)
            b_weight *= b_gate
        elif LOG and gamma_k is not None:
            b_gate = b_gate * 1.4426950408889634
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
