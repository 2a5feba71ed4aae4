"""The work list of a mixed batch, built on the device in one launch of one program, and what other kernels read from it.

The work is cut into items: BM packed rows (query, head of the group) of one KV head. An item costs its tiles of keys and
OVERHEAD. Whole items are dealt to the programs in rounds, in order, so that programs walk the same keys together and
find them in the L2, as long as none exceeds its share; what is left is one stream of costs, and each program gets a run
of it that fills its share. So an item is whole, or in the runs of consecutive programs; neither pieces nor the places
of partial results are stored.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

OVERHEAD = tl.constexpr(2)  # of an item, in tiles: its queries, its first loads, its result
SHORTEST = tl.constexpr(4)  # run, in tiles, where the rest is too little for all programs
COLUMNS = tl.constexpr(8)


class Plan(NamedTuple):
    """The work list of P programs.

    items: (n + 1, 8) int32: sequence, KV head, first packed row (query * group + head of the group), key start (a
        multiple of BN), key end (not below it), cost of all items before it, the sequence's first row of q, its
        queries. Unused ones have 0 queries and no keys; the last of all closes the costs.
    runs: (P + 1, 2) int32: the item in which a program's run begins, and the cost at which it does. It ends where the
        next one begins; it may be empty.
    dealt: (1,) int32: rounds R of whole items. Program p takes items p, p + P, ..., R of them, then its run.
    """

    items: torch.Tensor
    runs: torch.Tensor
    dealt: torch.Tensor


class Heads(NamedTuple):
    """Key heads, and query heads of each."""

    kv: int
    group: int


@triton.jit
def piece_count(plan, i_p):
    """How many pieces program i_p looks at: its dealt items, and those of its run."""
    p_run = plan.runs + 2 * i_p
    return tl.load(plan.dealt) + tl.load(p_run + 2) - tl.load(p_run) + 1


@triton.jit
def piece_of(plan, i_piece, i_p, programs, BN: tl.constexpr):
    """Piece i_piece of program i_p: (p_item, i_low, i_high, live, whole), all scalars.

    p_item points at the item's 8 columns. The piece is the tiles i_low up to i_high of the item, keys from key start +
    i_low * BN; `live`: there is something to do (an item without keys writes its empty result, once); `whole`: no other
    program has a part of the item. The partial result of a cut item goes to slot 2 * i_p + (i_low == 0): a program
    has at most one piece that is the head of a cut item, and one that is not.
    """
    p_run = plan.runs + 2 * i_p
    n_dealt = tl.load(plan.dealt)
    i_first = tl.load(p_run)
    n_run = tl.load(p_run + 2) - i_first + 1
    is_dealt = i_piece < n_dealt
    # the run's first item, perhaps the tail of a cut one, comes last: programs walk the others from their first key on
    i_rest = i_first + (i_piece - n_dealt + 1) % n_run
    p_item = plan.items + tl.where(is_dealt, i_piece * programs + i_p, i_rest) * COLUMNS
    n_tiles = tl.cdiv(tl.load(p_item + 4) - tl.load(p_item + 3), BN)
    t_item = tl.load(p_item + 5)
    t_end = n_tiles + OVERHEAD
    t_low = tl.where(is_dealt, 0, tl.maximum(tl.load(p_run + 1) - t_item, 0))
    t_high = tl.where(is_dealt, t_end, tl.minimum(tl.load(p_run + 3) - t_item, t_end))
    i_low = tl.maximum(t_low - OVERHEAD, 0)
    i_high = tl.maximum(t_high - OVERHEAD, 0)
    has_tiles = (i_high > i_low) | ((n_tiles == 0) & (t_low == 0))
    live = (tl.load(p_item + 7) > 0) & (t_high > t_low) & has_tiles
    return p_item, i_low, i_high, live, (i_low == 0) & (i_high == n_tiles)


@triton.jit
def cut_item(plan, i_p, BN: tl.constexpr):
    """The cut item that ends in the run of program i_p: (p_item, i_first), scalars; i_first == i_p: there is none.

    i_first is the program that has its first tile. The runs i_first to i_p that are not empty (`part_slot`) each have a
    part of it.
    """
    p_run = plan.runs + 2 * i_p
    p_item = plan.items + tl.load(p_run) * COLUMNS
    t_start = tl.load(p_run + 1)
    t_end = tl.load(p_run + 3)
    # where the item's tiles begin
    t_tiles = tl.load(p_item + 5) + OVERHEAD
    n_tiles = tl.cdiv(tl.load(p_item + 4) - tl.load(p_item + 3), BN)
    ends = (t_end > t_start) & (t_tiles + n_tiles <= t_end)
    t_run = tl.where(ends, t_start, t_tiles)
    i_first = i_p
    while t_run > t_tiles:
        i_first -= 1
        t_run = tl.load(plan.runs + 2 * i_first + 1)
    return p_item, i_first


@triton.jit
def part_slot(plan, i_run, i_first):
    """Where run i_run left its part of the cut item whose first tile is in run i_first; -1: the run is empty."""
    p_run = plan.runs + 2 * i_run
    return tl.where(tl.load(p_run + 3) > tl.load(p_run + 1), 2 * i_run + (i_run == i_first).to(tl.int32), -1)


@triton.jit
def upper_bound(p_values, o_x, n, STRIDE: tl.constexpr):
    """How many of n ascending values, STRIDE apart, are at most o_x; of the shape of o_x."""
    i_step = 1
    while 2 * i_step <= n:
        i_step *= 2
    o_found = tl.zeros_like(o_x)
    while i_step > 0:
        o_next = o_found + i_step
        b_value = tl.load(p_values + (o_next - 1) * STRIDE, mask=o_next <= n, other=0)
        o_found = tl.where((o_next <= n) & (b_value <= o_x), o_next, o_found)
        i_step = i_step // 2
    return o_found


@triton.jit
def rows_of_sequence(cu_seqlens_q, o_b, sequences, total_queries):
    """First query and queries of the sequences o_b [BLOCK]; `sequences` is the padding, which has the rows behind them.

    Within q whatever cu_seqlens_q holds. None: all have the same.
    """
    if cu_seqlens_q is None:
        b_nq = tl.where(o_b < sequences, total_queries // sequences, 0)
        return o_b * (total_queries // sequences), b_nq
    else:
        b_start = tl.load(cu_seqlens_q + o_b, mask=o_b <= sequences, other=0)
        b_end = tl.load(cu_seqlens_q + o_b + 1, mask=o_b < sequences, other=0)
        b_start = tl.minimum(tl.maximum(b_start, 0), total_queries)
        b_end = tl.minimum(tl.where(o_b < sequences, b_end, total_queries), total_queries)
        return b_start, tl.maximum(b_end - b_start, 0)


@triton.jit
def count_items(
    cu_seqlens_q, sequence_ends, heads, sequences, total_queries, BM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many items there are; sequence_ends (sequences + 1,): how many up to each sequence, the padding's last."""
    n_before = 0
    for i_b in tl.range(0, sequences + 1, BLOCK):
        # [BLOCK]
        o_b = i_b + tl.arange(0, BLOCK)
        _, b_nq = rows_of_sequence(cu_seqlens_q, o_b, sequences, total_queries)
        b_items = tl.where(o_b <= sequences, tl.cdiv(b_nq * heads.group, BM) * heads.kv, 0)
        tl.store(sequence_ends + o_b, n_before + tl.cumsum(b_items, 0), mask=o_b <= sequences)
        n_before += tl.sum(b_items, 0)
    return n_before


