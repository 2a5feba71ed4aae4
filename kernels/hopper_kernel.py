"""Prefill for Hopper in Gluon: one warp loads by TMA, two warpgroups of BM / 2 query rows each compute.

Key tiles are visited from the last to the first, so that those that need a mask come first. K and V have a ring of
STAGES buffers each. A buffer's `ready` barrier completes when its copy has landed (the loader's one arrival and the
bytes), its `empty` barrier when both warpgroups have read it. Visit i uses stage i % STAGES for the (i // STAGES)-th
time, whose parity is the phase to wait for.

In visit i a warpgroup starts the scores of tile i and the values of tile i - 1 on the tensor cores, and takes the
softmax of tile i as soon as its scores are there, beside its own values. The warpgroups take turns in starting: 0, 1,
0, 1 and so on, so that the products of one run under the softmax of the other. Warpgroup w waits for the barrier
turns[w], at which the other arrives when it has started its products of a visit. Both make n_tiles visits, even where
the causal mask hides the last tile from the whole of warpgroup 0: a visit less, and one of them would wait for ever.

The formula is that of prefill_kernel.py, the order of the products and the turns those of FlashAttention-3 (arXiv
2407.08608).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_steps import accumulator_layout, add_columns, pack, unpack
from .steps import LN2, LOWEST

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8


class Ring(NamedTuple):
    """STAGES tiles in shared memory, [STAGES, *block], and the barriers `ready` and `empty` of each."""

    tiles: Any
    ready: Any
    empty: Any


class Shared(NamedTuple):
    """What the partitions of a program share.

    q: [2, 1, 1, BM / 2, D], the rows of each warpgroup, and `q_ready`, which completes when they have landed. k, v:
    rings of [1, 1, BN, D]. gates: [STAGES, 1, 1, BN] fp32, which come and go with the keys (without a gate: not read).
    turns: a barrier for each warpgroup.
    """

    q: Any
    q_ready: Any
    k: Ring
    v: Ring
    gates: Any
    turns: Any


class Span(NamedTuple):
    """BM query rows from i_first on, of Nq, and their visits of tiles of the Nk keys, of which the first n_masked, at
    least one, need a mask."""

    i_first: Any
    Nq: Any
    Nk: Any
    n_tiles: Any
    n_masked: Any


@gluon.jit
def make_tiles(descriptor, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor's block: [COUNT, *block]."""
    shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005 - Gluon has no starred list
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """NUMBER barriers whose phases take COUNT arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_ring(descriptor, STAGES: gl.constexpr):
    """A `Ring` of a descriptor's tiles. Its loader is one, its readers are the two warpgroups."""
    return Ring(make_tiles(descriptor, STAGES), make_barriers(STAGES, 1), make_barriers(STAGES, 2))


@gluon.jit
def await_tile(ring, i):
    """Wait until the copy of visit i's tile has landed."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.ready.index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def free_tile(ring, i):
    """This warpgroup has read visit i's tile: when both have, the loader may refill its stage."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.arrive(ring.empty.index(i % STAGES), count=1)


@gluon.jit
def await_turn(turns, i, GROUP: gl.constexpr):
    """Wait until the other warpgroup has started its products of visit i - 1, for warpgroup 1 those of visit i."""
    # the phase before the first counts as complete: warpgroup 0 begins at once
    mbarrier.wait(turns.index(GROUP), (i & 1) ^ (1 - GROUP))


@gluon.jit
def pass_turn(turns, GROUP: gl.constexpr):
    """Let the other warpgroup start products. Its barrier's phases cannot run ahead: it is this one's turn only when
    the other has used its own."""
    mbarrier.arrive(turns.index(1 - GROUP), count=1)


