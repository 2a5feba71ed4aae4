"""Backward of gated attention: weights recomputed from the lse, no Nq x Nk tensor, no atomic, the same bits twice.

P_ij = exp(cap(scale q_i.k_j) + log gK_j - lse_i), D_i = <dO_i, O_i> - dLse_i, dS_ij = P_ij (gV_j <dO_i, V_j> - D_i):
    dQ_i = scale sum_j cap'_ij dS_ij K_j        dV_j = gV_j sum_i P_ij dO_i        dgV_j = sum_i P_ij <dO_i, V_j>
    dK_j = scale sum_i cap'_ij dS_ij Q_i        dgK_j = sum_i dS_ij / gK_j
Sums over i run over the heads of the group too. cap'_ij is the slope of the softcap, 1 without one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .steps import LN2, add_product, load_block, poison_rows, soft_capped


class KeyGates(NamedTuple):
    """log2 gK (-inf hides a key) and gV, (B or 1, Hkv or 1, Nk) fp32, contiguous, or None.

    log_b to value_h: rows of Nk from one batch entry or head to the next, 0 where they share one.
    """

    log: torch.Tensor | None
    value: torch.Tensor | None
    log_b: int
    log_h: int
    value_b: int
    value_h: int


class RowSums(NamedTuple):
    """Of queries, (B, Hq, Nq) fp32, contiguous: lse, its gradient or None, and delta = <dO, O> - dLse."""

    lse: torch.Tensor
    d_lse: torch.Tensor | None
    delta: torch.Tensor


class KeyGradients(NamedTuple):
    """(B, Nk, Hkv, D) of k and v, and (B, Nk, Hkv) fp32 of log gK and gV or None; contiguous."""

    k: torch.Tensor
    v: torch.Tensor
    log_gate: torch.Tensor | None
    value_gate: torch.Tensor | None


@triton.jit
def sequence_rows(cu_seqlens, i_b):
    """First row (int64) and number of rows of sequence i_b by the offsets cu_seqlens (sequences + 1,) int32."""
    i_first = tl.load(cu_seqlens + i_b).to(tl.int64)
    return i_first, (tl.load(cu_seqlens + i_b + 1) - i_first).to(tl.int32)


@triton.jit
def load_gate(p_gate, m_keys, neutral, hidden, BN: tl.constexpr):
    """[BN] fp32 of a gate from p_gate on, `neutral` for all where that is None; `hidden` outside of m_keys [BN]."""
    b_gate = tl.full([BN], neutral, tl.float32)
    if p_gate is not None:
        b_gate = tl.load(p_gate + tl.arange(0, BN), mask=m_keys, other=neutral)
    return tl.where(m_keys, b_gate, hidden)


@triton.jit
def log2_lse(b_lse):
    """The lse in base 2; +inf for a row without a visible key, so that each of its weights is exp2(-inf) = 0."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse) * (1.0 / LN2)


@triton.jit
def weights_and_slope(
    b_s, b_log_gate, b_lse, o_n, o_position, window, logits, CAUSAL: tl.constexpr, EXACT: tl.constexpr
):
    """P and cap' of a tile of raw products b_s, [BM, BN] or [BN, BM]: the vectors come broadcastable to it.

    b_log_gate (log2 gK) and o_n belong to keys, b_lse (base 2) and o_position to queries. cap' is 1.0 without a
    softcap. EXACT: as in `soft_capped`.
    """
    b_slope = 1.0
    if logits.cap is not None:
        b_s = soft_capped(b_s, logits.cap, logits.scale, EXACT)
        b_tanh = b_s * (1.0 / logits.cap)
        b_slope = 1.0 - b_tanh * b_tanh
    else:
        b_s *= logits.scale
    b_p = tl.exp2(b_s + b_log_gate - b_lse)
    if CAUSAL:
        b_p = tl.where(o_n <= o_position, b_p, 0.0)
    if window is not None:
        b_p = tl.where(o_n > o_position - window, b_p, 0.0)
    return b_p, b_slope


