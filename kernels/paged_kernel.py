"""Attention of packed queries over a cache, mixed batches in one launch: prefill, chunks and decode.

A program takes the pieces of the work list that are its own (plan_kernel.py). A row block packs (query, head of the
group), so that a KV head's keys are read once for its whole group. A piece that is a whole item is written at once;
the parts of a cut one are joined by `merge_kernel`. Gates come by slot, beside the keys in the pages, or by position.
"""

import triton
import triton.language as tl

from .operands import Logits
from .plan_kernel import cut_item, part_slot, piece_count, piece_of
from .prescale_kernel import load_raw_gate
from .steps import LN2, LOWEST, add_product, finish_rows, softmax_step

LOG2E = tl.constexpr(1.4426950408889634)
# where the gates are: in pages with V' = gK gV V in the cache, in pages beside V, by position
WRITTEN, APART, POSITION = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def page_ids(p_table, i_b, i_n, i_last, BN: tl.constexpr, PAGE: tl.constexpr):
    """Pages of the keys i_n up to i_n + BN: a scalar where a page holds whole tiles, else [BN]. Keys beyond i_last have
    its page. PAGE = 0: no pages, the batch entry."""
    if PAGE == 0:
        return i_b
    elif PAGE % BN == 0:
        return tl.load(p_table + tl.minimum(i_n, i_last) // PAGE)
    else:
        return tl.load(p_table + tl.minimum(i_n + tl.arange(0, BN), i_last) // PAGE)


@triton.jit
def slot_rows(p_x, b_page, i_n, stride_p, stride_n, BN: tl.constexpr, PAGE: tl.constexpr):
    """A pointer, and from there the offsets [BN] of the slots of the keys i_n up to i_n + BN.

    Offsets that do not change in the loop are int32, behind a scalar base, wherever a page holds whole tiles.
    """
    o_n = tl.arange(0, BN)
    if PAGE == 0:
        return p_x + (b_page.to(tl.int64) * stride_p + i_n.to(tl.int64) * stride_n), o_n * stride_n
    elif PAGE % BN == 0:
        return p_x + (b_page.to(tl.int64) * stride_p + (i_n % PAGE) * stride_n), o_n * stride_n
    elif BN % PAGE == 0:
        return p_x, b_page.to(tl.int64) * stride_p + o_n % PAGE * stride_n
    else:
        return p_x, b_page.to(tl.int64) * stride_p + (i_n + o_n) % PAGE * stride_n


@triton.jit
def load_rows_of_slots(p_x, o_rows, m_n, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """[BN, BD] tile of the rows o_rows [BN]; columns from D on, and with MASKED rows outside of m_n [BN], are 0."""
    o_d = tl.arange(0, BD)
    if o_rows.dtype == tl.int64:
        p_tile = (p_x + o_rows)[:, None] + o_d[None, :]
    else:
        p_tile = p_x + (o_rows[:, None] + o_d[None, :])
    if BD > D:
        m_tile = (m_n[:, None] & (o_d < D)[None, :]) if MASKED else (o_d < D)[None, :]
        return tl.load(p_tile, mask=m_tile, other=0.0)
    elif MASKED:
        return tl.load(p_tile, mask=m_n[:, None], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def as_operand(b_x, dtype: tl.constexpr):
    """A tile of a cache in the dtype of the products; 8 bits are exact in all of them."""
    if b_x.dtype.primitive_bitwidth == 8 and dtype == tl.bfloat16:
        # by way of fp32, as the hardware has no conversion from 8 bits to bf16
        return b_x.to(tl.float32).to(dtype)
    else:
        return b_x.to(dtype)


@triton.jit
def load_slots(slots, i_kv, b_page, i_n, m_n, BN: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """[BN] of `Slots` at the keys i_n up to i_n + BN; with MASKED 0 outside of m_n [BN]."""
    p_slots, o_slots = slot_rows(slots.ptr + i_kv * slots.h, b_page, i_n, slots.p, slots.n, BN, PAGE)
    return tl.load(p_slots + o_slots, mask=m_n, other=0) if MASKED else tl.load(p_slots + o_slots)


@triton.jit
def add_weighted(b_p, b_v, b_acc, LARGE: tl.constexpr, QUANTISED: tl.constexpr):
    """[BM, BD] fp32: b_acc + b_p b_v, with b_p [BM, BN] rounded to the dtype of b_v [BN, BD].

    LARGE: b_p holds factors of values; QUANTISED: scales, which may also be so small that fp16 loses them.
    """
    if QUANTISED and b_v.dtype == tl.float16:
        b_top = tl.log2(tl.maximum(tl.max(tl.abs(b_p), 1), 1e-30))
        b_shift = tl.minimum(tl.maximum(tl.ceil(b_top) - 15, -120.0), 120.0)
        b_p = (b_p * tl.exp2(-b_shift)[:, None]).to(tl.float16)
        return b_acc + tl.dot(b_p, b_v, input_precision="ieee") * tl.exp2(b_shift)[:, None]
    else:
        return add_product(b_p, b_v, b_acc, LARGE)


@triton.jit
def attend(
    state, b_q, cache, slot_gate, gate_k, gate_v, token_scales, logits, lengths, i_b, i_head, i_kv, i_start, i_end,
    i_last, o_position, window, zero, D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, FORM: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys i_start up to i_end of one KV head, a tile at a time, into the running softmax of BM packed rows.

    state: b_acc [BM, BD], b_sum [BM], b_max [BM], see `softmax_step`. b_q [BM, BD]: the rows' queries, o_position [BM]
    where they stand; i_last: the sequence's last key; i_head: the planned head, i_kv that of the cache. MASKED: some
    pair of a tile may be hidden. zero: 0, for addresses. Other arguments are those of `paged_kernel`.
    """
    BN: tl.constexpr = TILE.keys
    BD: tl.constexpr = b_q.shape[1]
    b_acc, b_sum, b_max = state
    p_k = cache.k + i_kv * cache.h
    stride_p, stride_h, stride_n = (cache.p, cache.h, cache.n) if cache.of_v is None else cache.of_v
    p_v = cache.v + i_kv * stride_h
    p_table = lengths.table + i_b * (lengths.row >> 1) if lengths.table is not None else None
    b_next = page_ids(p_table, i_b, i_start, i_last, BN, PAGE)
    for i_n in tl.range(i_start, i_end, BN, num_stages=TILE.stages):
        i_n = tl.multiple_of(i_n, BN)
        i_slot = tl.multiple_of(i_n + zero, BN)
        # ids a tile ahead, carried as they were loaded: used or converted at once they take the stages from K and V
        b_page = b_next
        if PAGE > 0:
            b_next = page_ids(p_table, i_b, i_slot + BN, i_last, BN, PAGE)
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < i_end
        if lengths.seen is not None:
            m_n = m_n & (tl.load(lengths.seen + i_b * (lengths.seen_row >> 1) + o_n, mask=m_n, other=0) != 0)
        p_rows, o_rows = slot_rows(p_k, b_page, i_slot, cache.p, cache.n, BN, PAGE)
        # [BM, BN] = [BM, BD] [BD, BN]
        b_k = load_rows_of_slots(p_rows, o_rows, m_n, D, BD, MASKED)
        # [BN]
        b_bias = None
        b_weight = None
        b_gain = None
        b_scale = None
        if FORM == WRITTEN:
            b_weight = load_slots(slot_gate, i_kv, b_page, i_slot, m_n, BN, PAGE, MASKED)
        elif FORM == APART:
            b_pair = load_slots(slot_gate, i_kv, b_page, i_slot, m_n, BN, PAGE, MASKED)
            b_bias = b_pair.to(tl.int32).to(tl.float32, bitcast=True)
            b_gain = (b_pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        elif FORM == POSITION:
            if gate_k is not None:
                b_bias = load_raw_gate(gate_k, i_b, i_head, o_n.to(tl.int64), m_n, 0.0) * LOG2E
            if gate_v is not None:
                b_gain = load_raw_gate(gate_v, i_b, i_head, o_n.to(tl.int64), m_n, 1.0)
        if token_scales is not None:
            b_scale = load_slots(token_scales.k, i_kv, b_page, i_slot, m_n, BN, PAGE, MASKED)
            if token_scales.v is not None:
                b_scale_v = load_slots(token_scales.v, i_kv, b_page, i_slot, m_n, BN, PAGE, MASKED)
                b_gain = b_scale_v if b_gain is None else b_gain * b_scale_v
        b_s = tl.dot(b_q, as_operand(b_k, b_q.dtype).T, input_precision="ieee")
        m_pairs = None
        if MASKED:
            m_pairs = m_n[None, :]
            if CAUSAL:
                m_pairs = m_pairs & (o_n[None, :] <= o_position[:, None])
            if window is not None:
                m_pairs = m_pairs & (o_n[None, :] > o_position[:, None] - window)
        b_p, b_decay, b_max, b_sum = softmax_step(
            b_s, b_max, b_sum, logits, b_scale, b_bias, b_weight, m_pairs, b_q.dtype == tl.float32
        )
        if b_gain is not None:
            b_p *= b_gain[None, :]
        # [BM, BD] += [BM, BN] [BN, BD]
        p_rows, o_rows = slot_rows(p_v, b_page, i_slot, stride_p, stride_n, BN, PAGE)
        b_v = as_operand(load_rows_of_slots(p_rows, o_rows, m_n, D, BD, MASKED), b_q.dtype)
        b_acc = add_weighted(b_p, b_v, b_acc * b_decay[:, None], b_gain is not None, token_scales is not None)
    return b_acc, b_sum, b_max


@triton.jit
def store_rows(out, lse, b_out, b_lse, i_b, o_m, o_h, m_r, D: tl.constexpr):
    """The results of packed rows [BM]: b_out [BM, BD] to `out`, b_lse [BM] (base 2) to `lse` (None: nowhere)."""
    o_d = tl.arange(0, b_out.shape[1])
    p_out = out.ptr + i_b * out.b + o_m * out.n + o_h * out.h
    tl.store(p_out[:, None] + o_d[None, :], b_out.to(out.ptr.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])
    if lse is not None:
        p_lse = lse.ptr + i_b * (lse.b >> 1) + o_m * (lse.n >> 1) + o_h * (lse.h >> 1)
        tl.store(p_lse, b_lse * LN2, mask=m_r)


@triton.jit
def with_sinks(b_acc, b_sum, b_max, sinks, o_h, m_r):
    """The running softmax of packed rows after one more logit for each head, of value 0; None: none."""
    if sinks is not None:
        b_sink = tl.load(sinks + o_h, mask=m_r, other=float("-inf")).to(tl.float32) * LOG2E
        b_top = tl.maximum(b_max, b_sink)
        b_decay = tl.exp2(b_max - b_top)
        b_sum = b_sum * b_decay + tl.exp2(b_sink - b_top)
        b_acc = b_acc * b_decay[:, None]
        b_max = b_top
    return b_acc, b_sum, b_max


@triton.jit(do_not_specialize=["window"])
def paged_kernel(
    q, cache, slot_gate, gate_k, gate_v, scales, token_scales, sinks, out, lse, lengths, plan, parts, logits, sizes,
    shares, window, D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, FORM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: the pieces that the work list gives it.

    q, out, lse: `Rows` of (Tq, Hq, D) and (Tq, Hq) fp32, rows counted through all sequences, b added for each; the
    strides of lse are `odd`, None: not wanted. cache: `Cache`, pages of PAGE keys, PAGE = 0 where it has none.
    slot_gate: `Slots` of gK (FORM WRITTEN) or of log2 gK and gV in one int64 (APART), or None; gate_k, gate_v:
    `RawGate` of log gK and of gV (POSITION), or None. scales, token_scales: `Scales` of a quantised cache, for tensors,
    or by token and head. sinks (Hq,) or None. lengths: `Lengths`; plan: `Plan`; parts: `Parts`; logits: `Logits`;
    sizes: `Sizes`; shares: `Shares`. window: keys that a query sees, None for all. A sequence longer than the cache
    allows gives NaN.
    """
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    BD: tl.constexpr = triton.next_power_of_2(D)
    EVERYWHERE: tl.constexpr = window is not None or lengths.seen is not None
    i_p = tl.program_id(0)
    n_keys = sizes.keys >> 1
    n_sequences = sizes.sequences >> 1
    # 0, but for ptxas a number of each thread: where the loop's addresses are the same for all threads, it may keep the
    # pipeline's condition so too, and copies it before each of a tile's loads (13 to 17% more instructions)
    zero = tl.max((tl.arange(0, 16) < -n_keys).to(tl.int32), 0)
    o_d = tl.arange(0, BD)
    scale_v = 1.0
    if scales is not None:
        logits = Logits(logits.scale * tl.load(scales.k), logits.cap)
        scale_v = tl.load(scales.v)
    for i_piece in tl.range(0, piece_count(plan, i_p), num_stages=1):
        p_item, i_low, i_high, live, whole = piece_of(plan, i_piece, i_p, tl.num_programs(0), BN)
        if live:
            i_b = tl.load(p_item).to(tl.int64)
            i_head = tl.load(p_item + 1).to(tl.int64)
            i_r = tl.load(p_item + 2)
            i_first = tl.load(p_item + 3)
            i_start = i_first + i_low * BN
            i_end = tl.minimum(i_first + i_high * BN, tl.load(p_item + 4))
            i_row = tl.load(p_item + 6).to(tl.int64)
            Nq = tl.load(p_item + 7)
            # rows of padding are those of one more sequence, without keys
            Nk = tl.where(i_b < n_sequences, n_keys, 0)
            if lengths.keys is not None:
                Nk = tl.load(lengths.keys + i_b, mask=i_b < n_sequences, other=0)
            fits = (Nk >= 0) & (Nk <= n_keys)
            Nk = tl.minimum(tl.maximum(Nk, 0), n_keys)
            # pages past the true length, which the table need not name, are not looked at
            i_end = tl.where(fits, i_end, i_start)
            is_padding = i_b >= n_sequences
            i_b = tl.minimum(i_b, n_sequences - 1)
            # [BM] packed rows
            o_r = i_r + tl.arange(0, BM)
            m_r = o_r < Nq * shares.group
            o_m = i_row + o_r // shares.group
            o_h = i_head * shares.group + o_r % shares.group
            o_position = o_r // shares.group + Nk - Nq
            # [BM, BD]
            p_q = q.ptr + i_b * q.b + o_m * q.n + o_h * q.h
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
            b_acc = tl.zeros([BM, BD], tl.float32)
            b_max = tl.full([BM], LOWEST, tl.float32)
            b_sum = tl.zeros([BM], tl.float32)
            # tiles that every row sees whole, then those at an edge
            i_full = i_end
            if CAUSAL:
                i_full = tl.minimum(i_end, tl.maximum(i_r // shares.group + Nk - Nq + 1, i_start))
            i_full = i_start if EVERYWHERE else i_start + (i_full - i_start) // BN * BN
            i_last = tl.maximum(Nk - 1, 0)
            if not EVERYWHERE:
                b_acc, b_sum, b_max = attend(
                    (b_acc, b_sum, b_max), b_q, cache, slot_gate, gate_k, gate_v, token_scales, logits, lengths, i_b,
                    i_head, i_head // shares.kv, i_start, i_full, i_last, o_position, window, zero, D, TILE, PAGE, FORM,
                    CAUSAL, False,
                )  # fmt: skip
            b_acc, b_sum, b_max = attend(
                (b_acc, b_sum, b_max), b_q, cache, slot_gate, gate_k, gate_v, token_scales, logits, lengths, i_b,
                i_head, i_head // shares.kv, i_full, i_end, i_last, o_position, window, zero, D, TILE, PAGE, FORM,
                CAUSAL, True,
            )  # fmt: skip
            # a length that the cache cannot hold must not give a plausible result
            b_sum = tl.where(fits, b_sum, float("nan"))
            if scales is not None:
                b_acc *= scale_v
            if whole:
                b_acc, b_sum, b_max = with_sinks(b_acc, b_sum, b_max, sinks, o_h, m_r & ~is_padding)
                b_divisor, b_lse = finish_rows(b_max, b_sum)
                store_rows(out, lse, b_acc / b_divisor[:, None], b_lse, i_b, o_m, o_h, m_r, D)
            else:
                b_divisor, b_lse = finish_rows(b_max, b_sum)
                i_slot = 2 * i_p + (i_low == 0).to(tl.int32)
                o_part = i_slot.to(tl.int64) * BM + tl.arange(0, BM)
                p_part = parts.out + o_part[:, None] * D + o_d[None, :]
                tl.store(p_part, b_acc / b_divisor[:, None], mask=m_r[:, None] & (o_d < D)[None, :])
                tl.store(parts.lse + o_part, b_lse, mask=m_r)


@triton.jit
def merge_kernel(
    sinks, out, lse, plan, parts, sizes, shares, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """One program: BR rows of the cut item that ends in run i of the work list, if there is one; grid (P, BM // BR).

    Arguments as in `paged_kernel`, BM and BN those of its tile.
    """
    i_p = tl.program_id(0)
    p_item, i_first = cut_item(plan, i_p, BN)
    i_r = tl.load(p_item + 2) + tl.program_id(1) * BR
    n_rows = tl.load(p_item + 7) * shares.group
    if (i_first < i_p) & (i_r < n_rows):
        i_b = tl.minimum(tl.load(p_item), (sizes.sequences >> 1) - 1).to(tl.int64)
        i_head = tl.load(p_item + 1).to(tl.int64)
        # [BR] packed rows
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < n_rows
        o_m = tl.load(p_item + 6).to(tl.int64) + o_r // shares.group
        o_h = i_head * shares.group + o_r % shares.group
        o_d = tl.arange(0, triton.next_power_of_2(D))
        b_acc = tl.zeros([BR, triton.next_power_of_2(D)], tl.float32)
        b_max = tl.full([BR], LOWEST, tl.float32)
        b_sum = tl.zeros([BR], tl.float32)
        for i_run in tl.range(i_first, i_p + 1):
            i_slot = part_slot(plan, i_run, i_first)
            o_part = i_slot.to(tl.int64) * BM + tl.program_id(1) * BR + tl.arange(0, BR)
            m_part = m_r & (i_slot >= 0)
            # [BR], [BR, BD]
            b_lse = tl.load(parts.lse + o_part, mask=m_part, other=float("-inf"))
            p_part = parts.out + o_part[:, None] * D + o_d[None, :]
            b_part = tl.load(p_part, mask=m_part[:, None] & (o_d < D)[None, :], other=0.0)
            b_max_new = tl.maximum(b_max, b_lse)
            b_weight = tl.exp2(b_lse - b_max_new)
            b_decay = tl.exp2(b_max - b_max_new)
            b_sum = b_sum * b_decay + b_weight
            b_acc = b_acc * b_decay[:, None] + b_part * b_weight[:, None]
            b_max = b_max_new
        b_acc, b_sum, b_max = with_sinks(b_acc, b_sum, b_max, sinks, o_h, m_r)
        b_divisor, b_lse = finish_rows(b_max, b_sum)
        store_rows(out, lse, b_acc / b_divisor[:, None], b_lse, i_b, o_m, o_h, m_r, D)
