"""Prefill for Hopper in Gluon: one warp loads by TMA, two warpgroups of BM / 2 query rows each compute.

Key tiles are visited from the last to the first, so that those that need a mask come first. K and V have a ring of
STAGES buffers each. A buffer's `ready` barrier completes when its copy has landed (the loader's one arrival and the
bytes), its `empty` barrier when both warpgroups have read it. Visit i uses stage i % STAGES for the (i // STAGES)-th
time, whose parity is the phase to wait for. The scores of tile i run on the tensor cores beside the values of tile
i - 1, and both beside the softmax of the other warpgroup.

The formula is that of prefill_kernel.py, the order of the products that of FlashAttention-3 (arXiv 2407.08608).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

LN2 = gl.constexpr(0.6931471805599453)
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8


@gluon.constexpr_function
def accumulator_layout(columns):
    """Layout of [rows, columns] as a warpgroup's product leaves it in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """[rows, BN] fp32 -> [rows, BN / 2] int32, pairs of 16 bits of `dtype`."""
    # a loop that carries them apart shuffles bytes in every pass
    b_even, b_odd = b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]).split()
    instruction: gl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(instruction, "=r,r,r", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(b_pairs, dtype: gl.constexpr):
    """[rows, BN / 2] pairs of 16 bits -> [rows, BN] of `dtype`: undoes `pack`."""
    b_even, b_odd = (b_pairs & 0xFFFF).to(gl.int16), (b_pairs >> 16).to(gl.int16)
    return gl.join(b_even, b_odd).reshape([b_pairs.shape[0], 2 * b_pairs.shape[1]]).to(dtype, bitcast=True)


@gluon.constexpr_function
def halves_layout(rows, columns):
    """accumulator_layout(2 * columns) of [rows, columns, 2], the two halves side by side in a thread's registers."""
    far = [[0, 2**bit, 0] for bit in range(3, columns.bit_length() - 1)]
    registers = [[0, 0, 1], [0, 1, 0], [8, 0, 0], *far]
    lanes = [[0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, columns, 2])


@gluon.jit
def halves(b_x):
    """[rows, n] -> twice [rows, n / 2]."""
    ROWS: gl.constexpr = b_x.shape[0]
    HALF: gl.constexpr = b_x.shape[1] // 2
    b_x = b_x.reshape([ROWS, 2, HALF]).permute([0, 2, 1])
    return gl.convert_layout(b_x, halves_layout(ROWS, HALF)).split()


@gluon.jit
def add_columns(b_sum, b_p, b_gate, GATE: gl.constexpr):
    """[rows, 8] += the columns of b_p [rows, n], 8 at a time, times b_gate [rows, n] where GATE is POST_EXP (2).

    A chain of FMAs in each thread, where gl.sum makes a tree.
    """
    if b_p.shape[1] > 8:
        b_p0, b_p1 = halves(b_p)
        b_gate0, b_gate1 = halves(b_gate) if GATE == 2 else (b_gate, b_gate)
        b_sum = add_columns(b_sum, b_p0, b_gate0, GATE)
        b_sum = add_columns(b_sum, b_p1, b_gate1, GATE)
    else:
        b_p = gl.convert_layout(b_p, accumulator_layout(8))
        b_sum = b_sum + (b_p * gl.convert_layout(b_gate, accumulator_layout(8)) if GATE == 2 else b_p)
    return b_sum


@gluon.jit
def make_tiles(descriptor, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor's block: [COUNT, *block]."""
    shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005 - Gluon has no starred list
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def make_ring(descriptor, STAGES: gl.constexpr):
    """Shared memory for STAGES tiles of a descriptor, and their `ready` and `empty` barriers."""
    tiles = make_tiles(descriptor, STAGES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return tiles, ready, empty


@gluon.jit
def load_tiles(
    q, k, v, gate, q_tiles, q_ready, k_ring, v_ring, i_b, i_h, i_kv, i_first, n_tiles, GATE: gl.constexpr
):  # fmt: skip
    """The loader: both halves of Q's BM rows from i_first on, then n_tiles key tiles from the last to the first.

    q, k, v: descriptors of [1, 1, BM / 2 or BN, D] tiles; gate: of [1, 1, BN]. A gate comes with its keys.
    """
    k_tiles, gate_tiles, k_ready, k_empty = k_ring
    v_tiles, v_ready, v_empty = v_ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    BN: gl.constexpr = k_tiles.shape[3]
    mbarrier.expect(q_ready, 2 * q.block_type.nbytes)
    tma_load(q, [i_b, i_h, i_first, 0], q_ready, q_tiles.index(0))
    tma_load(q, [i_b, i_h, i_first + q_tiles.shape[3], 0], q_ready, q_tiles.index(1))
    for i in range(n_tiles):
        i_n = (n_tiles - 1 - i) * BN
        stage = i % STAGES
        # the phase before the first counts as complete: the first STAGES waits pass at once
        drained = (i // STAGES) & 1 ^ 1
        mbarrier.wait(k_empty.index(stage), drained)
        if GATE != 0:
            mbarrier.expect(k_ready.index(stage), k.block_type.nbytes + gate.block_type.nbytes)
            i_row = gl.minimum(i_kv, gate.shape[1] - 1)
            tma_load(gate, [i_b, i_row, i_n], k_ready.index(stage), gate_tiles.index(stage))
        else:
            mbarrier.expect(k_ready.index(stage), k.block_type.nbytes)
        tma_load(k, [i_b, i_kv, i_n, 0], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_empty.index(stage), drained)
        mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
        tma_load(v, [i_b, i_kv, i_n, 0], v_ready.index(stage), v_tiles.index(stage))


@gluon.jit
def start_scores(q_tile, k_ring, i):
    """Start [rows, BN] fp32 = Q K^T of visit i, from q_tile [rows, D] and its stage of the ring; returned at once."""
    k_tiles, _, k_ready, _ = k_ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    BN: gl.constexpr = k_tiles.shape[3]
    ROWS: gl.constexpr = q_tile.shape[0]
    b_zero = gl.zeros([ROWS, BN], gl.float32, accumulator_layout(BN))
    # the copy of tile i must have landed
    mbarrier.wait(k_ready.index(i % STAGES), (i // STAGES) & 1)
    # [rows, BN] = [rows, D] [D, BN]
    k_tile = k_tiles.index(i % STAGES).reshape([BN, q_tile.shape[1]]).permute([1, 0])
    return warpgroup_mma(q_tile, k_tile, b_zero, use_acc=False, is_async=True)


@gluon.jit
def start_values(b_pairs, v_ring, b_acc, i):
    """Start b_acc [rows, D] += P V of visit i; returns P [rows, BN], unpacked from b_pairs, and b_acc, at once."""
    v_tiles, v_ready, _ = v_ring
    STAGES: gl.constexpr = v_tiles.shape[0]
    BN: gl.constexpr = v_tiles.shape[3]
    D: gl.constexpr = v_tiles.shape[4]
    b_p = gl.convert_layout(unpack(b_pairs, v_tiles.dtype), gl.DotOperandLayout(0, accumulator_layout(D), 2))
    # the copy of tile i must have landed
    mbarrier.wait(v_ready.index(i % STAGES), (i // STAGES) & 1)
    # [rows, D] += [rows, BN] [BN, D]
    return b_p, warpgroup_mma(b_p, v_tiles.index(i % STAGES).reshape([BN, D]), b_acc, is_async=True)


@gluon.jit
def softmax_tile(
    b_s, b_max, b_sum, k_ring, i, n_tiles, o_position, Nk, scale_log2,
    GATE: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One step of the running softmax over visit i's scores b_s [rows, BN], with its gate [BN] in the form of GATE.

    b_max [rows] and b_sum [rows, 8] (shares of the sum) are the state. Frees the stage of K and of the gate. Returns P
    [rows, BN] fp32, the factor [rows] by which what came before shrinks, and the new state.
    """
    k_tiles, gate_tiles, _, k_empty = k_ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    BN: gl.constexpr = k_tiles.shape[3]
    layout: gl.constexpr = accumulator_layout(BN)
    b_gate = 0.0
    if GATE != 0:
        # [1, BN]
        b_gate = gate_tiles.index(i % STAGES).reshape([1, BN]).load(layout)
        # orders this read before the copy that overwrites the gate
        fence_async_shared()
    # the scores and the gate are in registers: the loader may refill the stage
    mbarrier.arrive(k_empty.index(i % STAGES), count=1)
    if GATE == 1:
        b_s = b_s * scale_log2 + b_gate
    if MASKED:
        o_n = (n_tiles - 1 - i) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
        m_pairs = (o_n < Nk)[None, :]
        if CAUSAL:
            m_pairs = m_pairs & (o_n[None, :] <= o_position[:, None])
        b_s = gl.where(m_pairs, b_s, float("-inf"))
    b_max_new = gl.maximum(b_max, gl.max(b_s, 1) if GATE == 1 else gl.max(b_s, 1) * scale_log2)
    b_shift = b_max_new
    if MASKED or GATE == 1:
        # for a row that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN
        b_shift = gl.where(b_max_new == float("-inf"), 0.0, b_max_new)
    b_p = gl.exp2((b_s if GATE == 1 else b_s * scale_log2) - b_shift[:, None])
    b_decay = gl.exp2(b_max - b_shift)
    b_sum = b_sum * gl.convert_layout(b_decay, gl.SliceLayout(1, accumulator_layout(8)))[:, None]
    if GATE == 2:
        _, b_gate = gl.broadcast(b_p, b_gate)
    b_sum = add_columns(b_sum, b_p, b_gate, GATE)
    return b_p, b_decay, b_max_new, b_sum


@gluon.jit
def attend_tiles(
    b_acc, b_pairs, b_max, b_sum, q_tile, k_ring, v_ring, i_start, i_end, n_tiles, o_position, Nk, scale_log2,
    GATE: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Visits i_start up to i_end of one warpgroup: scores of visit i beside the values of visit i - 1.

    The state is b_acc [rows, D], b_max [rows], b_sum [rows, 8], all fp32, and b_pairs [rows, BN / 2], P of the last
    visit. o_position [rows]: where the queries stand among the Nk keys.
    """
    v_tiles, _, v_empty = v_ring
    STAGES: gl.constexpr = v_tiles.shape[0]
    D: gl.constexpr = v_tiles.shape[4]
    for i in range(i_start, i_end):
        b_s = start_scores(q_tile, k_ring, i)
        b_p, b_acc = start_values(b_pairs, v_ring, b_acc, i - 1)
        # one product may still run: the values, beside the softmax
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        b_p_new, b_decay, b_max, b_sum = softmax_tile(
            b_s, b_max, b_sum, k_ring, i, n_tiles, o_position, Nk, scale_log2, GATE, MASKED, CAUSAL
        )
        # b_p is named so that its registers are not reused while the product reads them
        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
        # the values of tile i - 1 are in b_acc: the loader may refill the stage
        mbarrier.arrive(v_empty.index((i - 1) % STAGES), count=1)
        b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, accumulator_layout(D)))[:, None]
        b_pairs = pack(b_p_new, v_tiles.dtype)
    return b_acc, b_pairs, b_max, b_sum


@gluon.jit
def attend_rows(
    q_tile, q_ready, k_ring, v_ring, p_out, p_lse, i_row, Nq, Nk, stride_on, n_tiles, n_masked, scale_log2,
    GATE: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: out [rows, D] and lse [rows] of the BM / 2 query rows from i_row on, in q_tile [1, 1, rows, D].

    p_out, p_lse: of this head and batch entry. Of n_tiles visits the first n_masked, at least one, need a mask.
    """
    v_tiles, _, _ = v_ring
    ROWS: gl.constexpr = q_tile.shape[2]
    BN: gl.constexpr = v_tiles.shape[3]
    D: gl.constexpr = v_tiles.shape[4]
    s_rows: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BN))
    o_layout: gl.constexpr = accumulator_layout(D)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_tile = q_tile.reshape([ROWS, D])
    o_m = i_row + gl.arange(0, ROWS, layout=s_rows)
    o_position = o_m + (Nk - Nq)
    b_acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    b_max = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    # each thread's share of a row's sum
    b_sum = gl.zeros([ROWS, 8], gl.float32, accumulator_layout(8))

    mbarrier.wait(q_ready, 0)
    b_s = warpgroup_mma_wait(0, deps=[start_scores(q_tile, k_ring, 0)])
    b_p, _, b_max, b_sum = softmax_tile(
        b_s, b_max, b_sum, k_ring, 0, n_tiles, o_position, Nk, scale_log2, GATE, True, CAUSAL
    )
    b_pairs = pack(b_p, v_tiles.dtype)
    b_acc, b_pairs, b_max, b_sum = attend_tiles(
        b_acc, b_pairs, b_max, b_sum, q_tile, k_ring, v_ring, 1, n_masked,
        n_tiles, o_position, Nk, scale_log2, GATE, True, CAUSAL,
    )  # fmt: skip
    b_acc, b_pairs, b_max, b_sum = attend_tiles(
        b_acc, b_pairs, b_max, b_sum, q_tile, k_ring, v_ring, n_masked, n_tiles,
        n_tiles, o_position, Nk, scale_log2, GATE, False, CAUSAL,
    )  # fmt: skip
    b_p, b_acc = start_values(b_pairs, v_ring, b_acc, n_tiles - 1)
    b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])

    # a row without a visible key has sum 0 and max -inf: output 0, lse -inf
    b_sum = gl.convert_layout(gl.sum(b_sum, 1), s_rows)
    b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / gl.convert_layout(b_sum, o_rows)[:, None]
    o_row = i_row + gl.arange(0, ROWS, layout=o_rows)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    p_rows = p_out + (o_row[:, None].to(gl.int64) * stride_on + o_d[None, :])
    gl.store(p_rows, b_out.to(v_tiles.dtype), mask=(o_row < Nq)[:, None])
    gl.store(p_lse + o_m, (b_max + gl.log2(b_sum)) * LN2, mask=o_m < Nq)


@gluon.jit(do_not_specialize=["Nq", "Nk", "stride_lb", "stride_lh"])
def hopper_kernel(
    q,
    k,
    v,
    gate,
    out,
    lse,
    scale_log2,
    Nq,
    Nk,
    group,
    stride_ob,
    stride_oh,
    stride_on,
    stride_lb,
    stride_lh,
    STAGES: gl.constexpr,
    GATE: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """One program: BM query rows of one head. Descriptors: q of [1, 1, BM / 2, D], k and v of [1, 1, BN, D] tiles.

    gate: descriptor of [1, 1, BN] tiles of (B, Hkv or 1, Nk) fp32, None with NO_GATE. out (B, Hq, Nq, D) has contiguous
    rows, lse (B, Hq, Nq) is fp32. group: query heads of a KV head. GATE: a form of prescale.py, not SPLIT.
    """
    BM: gl.constexpr = 2 * q.block_type.shape[2]
    BN: gl.constexpr = k.block_type.shape[2]
    i_m = gl.program_id(0)
    if CAUSAL:
        i_m = gl.num_programs(0) - 1 - i_m  # longest first
    i_h = gl.program_id(1)
    i_b = gl.program_id(2)
    i_kv = i_h // group

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
    n_masked = gl.maximum(n_tiles - i_edge // BN, 1)

    q_tiles = make_tiles(q, 2)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_tiles, k_ready, k_empty = make_ring(k, STAGES)
    v_ring = make_ring(v, STAGES)
    if GATE != 0:
        gate_tiles = make_tiles(gate, STAGES)
    else:
        gate, gate_tiles = k, k_tiles  # not read: a partition's argument cannot be None
    k_ring = (k_tiles, gate_tiles, k_ready, k_empty)  # a gate comes and goes with its keys
    # the copy engine must see the barriers as initialised
    fence_async_shared()

    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_lse = lse + i_b.to(gl.int64) * stride_lb + i_h.to(gl.int64) * stride_lh
    gl.warp_specialize(
        [
            (attend_rows, (
                q_tiles.index(0), q_ready, k_ring, v_ring, p_out, p_lse, i_first, Nq, Nk, stride_on,
                n_tiles, n_masked, scale_log2, GATE, CAUSAL,
            )),
            (attend_rows, (
                q_tiles.index(1), q_ready, k_ring, v_ring, p_out, p_lse, i_first + BM // 2, Nq, Nk, stride_on,
                n_tiles, n_masked, scale_log2, GATE, CAUSAL,
            )),
            (load_tiles, (
                q, k, v, gate, q_tiles, q_ready, k_ring, v_ring, i_b, i_h, i_kv, i_first, n_tiles, GATE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