@gluon.jit
def load_tiles(q, k, v, gate, shared, span, i_b, i_h, groups, GATE: gl.constexpr):
    """The loader: both halves of Q's BM rows, then the key tiles of the span's visits, from the last to the first.

    q, k, v: descriptors of [1, 1, BM / 2 or BN, D] tiles; gate: of [1, 1, BN]; groups: `Groups`.
    """
    STAGES: gl.constexpr = shared.k.tiles.shape[0]
    BN: gl.constexpr = shared.k.tiles.shape[3]
    mbarrier.expect(shared.q_ready, 2 * q.block_type.nbytes)
    tma_load(q, [i_b, i_h, span.i_first, 0], shared.q_ready, shared.q.index(0))
    tma_load(q, [i_b, i_h, span.i_first + shared.q.shape[3], 0], shared.q_ready, shared.q.index(1))
    for i in range(span.n_tiles):
        i_n = (span.n_tiles - 1 - i) * BN
        stage = i % STAGES
        # the phase before the first counts as complete: the first STAGES waits pass at once
        drained = (i // STAGES) & 1 ^ 1
        k_ready = shared.k.ready.index(stage)
        mbarrier.wait(shared.k.empty.index(stage), drained)
        if GATE != 0:
            mbarrier.expect(k_ready, k.block_type.nbytes + gate.block_type.nbytes)
            tma_load(gate, [i_b, i_h // groups.gate, i_n], k_ready, shared.gates.index(stage))
        else:
            mbarrier.expect(k_ready, k.block_type.nbytes)
        tma_load(k, [i_b, i_h // groups.k, i_n, 0], k_ready, shared.k.tiles.index(stage))
        v_ready = shared.v.ready.index(stage)
        mbarrier.wait(shared.v.empty.index(stage), drained)
        mbarrier.expect(v_ready, v.block_type.nbytes)
        tma_load(v, [i_b, i_h // groups.v, i_n, 0], v_ready, shared.v.tiles.index(stage))


@gluon.jit
def start_scores(q_tile, k_tiles, i):
    """Start [rows, BN] fp32 = Q K^T of visit i, from q_tile [rows, D] and its stage of k_tiles; returned at once."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    BN: gl.constexpr = k_tiles.shape[3]
    ROWS: gl.constexpr = q_tile.shape[0]
    b_zero = gl.zeros([ROWS, BN], gl.float32, accumulator_layout(BN))
    # [rows, BN] = [rows, D] [D, BN]
    k_tile = k_tiles.index(i % STAGES).reshape([BN, q_tile.shape[1]]).permute([1, 0])
    return warpgroup_mma(q_tile, k_tile, b_zero, use_acc=False, is_async=True)


@gluon.jit
def start_values(b_pairs, v_tiles, b_acc, i):
    """Start b_acc [rows, D] += P V of visit i; returns P [rows, BN], unpacked from b_pairs, and b_acc, at once."""
    STAGES: gl.constexpr = v_tiles.shape[0]
    BN: gl.constexpr = v_tiles.shape[3]
    D: gl.constexpr = v_tiles.shape[4]
    b_p = gl.convert_layout(unpack(b_pairs, v_tiles.dtype), gl.DotOperandLayout(0, accumulator_layout(D), 2))
    # [rows, D] += [rows, BN] [BN, D]
    return b_p, warpgroup_mma(b_p, v_tiles.index(i % STAGES).reshape([BN, D]), b_acc, is_async=True)


@gluon.jit
def softmax_tile(
    b_s, b_max, b_sum, shared, span, i, o_position, scale_log2,
    GATE: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One step of the running softmax over visit i's scores b_s [rows, BN], with its gate [BN] in the form of GATE.

    b_max [rows], from LOWEST on, and b_sum [rows, 8] (shares of the sum) are the state. Frees the stage of K and of the
    gate. Returns P [rows, BN] fp32, the factor [rows] by which what came before shrinks, and the new state.
    """
    STAGES: gl.constexpr = shared.k.tiles.shape[0]
    BN: gl.constexpr = shared.k.tiles.shape[3]
    layout: gl.constexpr = accumulator_layout(BN)
    b_gate = 0.0
    if GATE != 0:
        # [1, BN]
        b_gate = shared.gates.index(i % STAGES).reshape([1, BN]).load(layout)
        # orders this read before the copy that overwrites the gate
        fence_async_shared()
    # the scores and the gate are in registers
    free_tile(shared.k, i)
    if GATE == 1:
        b_s = b_s * scale_log2 + b_gate
    if MASKED:
        o_n = (span.n_tiles - 1 - i) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
        m_pairs = (o_n < span.Nk)[None, :]
        if CAUSAL:
            m_pairs = m_pairs & (o_n[None, :] <= o_position[:, None])
        b_s = gl.where(m_pairs, b_s, float("-inf"))
    b_max_new = gl.maximum(b_max, gl.max(b_s, 1) if GATE == 1 else gl.max(b_s, 1) * scale_log2)
    b_p = gl.exp2((b_s if GATE == 1 else b_s * scale_log2) - b_max_new[:, None])
    b_decay = gl.exp2(b_max - b_max_new)
    b_sum = b_sum * gl.convert_layout(b_decay, gl.SliceLayout(1, accumulator_layout(8)))[:, None]
    if GATE == 2:
        _, b_gate = gl.broadcast(b_p, b_gate)
    b_sum = add_columns(b_sum, b_p, b_gate, GATE)
    return b_p, b_decay, b_max_new, b_sum


@gluon.jit
def attend_tiles(
    state, q_tile, shared, span, i_start, i_end, o_position, scale_log2,
    GROUP: gl.constexpr, GATE: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Visits i_start up to i_end of one warpgroup: scores of visit i beside the values of visit i - 1.

    The state is b_acc [rows, D], b_pairs [rows, BN / 2] (P of the last visit, see `pack`), b_max [rows], b_sum [rows,
    8], fp32 but for the pairs. o_position [rows]: where the queries stand among the keys.
    """
    D: gl.constexpr = shared.v.tiles.shape[4]
    b_acc, b_pairs, b_max, b_sum = state
    for i in range(i_start, i_end):
        # before the turn: nobody holds it while a copy is under way
        await_tile(shared.k, i)
        await_tile(shared.v, i - 1)
        await_turn(shared.turns, i, GROUP)
        b_s = start_scores(q_tile, shared.k.tiles, i)
        b_p, b_acc = start_values(b_pairs, shared.v.tiles, b_acc, i - 1)
        pass_turn(shared.turns, GROUP)
        # one product may still run: the values, beside the softmax
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        b_p_new, b_decay, b_max, b_sum = softmax_tile(
            b_s, b_max, b_sum, shared, span, i, o_position, scale_log2, GATE, MASKED, CAUSAL
        )
        # b_p is named so that its registers are not reused while the product reads them
        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
        free_tile(shared.v, i - 1)
        b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, accumulator_layout(D)))[:, None]
        b_pairs = pack(b_p_new, shared.v.tiles.dtype)
    return b_acc, b_pairs, b_max, b_sum


@gluon.jit
def attend_rows(
    shared, span, p_out, p_lse, stride_on, scale_log2,
    GROUP: gl.constexpr, GATE: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup GROUP: out [rows, D] and lse [rows] of its BM / 2 query rows, the first or the second half of the span.

    p_out, p_lse: of this head and batch entry.
    """
    ROWS: gl.constexpr = shared.q.shape[3]
    BN: gl.constexpr = shared.v.tiles.shape[3]
    D: gl.constexpr = shared.v.tiles.shape[4]
    s_rows: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BN))
    o_layout: gl.constexpr = accumulator_layout(D)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_tile = shared.q.index(GROUP).reshape([ROWS, D])
    i_row = span.i_first + GROUP * ROWS
    o_m = i_row + gl.arange(0, ROWS, layout=s_rows)
    o_position = o_m + (span.Nk - span.Nq)
    b_acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    b_max = gl.full([ROWS], LOWEST, gl.float32, s_rows)
    # each thread's share of a row's sum
    b_sum = gl.zeros([ROWS, 8], gl.float32, accumulator_layout(8))

    mbarrier.wait(shared.q_ready, 0)
    await_tile(shared.k, 0)
    await_turn(shared.turns, 0, GROUP)
    b_s = start_scores(q_tile, shared.k.tiles, 0)
    pass_turn(shared.turns, GROUP)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    b_p, _, b_max, b_sum = softmax_tile(b_s, b_max, b_sum, shared, span, 0, o_position, scale_log2, GATE, True, CAUSAL)
    state = (b_acc, pack(b_p, shared.v.tiles.dtype), b_max, b_sum)
    state = attend_tiles(
        state, q_tile, shared, span, 1, span.n_masked, o_position, scale_log2, GROUP, GATE, True, CAUSAL
    )
    b_acc, b_pairs, b_max, b_sum = attend_tiles(
        state, q_tile, shared, span, span.n_masked, span.n_tiles, o_position, scale_log2, GROUP, GATE, False, CAUSAL
    )
    # out of turn: nothing is left that it could lie under
    await_tile(shared.v, span.n_tiles - 1)
    b_p, b_acc = start_values(b_pairs, shared.v.tiles, b_acc, span.n_tiles - 1)
    b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])

    # a row without a visible key has sum 0: output 0, lse -inf
    b_sum = gl.convert_layout(gl.sum(b_sum, 1), s_rows)
    b_divisor = gl.convert_layout(gl.where(b_sum == 0.0, 1.0, b_sum), o_rows)
    o_row = i_row + gl.arange(0, ROWS, layout=o_rows)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    p_rows = p_out + (o_row[:, None].to(gl.int64) * stride_on + o_d[None, :])
    gl.store(p_rows, (b_acc / b_divisor[:, None]).to(shared.v.tiles.dtype), mask=(o_row < span.Nq)[:, None])
    gl.store(p_lse + o_m, (b_max + gl.log2(b_sum)) * LN2, mask=o_m < span.Nq)


@gluon.jit(do_not_specialize=["Nq", "Nk"])
def hopper_kernel(
    q,
    k,
    v,
    gate,
    out,
    lse,
    scale_log2,
    groups,
    Nq,
    Nk,
    STAGES: gl.constexpr,
    GATE: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """One program: BM query rows of one head. Descriptors: q of [1, 1, BM / 2, D], k and v of [1, 1, BN, D] tiles.

    gate: descriptor of [1, 1, BN] tiles of (B, heads, Nk) fp32, None with NO_GATE. out: `Rows` (B, Hq, Nq, D); lse
    (B, Hq, Nq) fp32, contiguous. groups: `Groups`. GATE: a form of prescale.py, not SPLIT.
    """
    # descriptors are arguments of their own: Triton's launchers do not find them within tuples
    BM: gl.constexpr = 2 * q.block_type.shape[2]
    BN: gl.constexpr = k.block_type.shape[2]
    i_m = gl.program_id(0)
    if CAUSAL:
        i_m = gl.num_programs(0) - 1 - i_m  # longest first
    i_h = gl.program_id(1)
    i_b = gl.program_id(2)

    # keys: [0, i_edge) visible to every row, [i_edge, i_end) partly visible
    i_first = i_m * BM
    position = i_first + Nk - Nq
    i_edge = Nk
    i_end = Nk
    if CAUSAL:
        i_edge = gl.minimum(Nk, gl.maximum(position + 1, 0))
        i_end = gl.minimum(Nk, gl.maximum(position + BM, 0))
    # the first tile visited is always masked; where no row sees a key it is all that is visited
    n_tiles = gl.maximum(gl.cdiv(i_end, BN), 1)
    span = Span(i_first, Nq, Nk, n_tiles, gl.maximum(n_tiles - i_edge // BN, 1))

    q_tiles = make_tiles(q, 2)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ring = make_ring(k, STAGES)
    v_ring = make_ring(v, STAGES)
    turns = make_barriers(2, 1)
    if GATE != 0:
        gate_tiles = make_tiles(gate, STAGES)
    else:
        gate, gate_tiles = k, k_ring.tiles  # not read: a partition's argument cannot be None
    shared = Shared(q_tiles, q_ready, k_ring, v_ring, gate_tiles, turns)
    # the copy engine must see the barriers as initialised
    fence_async_shared()

    p_out = out.ptr + i_b.to(gl.int64) * out.b + i_h.to(gl.int64) * out.h
    p_lse = lse + (i_b.to(gl.int64) * gl.num_programs(1) + i_h) * Nq
    gl.warp_specialize(
        [
            (attend_rows, (shared, span, p_out, p_lse, out.n, scale_log2, 0, GATE, CAUSAL)),
            (attend_rows, (shared, span, p_out, p_lse, out.n, scale_log2, 1, GATE, CAUSAL)),
            (load_tiles, (q, k, v, gate, shared, span, i_b, i_h, groups, GATE)),
        ],
        [4, 1],
        [240, 24],
    )
