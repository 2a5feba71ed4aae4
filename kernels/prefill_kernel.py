"""Prefill: gated FlashAttention forward, one program a tile of query rows.

out_i = sum_j p_ij gK_j gV_j v_j / sum_j p_ij gK_j with p_ij = exp(scale q_i.k_j). `prescale` has multiplied the value
gate (and gK in the post-exp form) into V before the launch; gK enters the tile in one of its exact forms.
"""

import triton
import triton.language as tl

from .steps import LN2, finite_max, load_rows, poison_rows, soft_capped, visible_pairs


@triton.jit
def load_tile(
    p_rows,
    descriptor,
    i_row,
    i_n,
    stride_n,
    m_keys,
    i_b,
    i_h,
    i_d: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    CLEARED: tl.constexpr,
):
    """[BN, D] tile of keys or values: rows i_n up to i_n + BN of the sequence that begins at row i_row.

    By pointer from p_rows (of that sequence, batch entry and head), or where there is a descriptor of (B, H, N, D) by
    the copy engine. i_d: first of the D columns. m_keys [BN] hides rows by pointer if MASKED, by descriptor if CLEARED.
    """
    # [BN, D] of the sequence that begins at row i_row
    if descriptor is None:
        b_tile = load_rows(p_rows + i_d, i_n, stride_n, m_keys[:, None], BN, D, MASKED)
    else:
        b_tile = descriptor.load([i_b, i_h, i_row + i_n, i_d]).reshape([BN, D])
        if CLEARED:
            # a packed sequence's neighbour follows it, and may hold NaN
            b_tile = tl.where(m_keys[:, None], b_tile, 0.0)
    return b_tile


