"""Writing a step's keys, values and gates into the slots of a paged cache."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gates import POST_EXP_LIMIT, post_exp_bounds

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(POST_EXP_LIMIT)
LOG_LIMIT = tl.constexpr(post_exp_bounds(True)[1])
INFINITY = tl.constexpr(float("inf"))
# the smallest scale: a row of zeros is divided by it
LEAST_SCALE = tl.constexpr(2.0**-126)
# added to an fp32 number below 2**22 and taken off again, it leaves the nearest integer, to even
ROUNDING = tl.constexpr(1.5 * 2.0**23)


class Tokens(NamedTuple):
    """Keys and values (T, Hkv, D) of a step: strides of tokens and heads, contiguous rows."""

    k: torch.Tensor
    v: torch.Tensor
    k_n: int
    k_h: int
    v_n: int
    v_h: int


class Gammas(NamedTuple):
    """gamma_k (or its natural logarithm) and gamma_v, (T, heads) by strides, of any floating dtype, or None."""

    k: torch.Tensor | None
    v: torch.Tensor | None
    k_n: int
    k_h: int
    v_n: int
    v_h: int


@triton.jit
def gate_of_values(gammas, o_gate, m_t, BT: tl.constexpr):
    """[BT] fp32: gamma_v of the tokens m_t, at o_gate [BT] int64; NaN where it is not finite."""
    if gammas.v is None:
        return tl.full([BT], 1.0, tl.float32)
    b_gain = tl.load(gammas.v + o_gate, mask=m_t, other=1.0).to(tl.float32)
    return tl.where(tl.abs(b_gain) < INFINITY, b_gain, float("nan"))


@triton.jit
def gate_of_keys(gammas, o_gate, m_t, BT: tl.constexpr, LOG: tl.constexpr, WRITTEN: tl.constexpr):
    """[BT] fp32: gamma_k where WRITTEN, else its log2, of the tokens m_t; NaN where the form cannot hold it.

    o_gate [BT] int64 offsets. LOG: the tensor holds natural logarithms.
    """
    if gammas.k is None:
        return tl.full([BT], 1.0 if WRITTEN else 0.0, tl.float32)
    b_gate = tl.load(gammas.k + o_gate, mask=m_t, other=0.0 if LOG else 1.0).to(tl.float32)
    if WRITTEN:
        if LOG:
            m_held = tl.abs(b_gate) <= LOG_LIMIT
            b_gate = tl.exp(b_gate)
        else:
            m_held = (b_gate >= 1.0 / LIMIT) & (b_gate <= LIMIT)
    else:
        b_gate = b_gate * LOG2E if LOG else tl.log2(b_gate)
        m_held = b_gate < INFINITY
    return tl.where(m_held, b_gate, float("nan"))


@triton.jit
def scale_of_rows(b_x, TOP: tl.constexpr):
    """[BT] fp32: what rows [BT, BD] are divided by so that TOP holds them; NaN where an element is not finite."""
    return tl.maximum(tl.max(tl.abs(b_x), 1) / TOP, LEAST_SCALE) + tl.sum(b_x * 0.0, 1)


@triton.jit
def stored(b_x, dtype: tl.constexpr, TOP: tl.constexpr):
    """Numbers of any shape as a cache of `dtype` holds them: rounded to nearest even, a quantised one within TOP."""
    if TOP > 0:
        # not by minimum and maximum, which lose NaN
        b_x = tl.where(b_x > TOP, TOP, tl.where(b_x < -TOP, -TOP, b_x))
        if dtype == tl.int8:
            b_x = (b_x + ROUNDING) - ROUNDING
    return b_x.to(dtype)


@triton.jit(do_not_specialize=["T", "n_slots"])
def write_kernel(
    tokens,
    k_pages,
    v_pages,
    slots,
    gammas,
    gate,
    k_scale,
    v_scale,
    T,
    n_slots,
    Hkv,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    PAGE: tl.constexpr,
    WRITTEN: tl.constexpr,
    LOG: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TOP: tl.constexpr,
):
    """One program: BT tokens of one KV head into their slots; grid (blocks of tokens * Hkv,).

    tokens: Tokens (T, Hkv, D). k_pages, v_pages: Rows (P, Hkv, PAGE, D) of the tokens' dtype, or quantised, their
    largest number TOP (else 0). slots (T,): PAGE * page + row; those outside of 0 and n_slots are left out.
    gate: None, or Rows of (P, H, PAGE) fp32 that get gamma_k where WRITTEN, else of (P, H, PAGE, 2) that get
    log2 gamma_k and gamma_v (times the scale of V's row where PER_TOKEN); Rows.h is 0 where the heads share it.
    gammas: Gammas, gamma_k's natural logarithms where LOG. k_scale, v_scale: None, or Rows of (P, Hkv, PAGE) fp32 that
    are written where PER_TOKEN, else of one element that is read. BD >= D: columns of a tile.
    """
    i_h = (tl.program_id(0) % Hkv).to(tl.int64)
    # [BT] tokens, their slots
    o_t = tl.program_id(0) // Hkv * BT + tl.arange(0, BT)
    b_slot = tl.load(slots + o_t, mask=o_t < T, other=-1).to(tl.int64)
    m_t = (b_slot >= 0) & (b_slot < n_slots)
    o_t = o_t.to(tl.int64)
    o_page = b_slot // PAGE
    o_row = b_slot % PAGE
    o_d = tl.arange(0, BD)[None, :]
    m_tile = m_t[:, None] & (o_d < D)
    # [BT, BD]
    b_k = tl.load(tokens.k + (o_t * tokens.k_n + i_h * tokens.k_h)[:, None] + o_d, mask=m_tile, other=0.0)
    b_v = tl.load(tokens.v + (o_t * tokens.v_n + i_h * tokens.v_h)[:, None] + o_d, mask=m_tile, other=0.0)

    # [BT]
    b_gain = tl.full([BT], 1.0, tl.float32)
    if gate is not None:
        b_gate = gate_of_keys(gammas, o_t * gammas.k_n + i_h * gammas.k_h, m_t, BT, LOG, WRITTEN)
        b_gain = gate_of_values(gammas, o_t * gammas.v_n + i_h * gammas.v_h, m_t, BT)
        if WRITTEN:
            b_v = b_v.to(tl.float32) * (b_gate * b_gain)[:, None]
            b_gate += b_gain * 0.0

    if TOP > 0:
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)
        if PER_TOKEN:
            b_k_scale = scale_of_rows(b_k, TOP)
            b_v_scale = scale_of_rows(b_v, TOP)
            tl.store(k_scale.ptr + o_page * k_scale.b + i_h * k_scale.h + o_row * k_scale.n, b_k_scale, mask=m_t)
            tl.store(v_scale.ptr + o_page * v_scale.b + i_h * v_scale.h + o_row * v_scale.n, b_v_scale, mask=m_t)
            b_k = b_k / b_k_scale[:, None]
            b_v = b_v / b_v_scale[:, None]
            b_gain *= b_v_scale
        else:
            b_k = b_k / tl.load(k_scale.ptr)
            b_v = b_v / tl.load(v_scale.ptr)
    p_k = k_pages.ptr + (o_page * k_pages.b + i_h * k_pages.h + o_row * k_pages.n)[:, None] + o_d
    p_v = v_pages.ptr + (o_page * v_pages.b + i_h * v_pages.h + o_row * v_pages.n)[:, None] + o_d
    tl.store(p_k, stored(b_k, k_pages.ptr.dtype.element_ty, TOP), mask=m_tile)
    tl.store(p_v, stored(b_v, v_pages.ptr.dtype.element_ty, TOP), mask=m_tile)
    if gate is not None:
        # heads that share a gate would all write the same
        m_t = m_t & ((gate.h != 0) | (i_h == 0))
        p_gate = gate.ptr + o_page * gate.b + i_h * gate.h + o_row * gate.n
        tl.store(p_gate, b_gate, mask=m_t)
        if not WRITTEN:
            tl.store(p_gate + 1, b_gain, mask=m_t)
