"""Prefill: gated FlashAttention forward, one program a tile of query rows.

out_i = sum_j p_ij gK_j gV_j v_j / sum_j p_ij gK_j with p_ij = exp(scale q_i.k_j). `prescale` has multiplied the value
gate (and gK in the post-exp form) into V before the launch; gK enters the tile in one of its exact forms.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .steps import LN2, LOWEST, finish_rows, load_block, load_row, poison_rows, softmax_step, visible_pairs


class Gate(NamedTuple):
    """What the tile takes of the gates, as `prescale` makes it: (B, heads, >= Nk) fp32 with room for a whole tile.

    bias: terms of the logits in base 2, -inf hides a key; weight: factors of the row sum; None where there is none.
    Both have the strides b and h, of batch and head, and contiguous keys.
    """

    bias: torch.Tensor | None
    weight: torch.Tensor | None
    b: int
    h: int


class Groups(NamedTuple):
    """Query heads that share a head of the keys, of the values, of the gate."""

    k: int
    v: int
    gate: int


@triton.jit
def load_tile(
    p_rows,
    rows,
    i_n,
    m_keys,
    PART: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    CLEARED: tl.constexpr,
):
    """[BN, D[PART]] tile of keys or values, one part of the head dim: rows i_n up to i_n + BN of a sequence.

    By pointer from p_rows (of that first row), or by the copy engine where there are descriptors. rows: pointer to the
    sequence, stride of its rows, descriptors of (B, H, N, D) for each part or None, and the batch entry, head and first
    row of the sequence for them. m_keys [BN] hides rows by pointer if MASKED, by descriptor if CLEARED.
    """
    _, stride_n, descriptors, i_b, i_h, i_row = rows
    i_d: tl.constexpr = D[0] * PART
    descriptor = descriptors[PART]
    if descriptor is None:
        b_tile = load_block(p_rows + i_d, stride_n, m_keys[:, None], BN, D[PART], MASKED)
    else:
        b_tile = descriptor.load([i_b, i_h, i_row + i_n, i_d]).reshape([BN, D[PART]])
        if CLEARED:
            # a packed sequence's neighbour follows it, and may hold NaN
            b_tile = tl.where(m_keys[:, None], b_tile, 0.0)
    return b_tile


@triton.jit
def attend_tiles(
    state,
    queries,
    keys,
    values,
    p_bias,
    p_weight,
    i_start,
    i_end,
    Nk,
    o_position,
    window,
    logits,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gate's tile loop: adds keys i_start up to i_end, a tile at a time, to the running softmax of BM query rows.

    state: b_acc0 [BM, D[0]] and b_acc1 [BM, D[1]] (sums of weighted values; D[1] may be 0, b_acc1 is nothing then),
    b_sum and b_max [BM] (see `softmax_step`), all fp32. queries: b_q0 [BM, D[0]] and b_q1 [BM, D[1]]. keys, values: as
    `load_tile` takes them. p_bias, p_weight: to `Gate`'s bias and weight of the sequence's first key, or None.
    o_position [BM]: the queries' positions among the Nk keys. PADDED: -inf in the bias hides a key that may hold NaN.
    MASKED: some pair of the tile may be hidden, by the end of the keys, by CAUSAL or by the window.
    """
    BN: tl.constexpr = TILE.keys
    CLEARED: tl.constexpr = VARLEN and MASKED
    b_acc0, b_acc1, b_sum, b_max = state
    b_q0, b_q1 = queries
    # pointers that move with the tiles: as products with i_n they cost registers, and a counter of 64 bits
    start = tl.cast(i_start, tl.int64)
    p_k = keys[0] + start * keys[1]
    p_v = values[0] + start * values[1]
    if p_bias is not None:
        p_bias += start
    if p_weight is not None:
        p_weight += start
    for i_n in tl.range(i_start, i_end, BN, num_stages=TILE.stages, warp_specialize=TILE.specialized):
        i_n = tl.multiple_of(i_n, BN)
        o_n = i_n + tl.arange(0, BN)
        m_keys = o_n < Nk
        # [BM, BN] = [BM, D0] [D0, BN] + [BM, D1] [D1, BN]
        b_k0 = load_tile(p_k, keys, i_n, m_keys, 0, D, BN, MASKED, False)
        b_s = tl.dot(b_q0, b_k0.T, input_precision="ieee")
        if D[1] > 0:
            b_k1 = load_tile(p_k, keys, i_n, m_keys, 1, D, BN, MASKED, False)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision="ieee")
        # [BN]
        b_bias = load_row(p_bias, BN) if p_bias is not None else None
        b_weight = load_row(p_weight, BN) if p_weight is not None else None
        m_pairs = None
        if MASKED:
            m_pairs = visible_pairs(m_keys, o_n, o_position, window, CAUSAL, window is not None)
            if PADDED:
                m_pairs = m_pairs & (b_bias[None, :] != float("-inf"))
            if p_weight is not None:
                b_weight = tl.where(m_keys, b_weight, 0.0)
        elif PADDED:
            m_pairs = b_bias[None, :] != float("-inf")
        b_p, b_decay, b_max, b_sum = softmax_step(
            b_s, b_max, b_sum, logits, None, b_bias, b_weight, m_pairs, b_q0.dtype == tl.float32
        )
        # [BM, D0] += [BM, BN] [BN, D0]
        b_v0 = load_tile(p_v, values, i_n, m_keys, 0, D, BN, MASKED, CLEARED)
        b_p = b_p.to(b_v0.dtype)
        b_acc0 = tl.dot(b_p, b_v0, b_acc0 * b_decay[:, None], input_precision="ieee")
        if D[1] > 0:
            b_v1 = load_tile(p_v, values, i_n, m_keys, 1, D, BN, MASKED, CLEARED)
            b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_decay[:, None], input_precision="ieee")
        p_k += BN * keys[1]
        p_v += BN * values[1]
        if p_bias is not None:
            p_bias += BN
        if p_weight is not None:
            p_weight += BN
    return b_acc0, b_acc1, b_sum, b_max