@triton.jit
def attend_tiles(
    b_acc0,
    b_acc1,
    b_sum,
    b_max,
    b_q0,
    b_q1,
    p_k,
    p_v,
    k_tiles,
    v_tiles,
    p_gate,
    p_rest,
    i_b,
    i_kv,
    i_row,
    i_start,
    i_end,
    Nk,
    o_position,
    window,
    scale_log2,
    cap_log2,
    stride_kn,
    stride_vn,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    PADDED: tl.constexpr,
    VARLEN: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gate's tile loop: adds keys i_start up to i_end, BN at a time, to the running softmax of BM query rows.

    The state is b_acc0 [BM, D0] and b_acc1 [BM, D1] (sums of weighted values, D0 + D1 the head dim; D1 may be 0),
    b_sum [BM] and b_max [BM] (sum and maximum of the weights, the maximum in base 2), all fp32. b_q0 [BM, D0] and
    b_q1 [BM, D1] are the queries, o_position [BM] their positions among the Nk keys.
    p_k, p_v, p_gate, p_rest: the KV head's rows of this sequence; k_tiles, v_tiles: pairs of descriptors, or of None.
    GATE: what p_gate is, see prescale.py. PADDED: -inf there hides a key. MASKED: some pair of the tile may be hidden,
    by the end of the keys, by CAUSAL or by WINDOW.
    """
    CLEARED: tl.constexpr = VARLEN and MASKED
    BIAS: tl.constexpr = GATE == 1 or GATE == 3
    for i_n in tl.range(i_start, i_end, BN, num_stages=STAGES):
        i_n = tl.multiple_of(i_n, BN)
        o_n = i_n + tl.arange(0, BN)
        m_keys = o_n < Nk
        # [BM, BN] = [BM, D0] [D0, BN] + [BM, D1] [D1, BN]
        b_k0 = load_tile(p_k, k_tiles[0], i_row, i_n, stride_kn, m_keys, i_b, i_kv, 0, BN, D0, MASKED, False)
        b_s = tl.dot(b_q0, b_k0.T, input_precision="ieee")
        if D1 > 0:
            b_k1 = load_tile(p_k, k_tiles[1], i_row, i_n, stride_kn, m_keys, i_b, i_kv, D0, BN, D1, MASKED, False)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision="ieee")
        if GATE != 0:
            # [BN]
            b_gate = tl.load(p_gate + o_n)
            b_weight = tl.load(p_rest + o_n) if GATE == 3 else b_gate
            if MASKED:
                b_gate = tl.where(m_keys, b_gate, 0.0)
                b_weight = tl.where(m_keys, b_weight, 0.0)
        if BIAS or SOFTCAP:
            b_s *= scale_log2
            if SOFTCAP:
                b_s = soft_capped(b_s, cap_log2)
            if BIAS:
                b_s += b_gate[None, :]
        if PADDED:
            # a select, since a hidden key's logit may be NaN
            b_s = tl.where(b_gate[None, :] == float("-inf"), float("-inf"), b_s)
        if MASKED:
            b_s = tl.where(visible_pairs(m_keys, o_n, o_position, window, CAUSAL, WINDOW), b_s, float("-inf"))
        if BIAS or SOFTCAP:
            b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = finite_max(b_max_new)
            b_p = tl.exp2(b_s - b_shift[:, None])
        else:
            b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
            b_shift = finite_max(b_max_new) if MASKED else b_max_new
            b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p * b_weight[None, :] if GATE >= 2 else b_p, 1)
        b_p = b_p.to(p_v.dtype.element_ty)
        # [BM, D0] += [BM, BN] [BN, D0]
        b_v0 = load_tile(p_v, v_tiles[0], i_row, i_n, stride_vn, m_keys, i_b, i_kv, 0, BN, D0, MASKED, CLEARED)
        b_acc0 = tl.dot(b_p, b_v0, b_acc0 * b_decay[:, None], input_precision="ieee")
        if D1 > 0:
            b_v1 = load_tile(p_v, v_tiles[1], i_row, i_n, stride_vn, m_keys, i_b, i_kv, D0, BN, D1, MASKED, CLEARED)
            b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_decay[:, None], input_precision="ieee")
        b_max = b_max_new
    return b_acc0, b_acc1, b_sum, b_max


@triton.jit(do_not_specialize=["Nq", "Nk", "window", "stride_gb", "stride_gh", "stride_lb", "stride_lh"])
def prefill_kernel(
    q,
    k,
    v,
    k_desc0,
    k_desc1,
    v_desc0,
    v_desc1,
    gate,
    rest,
    out,
    lse,
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
    stride_gb,
    stride_gh,
    stride_ob,
    stride_oh,
    stride_on,
    stride_lb,
    stride_lh,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM query rows of one head of one sequence, over all keys that they see.

    q and out (B, Hq, Nq, D0 + D1), k and v (B, Hkv, Nk, D0 + D1) with contiguous rows, lse (B, Hq, Nq) fp32; packed
    sequences are one batch entry, cut by the offsets cu_q and cu_k (sequences + 1,) int32. k_desc0 to v_desc1:
    descriptors of [1, 1, BN, D0 or D1] tiles, None to load by pointer. gate and rest: (B, Hkv or 1, >= Nk) fp32 as
    `prescale` makes them for GATE, with room for a whole tile. scale_log2, cap_log2: scale and softcap times log2 e.
    group: query heads of a KV head. window: keys that a query sees.
    """
    VARLEN: tl.constexpr = cu_q is not None
    i_m = tl.program_id(0)
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m  # longest first
    i_first = i_m * BM
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    i_kv = i_h // group
    i_row = 0
    p_q = q + i_h.to(tl.int64) * stride_qh
    p_k = k + i_kv.to(tl.int64) * stride_kh
    p_v = v + i_kv.to(tl.int64) * stride_vh
    p_out = out + i_h.to(tl.int64) * stride_oh
    p_lse = lse + i_h.to(tl.int64) * stride_lh
    p_gate = gate + i_kv.to(tl.int64) * stride_gh if GATE != 0 else None
    p_rest = rest + i_kv.to(tl.int64) * stride_gh if GATE == 3 else None
    if VARLEN:
        i_row_q = tl.load(cu_q + i_b)
        Nq = tl.load(cu_q + i_b + 1) - i_row_q
        i_row = tl.load(cu_k + i_b)
        Nk = tl.load(cu_k + i_b + 1) - i_row
        p_q += i_row_q.to(tl.int64) * stride_qn
        p_k += i_row.to(tl.int64) * stride_kn
        p_v += i_row.to(tl.int64) * stride_vn
        p_out += i_row_q.to(tl.int64) * stride_on
        p_lse += i_row_q
        if GATE != 0:
            p_gate += i_row
        if GATE == 3:
            p_rest += i_row
        i_b = 0
        if i_m == tl.num_programs(0) - 1 and i_first + BM < Nq:
            poison_rows(p_out, stride_on, i_first + BM, Nq, D0 + D1, BM)
            poison_rows(p_lse, 1, i_first + BM, Nq, 1, BM)
        if i_first >= Nq:
            return
    else:
        p_q += i_b.to(tl.int64) * stride_qb
        p_k += i_b.to(tl.int64) * stride_kb
        p_v += i_b.to(tl.int64) * stride_vb
        p_out += i_b.to(tl.int64) * stride_ob
        p_lse += i_b.to(tl.int64) * stride_lb
        if GATE != 0:
            p_gate += i_b.to(tl.int64) * stride_gb
        if GATE == 3:
            p_rest += i_b.to(tl.int64) * stride_gb

    o_m = i_first + tl.arange(0, BM)
    m_m = o_m < Nq
    # [BM, D0], [BM, D1]
    b_q0 = load_rows(p_q, i_first, stride_qn, m_m[:, None], BM, D0, True)
    b_q1 = load_rows(p_q + D0, i_first, stride_qn, m_m[:, None], BM, D1, True) if D1 > 0 else 0
    b_acc0 = tl.zeros([BM, D0], tl.float32)
    b_acc1 = tl.zeros([BM, D1], tl.float32) if D1 > 0 else 0
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    # keys: [i_start, i_inner) partly visible, [i_inner, i_edge) visible to every row, [i_edge, i_end) partly visible
    position = i_first + Nk - Nq
    i_start = 0
    i_inner = 0
    i_edge = Nk // BN * BN
    i_end = Nk
    if CAUSAL:
        i_edge = tl.minimum(Nk, tl.maximum(position + 1, 0)) // BN * BN
        i_end = tl.minimum(Nk, tl.maximum(position + BM, 0))
    k_tiles = (k_desc0, k_desc1)
    v_tiles = (v_desc0, v_desc1)
    if WINDOW:
        i_start = tl.maximum(position - window + 1, 0) // BN * BN
        i_inner = tl.cdiv(tl.maximum(position + BM - window, 0), BN) * BN
        b_acc0, b_acc1, b_sum, b_max = attend_tiles(
            b_acc0, b_acc1, b_sum, b_max, b_q0, b_q1, p_k, p_v, k_tiles, v_tiles, p_gate, p_rest, i_b, i_kv, i_row,
            i_start, tl.minimum(i_inner, i_end), Nk, o_m + Nk - Nq, window, scale_log2, cap_log2, stride_kn, stride_vn,
            D0, D1, BN, GATE, PADDED, VARLEN, True, CAUSAL, WINDOW, SOFTCAP, STAGES,
        )  # fmt: skip
    b_acc0, b_acc1, b_sum, b_max = attend_tiles(
        b_acc0, b_acc1, b_sum, b_max, b_q0, b_q1, p_k, p_v, k_tiles, v_tiles, p_gate, p_rest, i_b, i_kv, i_row,
        i_inner, i_edge, Nk, o_m + Nk - Nq, window, scale_log2, cap_log2, stride_kn, stride_vn,
        D0, D1, BN, GATE, PADDED, VARLEN, False, CAUSAL, WINDOW, SOFTCAP, STAGES,
    )  # fmt: skip
    b_acc0, b_acc1, b_sum, b_max = attend_tiles(
        b_acc0, b_acc1, b_sum, b_max, b_q0, b_q1, p_k, p_v, k_tiles, v_tiles, p_gate, p_rest, i_b, i_kv, i_row,
        tl.maximum(i_inner, i_edge), i_end, Nk, o_m + Nk - Nq, window, scale_log2, cap_log2, stride_kn, stride_vn,
        D0, D1, BN, GATE, PADDED, VARLEN, True, CAUSAL, WINDOW, SOFTCAP, STAGES,
    )  # fmt: skip

    # a row without a visible key has sum 0 and max -inf: output 0, lse -inf
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    p_rows = p_out + o_m[:, None].to(tl.int64) * stride_on
    tl.store(p_rows + tl.arange(0, D0)[None, :], (b_acc0 / b_sum[:, None]).to(out.dtype.element_ty), mask=m_m[:, None])
    if D1 > 0:
        b_out1 = (b_acc1 / b_sum[:, None]).to(out.dtype.element_ty)
        tl.store(p_rows + D0 + tl.arange(0, D1)[None, :], b_out1, mask=m_m[:, None])
    tl.store(p_lse + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)