@triton.jit
def write_items(
    cu_seqlens_q, seqlens_k, plan, sequence_ends, heads, sequences, total_queries, keys, n_items, n_used, window,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write n_items + 1 items, of which n_used have work; their cost."""
    total = 0
    for i_item in tl.range(0, n_items + 1, BLOCK):
        # [BLOCK]
        o_item = i_item + tl.arange(0, BLOCK)
        m_used = o_item < n_used
        o_b = tl.minimum(upper_bound(sequence_ends, o_item, sequences + 1, 1), sequences)
        b_q, b_nq = rows_of_sequence(cu_seqlens_q, o_b, sequences, total_queries)
        if seqlens_k is None:
            b_nk = tl.where(o_b < sequences, keys, 0)
        else:
            b_nk = tl.load(seqlens_k + o_b, mask=o_b < sequences, other=0)
            b_nk = tl.minimum(tl.maximum(b_nk, 0), keys)
        b_blocks = tl.maximum(tl.cdiv(b_nq * heads.group, BM), 1)
        # which of the sequence: heads one after the other, so that programs beside one another read the same keys
        o_local = o_item - (tl.load(sequence_ends + o_b) - b_blocks * heads.kv)
        o_row = o_local % b_blocks * BM
        b_shift = b_nk - b_nq
        b_end = b_nk
        if CAUSAL:
            o_last = tl.minimum((o_row + BM - 1) // heads.group, b_nq - 1) + b_shift
            b_end = tl.minimum(tl.maximum(o_last + 1, 0), b_nk)
        b_start = tl.maximum(o_row // heads.group + b_shift - window + 1, 0) // BN * BN
        b_start = tl.where(m_used, tl.minimum(b_start, b_end), 0)
        b_end = tl.where(m_used, b_end, 0)
        b_cost = tl.where(m_used, tl.cdiv(b_end - b_start, BN) + OVERHEAD, 0)
        p_item = plan.items + o_item * COLUMNS
        m_item = o_item <= n_items
        tl.store(p_item, tl.where(m_used, o_b, sequences), mask=m_item)
        tl.store(p_item + 1, tl.where(m_used, o_local // b_blocks, 0), mask=m_item)
        tl.store(p_item + 2, tl.where(m_used, o_row, 0), mask=m_item)
        tl.store(p_item + 3, b_start, mask=m_item)
        tl.store(p_item + 4, b_end, mask=m_item)
        tl.store(p_item + 5, total + tl.cumsum(b_cost, 0) - b_cost, mask=m_item)
        tl.store(p_item + 6, tl.where(m_used, b_q, 0), mask=m_item)
        tl.store(p_item + 7, tl.where(m_used, b_nq, 0), mask=m_item)
        total += tl.sum(b_cost, 0)
    return total


@triton.jit
def deal(plan, b_share, n_used, programs, BP: tl.constexpr, ROUNDS: tl.constexpr):
    """Rounds of whole items that fit the programs' shares [BP], and the cost of them by program [BP]."""
    o_p = tl.arange(0, BP)
    o_r = tl.arange(0, ROUNDS)
    n_rounds = n_used // programs
    b_load = tl.zeros_like(b_share)
    n_dealt = 0
    i_r = 0
    while (i_r < n_rounds) & (n_dealt == i_r):
        # [ROUNDS, BP]
        m_item = (i_r + o_r < n_rounds)[:, None] & (o_p < programs)[None, :]
        p_cost = plan.items + ((i_r + o_r)[:, None] * programs + o_p[None, :]) * COLUMNS + 5
        b_cost = tl.load(p_cost + COLUMNS, mask=m_item, other=0) - tl.load(p_cost, mask=m_item, other=0)
        b_fits = (b_load[None, :] + tl.cumsum(b_cost, 0) <= b_share[None, :]).to(tl.int32)
        # [ROUNDS]: costs are positive, so no round fits behind one that does not
        b_dealt = tl.where(i_r + o_r < n_rounds, tl.min(b_fits, 1), 0)
        b_load += tl.sum(b_cost * b_dealt[:, None], 0)
        n_dealt += tl.sum(b_dealt, 0)
        i_r += ROUNDS
    return n_dealt, b_load


@triton.jit(do_not_specialize=["sequences", "total_queries", "keys", "n_items", "programs", "window"])
def plan_kernel(
    cu_seqlens_q, seqlens_k, plan, sequence_ends, heads, sequences, total_queries, keys, n_items, programs, window,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write `plan`; one program.

    cu_seqlens_q (sequences + 1,) and seqlens_k (sequences,) int32, or None where all sequences have the same queries,
    and `keys` keys; sequence_ends (sequences + 1,) int32 is scratch. plan.items has n_items + 1 rows, plan.runs
    programs + 1, of which BP > programs is a power of two. Lengths are clamped to what there is.
    """
    n_used = count_items(cu_seqlens_q, sequence_ends, heads, sequences, total_queries, BM, BLOCK)
    n_used = tl.minimum(n_used, n_items)
    tl.debug_barrier()
    total = write_items(
        cu_seqlens_q, seqlens_k, plan, sequence_ends, heads, sequences, total_queries, keys, n_items, n_used, window,
        BM, BN, CAUSAL, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    # [BP]: shares are of whole tiles and sum to the total
    o_p = tl.arange(0, BP)
    b_total = tl.zeros([BP], tl.int64) + total
    b_share_start = tl.minimum(o_p, programs) * b_total // programs
    b_share = (tl.minimum(o_p + 1, programs) * b_total // programs - b_share_start).to(tl.int32)
    n_dealt, b_load = deal(plan, b_share, n_used, programs, BP, 2048 // BP if BP < 2048 else 1)
    t_rest = tl.load(plan.items + n_dealt * programs * COLUMNS + 5)
    rest = total - t_rest
    b_cut = b_share_start - (tl.cumsum(b_load, 0) - b_load)
    if rest < programs * SHORTEST:
        # too little for runs of all programs
        n_parts = tl.maximum(rest // SHORTEST, 1)
        b_part = b_cut * n_parts // tl.maximum(rest, 1)
        if n_dealt == 0:
            # the first programs, which stand on multiprocessors of their own
            b_part = tl.minimum(o_p, n_parts).to(tl.int64)
        b_cut = b_part * rest // n_parts
    b_run = t_rest + b_cut.to(tl.int32)
    b_item = tl.minimum(upper_bound(plan.items + 5, b_run, n_used, COLUMNS), n_used) - 1
    tl.store(plan.runs + 2 * o_p, tl.maximum(b_item, 0), mask=o_p <= programs)
    tl.store(plan.runs + 2 * o_p + 1, b_run, mask=o_p <= programs)
    tl.store(plan.dealt, n_dealt)
