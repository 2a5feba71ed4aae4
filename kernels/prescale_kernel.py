"""One fused pass before prefill: the gate vector in the form that the tile takes, and V' = gV V or gK gV V."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .steps import LN2, fp16_shift


class RawGate(NamedTuple):
    """A gate (B, heads, N) of any strides and length; `group` heads of the pass share one of its own.

    Strides and length come as `odd` of them: Triton compiles anew for an int of a tuple that is 1 or a multiple of 16.
    """

    ptr: torch.Tensor
    b: int
    h: int
    n: int
    length: int
    group: int


class Shares(NamedTuple):
    """Heads of the pass that share a head of v, of V', of the gate."""

    v: int
    gated: int
    gate: int


def odd(x: int) -> int:
    """2 x + 1, of which a kernel takes x as `>> 1`."""
    return 2 * x + 1


@triton.jit
def load_raw_gate(gate, i_b, i_h, o_n, m_n, neutral: tl.constexpr):
    """[BN] fp32 of a `RawGate` at the keys o_n [BN] int64 where m_n [BN]; `neutral` elsewhere and beyond its length."""
    p_gate = gate.ptr + i_b * (gate.b >> 1) + i_h // gate.group * (gate.h >> 1) + o_n * (gate.n >> 1)
    return tl.load(p_gate, mask=m_n & (o_n < (gate.length >> 1)), other=neutral).to(tl.float32)


@triton.jit(do_not_specialize=["Nk", "stride_mb"])
def prescale_kernel(
    v,
    gamma_k,
    gamma_v,
    seen,
    gated,
    gate,
    rest,
    shares,
    Nk,
    stride_mb,
    D: tl.constexpr,
    BN: tl.constexpr,
    FORM: tl.constexpr,
    LOG: tl.constexpr,
):
    """One program: BN keys of one head of one batch entry; the heads are those of the gates, of v or of the queries.

    Reads v (`Rows` of (B, Hkv, Nk, D)), gamma_k and gamma_v (`RawGate`, None: 1 everywhere; LOG: gamma_k holds natural
    logarithms) and seen (B, Nk) uint8 (None: all keys are). Writes V' into gated (`Rows`, None: v serves as it is), and
    for FORM (prescale.py) gate (`Rows` of (B, heads, >= Nk) fp32), and rest, of its strides, with SPLIT. `shares`: which
    of their heads is whose.
    """
    BD: tl.constexpr = triton.next_power_of_2(D)
    i_b = tl.program_id(2).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    # [BN]
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < Nk
    m_seen = m_n
    if seen is not None:
        m_seen = m_n & (tl.load(seen + i_b * stride_mb + o_n, mask=m_n, other=0) != 0)
    b_weight = tl.full([BN], 1.0, tl.float32)
    if gamma_v is not None:
        b_weight = load_raw_gate(gamma_v, i_b, i_h, o_n, m_seen, 1.0)
    o_d = tl.arange(0, BD)[None, :]
    if gated is not None:
        # [BN, BD]; hidden rows are cleared, since 0 * NaN is NaN
        p_v = v.ptr + i_b * v.b + i_h // shares.v * v.h + o_n[:, None] * v.n + o_d
        b_v = tl.load(p_v, mask=m_seen[:, None] & (o_d < D), other=0.0).to(tl.float32)
    if FORM != 0:
        b_gate = tl.full([BN], 0.0 if LOG else 1.0, tl.float32)
        if gamma_k is not None:
            b_gate = load_raw_gate(gamma_k, i_b, i_h, o_n, m_seen, 0.0 if LOG else 1.0)
        if LOG:
            b_gate *= 1.0 / LN2
        if FORM == 2:
            b_gate = tl.exp2(b_gate) if LOG else b_gate
            b_weight *= b_gate
        elif not LOG:
            b_gate = tl.log2(b_gate)
        o_gate = i_b * gate.b + i_h // shares.gate * gate.h + o_n
        m_gate = m_n & (i_h % shares.gate == 0)
        if FORM == 3:
            b_shift = fp16_shift(tl.log2(b_weight) + tl.log2(tl.max(tl.abs(b_v), 1)))
            b_gate += b_shift
            b_rest = tl.exp2(-b_shift)
            b_weight *= b_rest
            tl.store(rest + o_gate, b_rest, mask=m_gate)
        if seen is not None:
            b_gate = tl.where(m_seen, b_gate, float("-inf"))
        tl.store(gate.ptr + o_gate, b_gate, mask=m_gate)
    if gated is not None:
        p_gated = gated.ptr + i_b * gated.b + i_h // shares.gated * gated.h + o_n[:, None] * gated.n + o_d
        m_gated = m_n[:, None] & (o_d < D) & (i_h % shares.gated == 0)
        tl.store(p_gated, (b_v * b_weight[:, None]).to(v.ptr.dtype.element_ty), mask=m_gated)