@triton.jit(do_not_specialize=["Nq", "Nk", "window"])
def d_queries_kernel(
    q,
    k,
    v,
    out,
    d_out,
    gates,
    sums,
    d_q,
    offsets,
    logits,
    group,
    Nq,
    Nk,
    window,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: dQ of BM query rows of one head of one sequence, and their delta = <dO, O> - dLse.

    `Rows` of q, out, d_out (B, Hq, Nq, D) and k, v (B, Hkv, Nk, D); gates: `KeyGates`; sums: `RowSums`, of which delta
    is written. Writes d_q (B, Nq, Hq, D), contiguous. Packed sequences are one batch entry, cut by `Offsets` (None: no
    packing). logits: `Logits`. group: query heads of a KV head. window: keys that a query sees, None for all.
    """
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    BD: tl.constexpr = triton.next_power_of_2(D)
    i_m = tl.program_id(0) * BM
    if CAUSAL:
        i_m = (tl.num_programs(0) - 1) * BM - i_m  # longest first
    n_heads = tl.num_programs(1)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_kv = (tl.program_id(1) // group).to(tl.int64)
    o_log = (i_b * gates.log_b + i_kv * gates.log_h) * Nk
    o_value = (i_b * gates.value_b + i_kv * gates.value_h) * Nk
    i_entry = i_b
    i_first_q = i_b * 0
    i_first_k = i_b * 0
    i_row_q = i_b * Nq
    i_sums = (i_b * n_heads + i_h) * Nq
    if offsets is not None:
        i_entry = i_b * 0
        i_sums = i_h * Nq
        i_first_q, Nq = sequence_rows(offsets.q, i_b)
        i_first_k, Nk = sequence_rows(offsets.k, i_b)
        i_row_q = i_first_q
        if i_m == (tl.num_programs(0) - 1) * BM and i_m + BM < Nq:
            poison_rows(d_q + (i_row_q * n_heads + i_h) * D, n_heads * D, i_m + BM, Nq, D, BM)
    if i_m >= Nq:
        return

    o_m = i_m + tl.arange(0, BM)
    o_d = tl.arange(0, BD)[None, :]
    m_m = o_m < Nq
    m_d = o_d < D
    m_rows = m_m[:, None] & m_d if BD > D else m_m[:, None]
    # [BM, BD]
    i_rows = i_first_q + i_m
    b_q = load_block(q.ptr + i_entry * q.b + i_h * q.h + i_rows * q.n, q.n, m_rows, BM, BD, True)
    b_do = load_block(d_out.ptr + i_entry * d_out.b + i_h * d_out.h + i_rows * d_out.n, d_out.n, m_rows, BM, BD, True)
    b_out = load_block(out.ptr + i_entry * out.b + i_h * out.h + i_rows * out.n, out.n, m_rows, BM, BD, True)
    # [BM]
    o_sums = i_sums + i_first_q + o_m
    b_lse = tl.load(sums.lse + o_sums, mask=m_m, other=float("-inf"))
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    if sums.d_lse is not None:
        b_delta -= tl.load(sums.d_lse + o_sums, mask=m_m, other=0.0)
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    tl.store(sums.delta + o_sums, b_delta, mask=m_m)
    b_lse = log2_lse(b_lse)

    offset = Nk - Nq
    i_start = i_m * 0
    i_end = Nk
    if CAUSAL:
        i_end = tl.minimum(Nk, i_m + BM + offset)
    if window is not None:
        i_start = tl.maximum(i_m + offset - window + 1, 0) // BN * BN
    i_rows = i_first_k + i_start
    p_k = k.ptr + i_entry * k.b + i_kv * k.h + i_rows * k.n
    p_v = v.ptr + i_entry * v.b + i_kv * v.h + i_rows * v.n
    p_log = gates.log + o_log + i_rows if gates.log is not None else None
    p_value = gates.value + o_value + i_rows if gates.value is not None else None
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i_n in tl.range(i_start, i_end, BN, num_stages=TILE.stages):
        i_n = tl.multiple_of(i_n, BN)
        o_n = i_n + tl.arange(0, BN)
        m_keys = o_n < Nk
        m_tile = m_keys[:, None] & m_d if BD > D else m_keys[:, None]
        # [BM, BN] = [BM, BD] [BD, BN]
        b_k = load_block(p_k, k.n, m_tile, BN, BD, True)
        b_v = load_block(p_v, v.n, m_tile, BN, BD, True)
        b_log_gate = load_gate(p_log, m_keys, 0.0, float("-inf"), BN)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_p, b_slope = weights_and_slope(
            b_s, b_log_gate[None, :], b_lse[:, None], o_n[None, :], o_m[:, None] + offset, window, logits, CAUSAL,
            b_q.dtype == tl.float32,
        )  # fmt: skip
        b_dp = tl.dot(b_do, b_v.T, input_precision="ieee")
        b_value_gate = load_gate(p_value, m_keys, 1.0, 1.0, BN)
        b_ds = b_p * (b_dp * b_value_gate[None, :] - b_delta[:, None]) * b_slope
        # [BM, BD] += [BM, BN] [BN, BD]
        b_dq = add_product(b_ds, b_k, b_dq, gates.value is not None)
        p_k += BN * k.n
        p_v += BN * v.n
        if gates.log is not None:
            p_log += BN
        if gates.value is not None:
            p_value += BN
    p_dq = d_q + ((i_row_q + o_m) * n_heads + i_h)[:, None] * D + o_d
    tl.store(p_dq, (b_dq * (logits.scale * LN2)).to(d_q.dtype.element_ty), mask=m_rows)


@triton.jit(do_not_specialize=["Nq", "Nk", "window"])
def d_keys_kernel(
    q,
    k,
    v,
    d_out,
    gates,
    sums,
    grads,
    offsets,
    logits,
    group,
    Nq,
    Nk,
    window,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: dK, dV and the gradients of the gates of BN keys of one KV head of one sequence.

    Inputs as in `d_queries_kernel`, which has written delta. Writes grads (`KeyGradients`).
    """
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    BD: tl.constexpr = triton.next_power_of_2(D)
    i_n = tl.program_id(0) * BN
    n_heads = tl.num_programs(1)
    i_kv = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_log = (i_b * gates.log_b + i_kv * gates.log_h) * Nk
    o_value = (i_b * gates.value_b + i_kv * gates.value_h) * Nk
    i_entry = i_b
    i_first_q = i_b * 0
    i_first_k = i_b * 0
    i_row_k = i_b * Nk
    i_sums = i_b * n_heads * group * Nq
    queries = Nq
    if offsets is not None:
        i_entry = i_b * 0
        i_sums = i_b * 0
        i_first_q, Nq = sequence_rows(offsets.q, i_b)
        i_first_k, Nk = sequence_rows(offsets.k, i_b)
        i_row_k = i_first_k
        if tl.program_id(0) == tl.num_programs(0) - 1 and i_n + BN < Nk:
            i_first = i_row_k * n_heads + i_kv
            poison_rows(grads.k + i_first * D, n_heads * D, i_n + BN, Nk, D, BN)
            poison_rows(grads.v + i_first * D, n_heads * D, i_n + BN, Nk, D, BN)
            if grads.log_gate is not None:
                poison_rows(grads.log_gate + i_first, n_heads, i_n + BN, Nk, 1, BN)
            if grads.value_gate is not None:
                poison_rows(grads.value_gate + i_first, n_heads, i_n + BN, Nk, 1, BN)
    if i_n >= Nk:
        return

    o_n = i_n + tl.arange(0, BN)
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    m_keys = o_n < Nk
    m_tile = m_keys[:, None] & m_d
    i_rows = i_first_k + i_n
    p_v = v.ptr + i_entry * v.b + i_kv * v.h + i_rows * v.n
    p_log = gates.log + o_log + i_rows if gates.log is not None else None
    p_value = gates.value + o_value + i_rows if gates.value is not None else None
    # [BN, BD]
    b_k = load_block(k.ptr + i_entry * k.b + i_kv * k.h + i_rows * k.n, k.n, m_tile, BN, BD, True)
    b_v = load_block(p_v, v.n, m_tile, BN, BD, True)
    # [BN]
    b_log_gate = load_gate(p_log, m_keys, 0.0, float("-inf"), BN)
    b_value_gate = load_gate(p_value, m_keys, 1.0, 1.0, BN)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    b_d_log_gate = tl.zeros([BN], tl.float32)

    offset = Nk - Nq
    i_start = i_n * 0
    i_end = Nq
    if CAUSAL:
        i_start = tl.maximum(i_n - offset, 0) // BM * BM
    if window is not None:
        i_end = tl.minimum(Nq, i_n + BN - 1 + window - offset)
    for i_g in tl.range(group):
        i_h = i_kv * group + i_g
        i_rows = i_first_q + i_start
        p_q = q.ptr + i_entry * q.b + i_h * q.h + i_rows * q.n
        p_do = d_out.ptr + i_entry * d_out.b + i_h * d_out.h + i_rows * d_out.n
        p_lse = sums.lse + i_sums + i_h * queries + i_rows
        p_delta = sums.delta + i_sums + i_h * queries + i_rows
        for i_m in tl.range(i_start, i_end, BM, num_stages=TILE.stages):
            i_m = tl.multiple_of(i_m, BM)
            m_m = i_m + tl.arange(0, BM) < Nq
            m_rows = m_m[:, None] & m_d if BD > D else m_m[:, None]
            # [BM, BD]
            b_q = load_block(p_q, q.n, m_rows, BM, BD, True)
            b_do = load_block(p_do, d_out.n, m_rows, BM, BD, True)
            # [BM]
            b_lse = log2_lse(tl.load(p_lse + tl.arange(0, BM), mask=m_m, other=float("-inf")))
            b_delta = tl.load(p_delta + tl.arange(0, BM), mask=m_m, other=0.0)
            # [BN, BM] = [BN, BD] [BD, BM]
            b_s = tl.dot(b_k, b_q.T, input_precision="ieee")
            b_p, b_slope = weights_and_slope(
                b_s, b_log_gate[:, None], b_lse[None, :], (o_n - offset - i_m)[:, None], tl.arange(0, BM)[None, :],
                window, logits, CAUSAL, b_q.dtype == tl.float32,
            )  # fmt: skip
            # [BN, BD] += [BN, BM] [BM, BD]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, b_do.T, input_precision="ieee")
            b_ds = b_p * (b_dp * b_value_gate[:, None] - b_delta[None, :])
            if grads.log_gate is not None:
                b_d_log_gate += tl.sum(b_ds, 1)
            b_dk = add_product(b_ds * b_slope, b_q, b_dk, gates.value is not None)
            p_q += BM * q.n
            p_do += BM * d_out.n
            p_lse += BM
            p_delta += BM

    m_n = o_n < Nk
    m_rows = m_n[:, None] & m_d
    o_row = (i_row_k + o_n) * n_heads + i_kv
    o_rows = o_row[:, None] * D + o_d
    tl.store(grads.k + o_rows, (b_dk * (logits.scale * LN2)).to(grads.k.dtype.element_ty), mask=m_rows)
    if grads.log_gate is not None:
        tl.store(grads.log_gate + o_row, b_d_log_gate, mask=m_n)
    if grads.value_gate is not None:
        # V and its gate again: kept since the loop they would take registers from it
        b_v = load_block(p_v, v.n, m_tile, BN, BD, True).to(tl.float32)
        tl.store(grads.value_gate + o_row, tl.sum(b_dv * b_v, 1), mask=m_n)
        b_dv *= load_gate(p_value, m_keys, 1.0, 1.0, BN)[:, None]
    tl.store(grads.v + o_rows, b_dv.to(grads.v.dtype.element_ty), mask=m_rows)
