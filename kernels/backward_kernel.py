"""Backward of gated attention: weights recomputed from the lse, no Nq x Nk tensor, no atomic, the same bits twice.

P_ij = exp(cap(scale q_i.k_j) + log gK_j - lse_i), D_i = <dO_i, O_i> - dLse_i, dS_ij = P_ij (gV_j <dO_i, V_j> - D_i):
    dQ_i = scale sum_j cap'_ij dS_ij K_j        dV_j = gV_j sum_i P_ij dO_i        dgV_j = sum_i P_ij <dO_i, V_j>
    dK_j = scale sum_i cap'_ij dS_ij Q_i        dgK_j = sum_i dS_ij / gK_j
Sums over i run over the heads of the group too. cap'_ij is the slope of the softcap, 1 without one.
"""

import math

import triton
import triton.language as tl

from .steps import LN2, add_product, load_rows, poison_rows, soft_capped

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def sequence_rows(cu_seqlens, i_b, N):
    """First row within the batch entry (all packed sequences are one), first row of all, and number of rows.

    Of sequence i_b: N rows each, or as the offsets cu_seqlens (sequences + 1,) int32 say.
    """
    i_first = i_b * 0
    i_row = i_b * N
    if cu_seqlens is not None:
        i_first = tl.load(cu_seqlens + i_b).to(tl.int64)
        i_row = i_first
        N = (tl.load(cu_seqlens + i_b + 1) - i_first).to(tl.int32)
    return i_first, i_row, N


@triton.jit
def load_gate(p_gate, o_n, m_keys, neutral, hidden):
    """[BN] fp32 values of a gate at the keys o_n, `neutral` for all if p_gate is None; `hidden` outside of m_keys."""
    b_gate = tl.full(o_n.shape, neutral, tl.float32) if p_gate is None else tl.load(p_gate + o_n, m_keys, other=neutral)
    return tl.where(m_keys, b_gate, hidden)