@triton.jit(do_not_specialize=["Nq", "Nk", "window"])
def prefill_kernel(
    q,
    k,
    v,
    k_desc0,
    k_desc1,
    v_desc0,
    v_desc1,
    gate,
    out,
    lse,
    offsets,
    logits,
    groups,
    Nq,
    Nk,
    window,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: BM query rows of one head of one sequence, over all keys that they see.

    q, k, v, out: `Rows` of (B, Hq, Nq, D[0] + D[1]), (B, Hkv, Nk, ...), (B, Hkv or Hq, Nk, ...) and q's shape; lse
    (B, Hq, Nq) fp32, contiguous. Packed sequences are one batch entry, cut by `Offsets` (None: no packing). k_desc0 to
    v_desc1: descriptors of [1, 1, BN, D[0] or D[1]] tiles, None to load by pointer. gate: `Gate`; logits: `Logits`;
    groups: `Groups`. window: keys that a query sees, None for all. D: two powers of two that add up to the head dim.
    """
    # descriptors are arguments of their own: Triton's launchers do not find them within tuples
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    D0: tl.constexpr = D[0]
    D1: tl.constexpr = D[1]
    VARLEN: tl.constexpr = offsets is not None
    i_m = tl.program_id(0)
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m  # longest first
    i_first = i_m * BM
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    i_k = i_h // groups.k
    i_v = i_h // groups.v
    i_row = 0
    p_q = q.ptr + i_h.to(tl.int64) * q.h
    p_k = k.ptr + i_k.to(tl.int64) * k.h
    p_v = v.ptr + i_v.to(tl.int64) * v.h
    p_out = out.ptr + i_h.to(tl.int64) * out.h
    p_lse = lse + i_h.to(tl.int64) * Nq
    o_gate = (i_h // groups.gate).to(tl.int64) * gate.h
    if VARLEN:
        i_row_q = tl.load(offsets.q + i_b)
        Nq = tl.load(offsets.q + i_b + 1) - i_row_q
        i_row = tl.load(offsets.k + i_b)
        Nk = tl.load(offsets.k + i_b + 1) - i_row
        p_q += i_row_q.to(tl.int64) * q.n
        p_k += i_row.to(tl.int64) * k.n
        p_v += i_row.to(tl.int64) * v.n
        p_out += i_row_q.to(tl.int64) * out.n
        p_lse += i_row_q
        o_gate += i_row
        i_b = 0
        if i_m == tl.num_programs(0) - 1 and i_first + BM < Nq:
            poison_rows(p_out, out.n, i_first + BM, Nq, D0 + D1, BM)
            poison_rows(p_lse, 1, i_first + BM, Nq, 1, BM)
        if i_first >= Nq:
            return
    else:
        p_q += i_b.to(tl.int64) * q.b
        p_k += i_b.to(tl.int64) * k.b
        p_v += i_b.to(tl.int64) * v.b
        p_out += i_b.to(tl.int64) * out.b
        p_lse += i_b.to(tl.int64) * tl.num_programs(1) * Nq
        o_gate += i_b.to(tl.int64) * gate.b

    o_m = i_first + tl.arange(0, BM)
    m_m = o_m < Nq
    # [BM, D0], [BM, D1]
    p_q += i_first.to(tl.int64) * q.n
    b_q0 = load_block(p_q, q.n, m_m[:, None], BM, D0, True)
    b_q1 = load_block(p_q + D0, q.n, m_m[:, None], BM, D1, True) if D1 > 0 else 0
    b_acc0 = tl.zeros([BM, D0], tl.float32)
    b_acc1 = tl.zeros([BM, D1], tl.float32) if D1 > 0 else 0
    # [BM]
    b_sum = tl.zeros([BM], tl.float32)
    b_max = tl.full([BM], LOWEST, tl.float32)

    # keys: [i_start, i_inner) partly visible, [i_inner, i_edge) visible to every row, [i_edge, i_end) partly visible
    position = i_first + Nk - Nq
    i_start = 0
    i_inner = 0
    i_edge = Nk // BN * BN
    i_end = Nk
    if CAUSAL:
        i_edge = tl.minimum(Nk, tl.maximum(position + 1, 0)) // BN * BN
        i_end = tl.minimum(Nk, tl.maximum(position + BM, 0))
    queries = (b_q0, b_q1)
    keys = (p_k, k.n, (k_desc0, k_desc1), i_b, i_k, i_row)
    values = (p_v, v.n, (v_desc0, v_desc1), i_b, i_v, i_row)
    p_bias = gate.bias + o_gate if gate.bias is not None else None
    p_weight = gate.weight + o_gate if gate.weight is not None else None
    state = (b_acc0, b_acc1, b_sum, b_max)
    if window is not None:
        i_start = tl.maximum(position - window + 1, 0) // BN * BN
        i_inner = tl.cdiv(tl.maximum(position + BM - window, 0), BN) * BN
        state = attend_tiles(
            state, queries, keys, values, p_bias, p_weight, i_start, tl.minimum(i_inner, i_end), Nk, o_m + Nk - Nq,
            window, logits, D, TILE, PADDED, CAUSAL, VARLEN, True,
        )  # fmt: skip
    state = attend_tiles(
        state, queries, keys, values, p_bias, p_weight, i_inner, i_edge, Nk, o_m + Nk - Nq,
        window, logits, D, TILE, PADDED, CAUSAL, VARLEN, False,
    )  # fmt: skip
    b_acc0, b_acc1, b_sum, b_max = attend_tiles(
        state, queries, keys, values, p_bias, p_weight, tl.maximum(i_inner, i_edge), i_end, Nk, o_m + Nk - Nq,
        window, logits, D, TILE, PADDED, CAUSAL, VARLEN, True,
    )  # fmt: skip

    # a row without a visible key: output 0, lse -inf
    b_sum, b_lse = finish_rows(b_max, b_sum)
    p_rows = p_out + o_m[:, None].to(tl.int64) * out.n
    b_out0 = (b_acc0 / b_sum[:, None]).to(out.ptr.dtype.element_ty)
    tl.store(p_rows + tl.arange(0, D0)[None, :], b_out0, mask=m_m[:, None])
    if D1 > 0:
        b_out1 = (b_acc1 / b_sum[:, None]).to(out.ptr.dtype.element_ty)
        tl.store(p_rows + D0 + tl.arange(0, D1)[None, :], b_out1, mask=m_m[:, None])
    tl.store(p_lse + o_m, b_lse * LN2, mask=m_m)
