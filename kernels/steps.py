"""Steps of a Triton tile that the attention kernels share."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# below every logit, and finite
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def load_block(p_rows, stride_n, m_tile, BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """[BN, D] tile: BN rows from p_rows on, of contiguous elements and stride_n apart.

    m_tile is broadcastable to [BN, D]; what it hides is 0. Without MASKED it is not looked at. In a loop, p_rows moves
    and the offsets from it stay the same: no address of 64 bits is computed for an element.
    """
    p_tile = p_rows + (tl.arange(0, BN)[:, None] * stride_n + tl.arange(0, D)[None, :])
    return tl.load(p_tile, mask=m_tile, other=0.0) if MASKED else tl.load(p_tile)


@triton.jit
def load_row(p_row, BN: tl.constexpr):
    """[BN] fp32: one number a key of a tile, as gates are, from p_row on.

    As a column that is summed over its one element, since Triton moves a load of fewer elements than a program has
    threads into the layout of the product that uses it. There 3.6 copies each element once for every thread, 16 copies
    a thread, and at three stages the products of sm_90 wait for one another; 3.7 needs 4 to 17 instructions more.
    """
    return tl.sum(tl.load(p_row + tl.arange(0, BN)[:, None]), 1)


@triton.jit
def visible_pairs(m_keys, o_n, o_position, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[BM, BN] or [1, BN] bool: which keys o_n [BN] of m_keys [BN] the queries at o_position [BM] may see."""
    m_pairs = m_keys[None, :]
    if CAUSAL:
        m_pairs = m_pairs & (o_n[None, :] <= o_position[:, None])
    if WINDOW:
        m_pairs = m_pairs & (o_n[None, :] > o_position[:, None] - window)
    return m_pairs


@triton.jit
def poison_rows(p_rows, stride_n, i_start, i_end, D: tl.constexpr, BM: tl.constexpr):
    """NaN in rows i_start up to i_end of p_rows, D elements each and stride_n apart, BM rows at a time."""
    # a sequence is longer than the longest that the caller named: its last rows must not look like results
    for i_m in tl.range(i_start, i_end, BM):
        o_m = i_m + tl.arange(0, BM)
        for i_d in range(D):
            tl.store(p_rows + o_m.to(tl.int64) * stride_n + i_d, float("nan"), mask=o_m < i_end)


@triton.jit
def fp16_shift(b_log2_size):
    """The least s >= 0 with which 2**(b_log2_size - s) is within fp16; at most 120, so that 2**-s is no denormal."""
    return tl.minimum(tl.maximum(tl.ceil(b_log2_size) - 15, 0.0), 120.0)


@triton.jit
def add_product(b_a, b_b, b_acc, LARGE: tl.constexpr):
    """[BM, D] fp32: b_acc + b_a b_b, with b_a [BM, BN] rounded from fp32 to the dtype of b_b [BN, D].

    Where b_a may be LARGE, each of its rows is scaled into fp16 by a power of two.
    """
    if LARGE and b_b.dtype == tl.float16:
        b_shift = fp16_shift(tl.log2(tl.max(tl.abs(b_a), 1)))
        b_a = (b_a * tl.exp2(-b_shift)[:, None]).to(tl.float16)
        b_acc += tl.dot(b_a, b_b, input_precision="ieee") * tl.exp2(b_shift)[:, None]
    else:
        b_acc = tl.dot(b_a.to(b_b.dtype), b_b, b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def soft_capped(b_s, cap, scale, EXACT: tl.constexpr):
    """cap * tanh(scale * b_s / cap) of a tile of products of any shape.

    Within a rounding of the cap (fp32), for queries of 16 bits. EXACT: within a rounding of the result.
    """
    if EXACT:
        b_x = b_s * (scale / cap)
        b_decay = tl.exp2(tl.abs(b_x) * -2.8853900817779268)
        b_tanh = (1.0 - b_decay) / (1.0 + b_decay)
        b_square = b_x * b_x
        # where 1 - exp2 would cancel
        b_series = b_x * (1.0 - b_square * (1 / 3 - b_square * (2 / 15 - b_square * (17 / 315))))
        b_s = cap * tl.where(b_square < 0.01, b_series, tl.where(b_x < 0, -b_tanh, b_tanh))
    else:
        # tanh.approx is half as long, and off by 2**-11 of a logit: more than the roundings of 16 bits
        b_s = cap - 2.0 * cap / (1.0 + tl.exp2(b_s * (scale * 2.8853900817779268 / cap)))
    return b_s


@triton.jit
def softmax_step(b_s, b_max, b_sum, logits, b_scale, b_bias, b_weight, m_pairs, EXACT: tl.constexpr):
    """Take a tile of products q.k into the running softmax: the step that all attention kernels share.

    Args:
        b_s: [BM, BN] fp32 products. May hold anything where m_pairs hides them, NaN too.
        b_max: [BM] fp32, the running maximum of the logits in base 2. It begins at LOWEST, not at -inf, so that no
            difference is inf - inf.
        b_sum: [BM] fp32, the running sum of the weights (times b_weight). It begins at 0.
        logits: `operands.Logits`: scale > 0 and softcap (None: none), both times log2 e.
        b_scale: [BN] fp32, factors of the products beside logits.scale (scales of quantised keys), or None.
        b_bias: [BN] fp32, terms of the logits in base 2, -inf hides a key (log2 gamma_k), or None.
        b_weight: [BN] fp32, factors of the row sum alone (gamma_k where V' = gamma_k gamma_v V), or None.
        m_pairs: broadcastable to [BM, BN] bool, which pairs are visible, or None where all are.
        EXACT: the softcap is exact to fp32, for fp32 queries.

    Returns:
        b_p [BM, BN] fp32, the weights, at most 1; b_decay [BM] fp32, by which what has been summed shrinks; and the new
        b_max and b_sum. A row that has seen no key has b_max = LOWEST and b_sum = 0: see `finish_rows`.
    """
    # the scale waits until the maximum is known, and is then the factor of an FMA
    LATE: tl.constexpr = b_scale is None and b_bias is None and logits.cap is None
    scale = logits.scale
    if b_scale is not None:
        b_s *= b_scale[None, :]
    if logits.cap is not None:
        b_s = soft_capped(b_s, logits.cap, scale, EXACT)
    elif not LATE:
        b_s *= scale
    if b_bias is not None:
        b_s += b_bias[None, :]
    if m_pairs is not None:
        # a select, since a hidden pair's product may be NaN
        b_s = tl.where(m_pairs, b_s, float("-inf"))
    if LATE:
        b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_max_new[:, None])
    else:
        b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_max_new[:, None])
    b_decay = tl.exp2(b_max - b_max_new)
    b_sum = b_sum * b_decay + tl.sum(b_p if b_weight is None else b_p * b_weight[None, :], 1)
    return b_p, b_decay, b_max_new, b_sum


@triton.jit
def finish_rows(b_max, b_sum):
    """[BM] what the sums of values are to be divided by, and [BM] the lse in base 2, of what `softmax_step` left.

    Rows that have seen no key: 1 and -inf.
    """
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_divisor, tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_divisor))