@triton.jit
def log2_lse(b_lse):
    """The lse in base 2; +inf for a row without a visible key, so that each of its weights is exp2(-inf) = 0."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E


@triton.jit
def weights_and_slope(
    b_s,
    b_log_gate,
    b_lse,
    o_n,
    o_position,
    window,
    scale_log2,
    cap_log2,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """P and cap' of a tile of raw products b_s, [BM, BN] or [BN, BM]: the vectors come broadcastable to it.

    b_log_gate (log2 gK) and o_n belong to keys, b_lse (base 2) and o_position to queries. cap' is 1.0 without SOFTCAP.
    """
    b_s *= scale_log2
    b_slope = 1.0
    if SOFTCAP:
        b_s = soft_capped(b_s, cap_log2)
        b_tanh = b_s * (1.0 / cap_log2)
        b_slope = 1.0 - b_tanh * b_tanh
    b_p = tl.exp2(b_s + b_log_gate - b_lse)
    if CAUSAL:
        b_p = tl.where(o_n <= o_position, b_p, 0.0)
    if WINDOW:
        b_p = tl.where(o_n > o_position - window, b_p, 0.0)
    return b_p, b_slope


UNSPECIALIZED = ["Nq", "Nk", "window", "stride_lb", "stride_lh"]
UNSPECIALIZED += ["stride_gkb", "stride_gkh", "stride_gvb", "stride_gvh"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def d_queries_kernel(
    q,
    k,
    v,
    log_gate,
    value_gate,
    out,
    d_out,
    lse,
    d_lse,
    delta,
    d_q,
    cu_q,
    cu_k,
    scale_log2,
    cap_log2,
    Nq,
    Nk,
    group,
    window,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gkb,
    stride_gkh,
    stride_gvb,
    stride_gvh,
    stride_lb,
    stride_lh,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: dQ of BM query rows of one head of one sequence, and their delta = <dO, O> - dLse.

    q, out, d_out (B, Hq, Nq, D), k, v (B, Hkv, Nk, D) with contiguous rows; log_gate (log2 gK, -inf hides a key) and
    value_gate (B, Hkv, Nk) fp32 or None; lse, d_lse, delta (B, Hq, Nq) fp32. Writes d_q (B, Nq, Hq, D). Packed
    sequences are one batch entry, cut by the offsets cu_q and cu_k (sequences + 1,) int32.
    scale_log2, cap_log2: scale and softcap times log2 e. BD: D rounded up to a power of two.
    """
    i_m = tl.program_id(0) * BM
    if CAUSAL:
        i_m = (tl.num_programs(0) - 1) * BM - i_m  # longest first
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_kv = (tl.program_id(1) // group).to(tl.int64)
    i_first_q, i_row_q, Nq = sequence_rows(cu_q, i_b, Nq)  # pyright: ignore[reportGeneralTypeIssues]
    i_first_k, _, Nk = sequence_rows(cu_k, i_b, Nk)
    n_heads = tl.num_programs(1)
    if cu_q is not None and i_m == (tl.num_programs(0) - 1) * BM and i_m + BM < Nq:
        poison_rows(d_q + (i_row_q * n_heads + i_h) * D, n_heads * D, i_m + BM, Nq, D, BM)
    if i_m >= Nq:
        return
    p_k = k + i_b * stride_kb + i_kv * stride_kh + i_first_k * stride_kn
    p_v = v + i_b * stride_vb + i_kv * stride_vh + i_first_k * stride_vn
    p_log_gate = log_gate + i_b * stride_gkb + i_kv * stride_gkh + i_first_k if log_gate is not None else None
    p_value_gate = value_gate + i_b * stride_gvb + i_kv * stride_gvh + i_first_k if value_gate is not None else None
    i_rows = i_b * stride_ob + i_h * stride_oh + i_first_q * stride_on

    o_m = i_m + tl.arange(0, BM)
    o_d = tl.arange(0, BD)[None, :]
    m_m = o_m < Nq
    m_d = o_d < D
    m_rows = m_m[:, None] & m_d if BD > D else m_m[:, None]
    # [BM, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh + i_first_q * stride_qn, i_m, stride_qn, m_rows, BM, BD, True)
    b_do = load_rows(d_out + i_rows, i_m, stride_on, m_rows, BM, BD, True)
    b_out = load_rows(out + i_rows, i_m, stride_on, m_rows, BM, BD, True)
    # [BM]
    o_lse = i_b * stride_lb + i_h * stride_lh + i_first_q + o_m
    b_lse = tl.load(lse + o_lse, mask=m_m, other=float("-inf"))
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    if d_lse is not None:
        b_delta -= tl.load(d_lse + o_lse, mask=m_m, other=0.0)
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    tl.store(delta + o_lse, b_delta, mask=m_m)
    b_lse = log2_lse(b_lse)

    offset = Nk - Nq
    i_start = 0
    i_end = Nk
    if CAUSAL:
        i_end = tl.minimum(Nk, i_m + BM + offset)
    if WINDOW:
        i_start = tl.maximum(i_m + offset - window + 1, 0) // BN * BN
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i_n in tl.range(i_start, i_end, BN, num_stages=STAGES):
        i_n = tl.multiple_of(i_n, BN)
        o_n = i_n + tl.arange(0, BN)
        m_keys = o_n < Nk
        m_tile = m_keys[:, None] & m_d if BD > D else m_keys[:, None]
        # [BM, BN] = [BM, BD] [BD, BN]
        b_k = load_rows(p_k, i_n, stride_kn, m_tile, BN, BD, True)
        b_v = load_rows(p_v, i_n, stride_vn, m_tile, BN, BD, True)
        b_log_gate = load_gate(p_log_gate, o_n, m_keys, 0.0, float("-inf"))
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_p, b_slope = weights_and_slope(
            b_s, b_log_gate[None, :], b_lse[:, None], o_n[None, :], o_m[:, None] + offset, window,
            scale_log2, cap_log2, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
        b_dp = tl.dot(b_do, b_v.T, input_precision="ieee")
        b_value_gate = load_gate(p_value_gate, o_n, m_keys, 1.0, 1.0)
        b_ds = b_p * (b_dp * b_value_gate[None, :] - b_delta[:, None]) * b_slope
        # [BM, BD] += [BM, BN] [BN, BD]
        b_dq = add_product(b_ds, b_k, b_dq, value_gate is not None)
    p_dq = d_q + ((i_row_q + o_m) * n_heads + i_h)[:, None] * D + o_d
    tl.store(p_dq, (b_dq * (scale_log2 * LN2)).to(d_q.dtype.element_ty), mask=m_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def d_keys_kernel(
    q,
    k,
    v,
    log_gate,
    value_gate,
    d_out,
    lse,
    delta,
    d_k,
    d_v,
    d_log_gate,
    d_value_gate,
    cu_q,
    cu_k,
    scale_log2,
    cap_log2,
    Nq,
    Nk,
    group,
    window,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gkb,
    stride_gkh,
    stride_gvb,
    stride_gvh,
    stride_lb,
    stride_lh,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: dK, dV and the gradients of the gates of BN keys of one KV head of one sequence.

    Inputs as in `d_queries_kernel`, which has written delta. Writes d_k, d_v (B, Nk, Hkv, D), and where there is such a
    gate d_log_gate (of log gK) and d_value_gate (B, Nk, Hkv) fp32.
    """
    i_n = tl.program_id(0) * BN
    i_kv = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_first_q, _, Nq = sequence_rows(cu_q, i_b, Nq)  # pyright: ignore[reportGeneralTypeIssues]
    i_first_k, i_row_k, Nk = sequence_rows(cu_k, i_b, Nk)
    n_heads = tl.num_programs(1)
    if cu_k is not None and tl.program_id(0) == tl.num_programs(0) - 1 and i_n + BN < Nk:
        i_first = i_row_k * n_heads + i_kv
        poison_rows(d_k + i_first * D, n_heads * D, i_n + BN, Nk, D, BN)
        poison_rows(d_v + i_first * D, n_heads * D, i_n + BN, Nk, D, BN)
        if d_log_gate is not None:
            poison_rows(d_log_gate + i_first, n_heads, i_n + BN, Nk, 1, BN)
        if d_value_gate is not None:
            poison_rows(d_value_gate + i_first, n_heads, i_n + BN, Nk, 1, BN)
    if i_n >= Nk:
        return
    p_k = k + i_b * stride_kb + i_kv * stride_kh + i_first_k * stride_kn
    p_v = v + i_b * stride_vb + i_kv * stride_vh + i_first_k * stride_vn
    p_log_gate = log_gate + i_b * stride_gkb + i_kv * stride_gkh + i_first_k if log_gate is not None else None
    p_value_gate = value_gate + i_b * stride_gvb + i_kv * stride_gvh + i_first_k if value_gate is not None else None

    o_n = i_n + tl.arange(0, BN)
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    m_keys = o_n < Nk
    m_tile = m_keys[:, None] & m_d
    # [BN, BD]
    b_k = load_rows(p_k, i_n, stride_kn, m_tile, BN, BD, True)
    b_v = load_rows(p_v, i_n, stride_vn, m_tile, BN, BD, True)
    b_log_gate = load_gate(p_log_gate, o_n, m_keys, 0.0, float("-inf"))
    b_value_gate = load_gate(p_value_gate, o_n, m_keys, 1.0, 1.0)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    b_d_log_gate = tl.zeros([BN], tl.float32)

    offset = Nk - Nq
    i_start = 0
    i_end = Nq
    if CAUSAL:
        i_start = tl.maximum(i_n - offset, 0) // BM * BM
    if WINDOW:
        i_end = tl.minimum(Nq, i_n + BN - 1 + window - offset)
    for i_g in tl.range(group):
        i_h = i_kv * group + i_g
        p_q = q + i_b * stride_qb + i_h * stride_qh + i_first_q * stride_qn
        p_do = d_out + i_b * stride_ob + i_h * stride_oh + i_first_q * stride_on
        i_lse = i_b * stride_lb + i_h * stride_lh + i_first_q
        for i_m in tl.range(i_start, i_end, BM, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
            i_m = tl.multiple_of(i_m, BM)
            o_m = i_m + tl.arange(0, BM)
            m_m = o_m < Nq
            m_rows = m_m[:, None] & m_d if BD > D else m_m[:, None]
            # [BM, BD]
            b_q = load_rows(p_q, i_m, stride_qn, m_rows, BM, BD, True)
            b_do = load_rows(p_do, i_m, stride_on, m_rows, BM, BD, True)
            # [BM]
            b_lse = log2_lse(tl.load(lse + i_lse + o_m, mask=m_m, other=float("-inf")))
            b_delta = tl.load(delta + i_lse + o_m, mask=m_m, other=0.0)
            # [BN, BM] = [BN, BD] [BD, BM]
            b_s = tl.dot(b_k, b_q.T, input_precision="ieee")
            b_p, b_slope = weights_and_slope(
                b_s, b_log_gate[:, None], b_lse[None, :], (o_n - offset - i_m)[:, None], tl.arange(0, BM)[None, :],
                window, scale_log2, cap_log2, CAUSAL, WINDOW, SOFTCAP,
            )  # fmt: skip
            # [BN, BD] += [BN, BM] [BM, BD]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, b_do.T, input_precision="ieee")
            b_ds = b_p * (b_dp * b_value_gate[:, None] - b_delta[None, :])
            if d_log_gate is not None:
                b_d_log_gate += tl.sum(b_ds, 1)
            b_dk = add_product(b_ds * b_slope, b_q, b_dk, value_gate is not None)

    m_n = o_n < Nk
    m_rows = m_n[:, None] & m_d
    o_row = (i_row_k + o_n) * n_heads + i_kv
    o_rows = o_row[:, None] * D + o_d
    tl.store(d_k + o_rows, (b_dk * (scale_log2 * LN2)).to(d_k.dtype.element_ty), mask=m_rows)
    if d_log_gate is not None:
        tl.store(d_log_gate + o_row, b_d_log_gate, mask=m_n)
    if value_gate is not None:
        # V and its gate again: kept since the loop they would take registers from it
        b_v = load_rows(p_v, i_n, stride_vn, m_tile, BN, BD, True).to(tl.float32)
        tl.store(d_value_gate + o_row, tl.sum(b_dv * b_v, 1), mask=m_n)
        b_dv *= load_gate(p_value_gate, o_n, m_keys, 1.0, 1.0)[:, None]
    tl.store(d_v + o_rows, b_dv.to(d_v.dtype.element_ty), mask=m_rows)
