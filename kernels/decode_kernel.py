"""Decode: few query rows over many keys. Splits of the keys run side by side, a merge joins them by their lse.

Rows pack (query position, head of the group), so that a KV head's keys are read once for its whole group. The gates are
read raw: log2 gK is added to the logits and gV scales the weights, so that the cache stays ungated. Lengths and block
tables are read on the device only.
"""

import triton
import triton.language as tl

from .backward_kernel import LOG2E
from .steps import LN2, add_product, finite_max, load_rows, soft_capped, visible_keys, visible_pairs

GATE_STRIDES = ["stride_gkb", "stride_gkh", "stride_gvb", "stride_gvh"]


@triton.jit
def cache_rows(p_table, i_n, o_n, m_keys, stride_p, stride_n, BN: tl.constexpr, PAGE: tl.constexpr):
    """[BN] int64 offsets of the keys o_n = i_n, i_n + 1, ... of a cache with pages stride_p apart and rows stride_n.

    p_table: the sequence's block table. m_keys [BN]: which keys exist. PAGE: keys of a page; the BN keys lie on one
    page where it holds a tile.
    """
    if PAGE % BN == 0:
        i_page = tl.load(p_table + i_n // PAGE).to(tl.int64)
        o_rows = i_page * stride_p + (i_n % PAGE + tl.arange(0, BN)).to(tl.int64) * stride_n
    else:
        o_page = tl.load(p_table + o_n // PAGE, mask=m_keys, other=0).to(tl.int64)
        o_rows = o_page * stride_p + (o_n % PAGE).to(tl.int64) * stride_n
    return o_rows


@triton.jit(do_not_specialize=["Nq", "Nk", "Nk_gk", "Nk_gv", "window", "stride_mb", "stride_tb", *GATE_STRIDES])
def split_kernel(
    q,
    k,
    v,
    gamma_k,
    gamma_v,
    seen,
    lengths,
    table,
    part_out,
    part_lse,
    scale_log2,
    cap_log2,
    Nq,
    Nk,
    Nk_gk,
    Nk_gv,
    Hkv,
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
    stride_gkb,
    stride_gkh,
    stride_gvb,
    stride_gvh,
    stride_mb,
    stride_tb,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM packed rows (query position, head of the group) of one KV head, over one split of its keys.

    q (B, Hq, Nq, D); k and v (B, Hkv, Nk, D), or with a block table (B, pages of a sequence) int32 pages
    (P, Hkv, PAGE, D); gamma_k (B, Hkv, Nk_gk), gamma_v (B, Hkv, Nk_gv), 1 beyond and where they are None; seen (B, Nk)
    uint8 or None; lengths (B,) int32, the keys of each sequence, or None for Nk. Writes the split's
    part_out (B, Hq, Nq, splits, D) and part_lse (B, Hq, Nq, splits), in base 2, both fp32.
    scale_log2, cap_log2: scale and softcap times log2 e. BD >= D: columns of a tile.
    """
    i_split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    n_blocks = tl.cdiv(Nq * group, BM)
    i_bkv = tl.program_id(0) // n_blocks
    i_b = (i_bkv // Hkv).to(tl.int64)
    i_kv = (i_bkv % Hkv).to(tl.int64)
    capacity = Nk
    if lengths is not None:
        Nk = tl.load(lengths + i_b)
    n_visible = tl.minimum(Nk, capacity)

    # [BM] packed rows
    o_r = tl.program_id(0) % n_blocks * BM + tl.arange(0, BM)
    m_r = o_r < Nq * group
    o_m = o_r // group
    o_h = i_kv * group + o_r % group
    o_position = o_m + Nk - Nq

    p_k = k + i_kv * stride_kh
    p_v = v + i_kv * stride_vh
    if table is None:
        p_k += i_b * stride_kb
        p_v += i_b * stride_vb
    p_table = table + i_b * stride_tb if table is not None else None
    p_seen = seen + i_b * stride_mb if seen is not None else None
    p_q = q + i_b * stride_qb + (o_h * stride_qh + o_m.to(tl.int64) * stride_qn)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    # [BM, BD]
    b_q = tl.load(p_q + o_d, mask=m_r[:, None] & m_d, other=0.0)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    i_first = tl.maximum(Nk - Nq - window + 1, 0) // BN * BN if WINDOW else 0
    n_keys = tl.cdiv(tl.cdiv(n_visible - i_first, n_splits), BN) * BN
    i_start = i_first + i_split * n_keys
    i_end = tl.minimum(i_start + n_keys, n_visible)
    for i_n in tl.range(i_start, i_end, BN, num_stages=STAGES):
        i_n = tl.multiple_of(i_n, BN)
        o_n = i_n + tl.arange(0, BN)
        m_keys = visible_keys(p_seen, o_n, i_end)
        m_tile = m_keys[:, None] & m_d if BD > D else m_keys[:, None]
        # [BM, BN] = [BM, BD] [BD, BN]
        if table is None:
            b_k = load_rows(p_k, i_n, stride_kn, m_tile, BN, BD, True)
        else:
            o_rows = cache_rows(p_table, i_n, o_n, m_keys, stride_kb, stride_kn, BN, PAGE)
            b_k = tl.load(p_k + o_rows[:, None] + o_d, mask=m_tile, other=0.0)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee") * scale_log2
        if SOFTCAP:
            b_s = soft_capped(b_s, cap_log2)
        if gamma_k is not None:
            p_gate = gamma_k + i_b * stride_gkb + i_kv * stride_gkh + o_n
            b_s += (tl.load(p_gate, mask=m_keys & (o_n < Nk_gk), other=0.0).to(tl.float32) * LOG2E)[None, :]
        b_s = tl.where(visible_pairs(m_keys, o_n, o_position, window, CAUSAL, WINDOW), b_s, float("-inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = finite_max(b_max_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        # [BM, BD] += [BM, BN] [BN, BD]
        if table is None:
            b_v = load_rows(p_v, i_n, stride_vn, m_tile, BN, BD, True)
        else:
            o_rows = cache_rows(p_table, i_n, o_n, m_keys, stride_vb, stride_vn, BN, PAGE)
            b_v = tl.load(p_v + o_rows[:, None] + o_d, mask=m_tile, other=0.0)
        if gamma_v is not None:
            p_gate = gamma_v + i_b * stride_gvb + i_kv * stride_gvh + o_n
            b_gate = tl.load(p_gate, mask=m_keys & (o_n < Nk_gv), other=1.0).to(tl.float32)
            b_p *= b_gate[None, :]
        b_acc = add_product(b_p, b_v, b_acc * b_decay[:, None], gamma_v is not None)
        b_max = b_max_new

    # a row without a visible key in this split has sum 0 and max -inf: output 0, lse -inf
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    if lengths is not None:  # a length that the cache cannot hold must not give a plausible result
        b_sum = tl.where((Nk < 0) | (Nk > capacity), float("nan"), b_sum)
    o_part = ((i_b * Hkv * group + o_h) * Nq + o_m) * n_splits + i_split
    tl.store(part_out + o_part[:, None] * D + o_d, b_acc / b_sum[:, None], mask=m_r[:, None] & m_d)
    tl.store(part_lse + o_part, b_max + tl.log2(b_sum), mask=m_r)


@triton.jit(do_not_specialize=["Nq", "n_splits"])
def merge_kernel(
    part_out,
    part_lse,
    out,
    lse,
    Hq,
    Nq,
    n_splits,
    stride_ob,
    stride_oh,
    stride_on,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    """One program: one query row, out (B, Hq, Nq, D) and lse (B, Hq, Nq) fp32 from n_splits parts, BS at a time.

    part_out and part_lse as `split_kernel` writes them. BD >= D: columns of a tile.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // (Hq * Nq)
    i_h = i_row // Nq % Hq
    i_m = i_row % Nq
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_acc = tl.zeros([BD], tl.float32)
    b_sum = 0.0
    b_max = float("-inf")
    for i_split in tl.range(0, n_splits, BS):
        o_split = i_split + tl.arange(0, BS)
        m_split = o_split < n_splits
        # [BS], [BS, BD]
        b_lse = tl.load(part_lse + i_row * n_splits + o_split, mask=m_split, other=float("-inf"))
        p_part = part_out + (i_row * n_splits + o_split)[:, None] * D + o_d[None, :]
        b_part = tl.load(p_part, mask=m_split[:, None] & m_d[None, :], other=0.0)
        b_max_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_shift = finite_max(b_max_new)
        b_weight = tl.exp2(b_lse - b_shift)
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 0)
        b_acc = b_acc * b_decay + tl.sum(b_part * b_weight[:, None], 0)
        b_max = b_max_new
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    p_out = out + i_b * stride_ob + i_h * stride_oh + i_m * stride_on
    tl.store(p_out + o_d, (b_acc / b_sum).to(out.dtype.element_ty), mask=m_d)
    tl.store(lse + i_row, (b_max + tl.log2(b_sum)) * LN2)
