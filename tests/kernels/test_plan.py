"""The work list against one in plain Python: every tile once, loads even, whole items in rounds."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from videoanchor_triton.kernels.plan import item_count, make_plan, plan_arguments
from videoanchor_triton.kernels.plan_kernel import (
    OVERHEAD,
    SHORTEST,
    Plan,
    cut_item,
    part_slot,
    piece_count,
    piece_of,
    plan_kernel,
)

PROGRAMS = (1, 2, 3, 5, 8, 17, 132, 264)
FAR = 2**30


@dataclass(frozen=True)
class Batch:
    """(queries, keys) of each sequence, and the rows of padding behind them."""

    lengths: tuple[tuple[int, int], ...]
    padding: int = 0
    keys: int = 4096
    kv_heads: int = 2
    group: int = 7
    rows: int = 16
    tile_keys: int = 32
    programs: int = 5
    causal: bool = True
    window: int | None = None
    packed: bool = True
    seqlens: bool = True

    @property
    def total_queries(self) -> int:
        return sum(nq for nq, _ in self.lengths) + self.padding

    def given(self) -> dict[str, Any]:
        nq = [x for x, _ in self.lengths]
        names = ("keys", "kv_heads", "group", "rows", "tile_keys", "programs", "causal", "window", "total_queries")
        return {
            "cu_seqlens_q": torch.tensor([0, *nq]).cumsum(0).int() if self.packed else None,
            "seqlens_k": torch.tensor([x for _, x in self.lengths]).int() if self.seqlens else None,
            "sequences": len(nq),
            "queries": max(nq),
            "device": torch.device("cpu"),
            **{name: getattr(self, name) for name in names},
        }

    def plan(self) -> Plan:
        return make_plan(**self.given())


def key_range(batch: Batch, row: int, nq: int, nk: int) -> tuple[int, int]:
    """Keys that the rows of an item see, the first one rounded down to a tile."""
    nk = min(max(nk, 0), batch.keys)
    first, last = row // batch.group, min((row + batch.rows - 1) // batch.group, nq - 1)
    end = min(max(last + nk - nq + 1, 0), nk) if batch.causal else nk
    start = 0 if batch.window is None else max(first + nk - nq - batch.window + 1, 0)
    return min(start // batch.tile_keys * batch.tile_keys, end), end


def expected_items(batch: Batch) -> list[tuple[int, ...]]:
    """(sequence, head, row, key start, key end, cost before, first query, queries) of each item."""
    items, cost, query = [], 0, 0
    for i, (nq, nk) in enumerate([*batch.lengths, (batch.padding, 0)]):
        for head in range(batch.kv_heads):
            for row in range(0, nq * batch.group, batch.rows):
                start, end = key_range(batch, row, nq, nk)
                items.append((i, head, row, start, end, cost, query, nq))
                cost += -(-(end - start) // batch.tile_keys) + OVERHEAD.value
        query += nq
    return items


def cost_of(item: tuple[int, ...], batch: Batch) -> int:
    return -(-(item[4] - item[3]) // batch.tile_keys) + OVERHEAD.value


def dealt_rounds(items: list[tuple[int, ...]], batch: Batch) -> int:
    """Rounds of whole items until a program would have more than its share."""
    total, load = sum(cost_of(item, batch) for item in items), [0] * batch.programs
    share = [(p + 1) * total // batch.programs - p * total // batch.programs for p in range(batch.programs)]
    for n in range(len(items) // batch.programs):
        for p in range(batch.programs):
            load[p] += cost_of(items[n * batch.programs + p], batch)
        if any(x > y for x, y in zip(load, share, strict=True)):
            return n
    return len(items) // batch.programs


@triton.jit
def read_kernel(plan, pieces, counts, cuts, programs, room, BN: tl.constexpr):
    """What a program of the other kernels sees: pieces (programs, room, 6), counts (programs,), cuts (programs, 3 + P)."""
    i_p = tl.program_id(0)
    n = piece_count(plan, i_p)
    tl.store(counts + i_p, n)
    for i_piece in range(n):
        p_item, i_low, i_high, live, whole = piece_of(plan, i_piece, i_p, programs, BN)
        p_piece = pieces + (i_p * room + i_piece) * 7
        for i_column in tl.static_range(3):
            tl.store(p_piece + i_column, tl.load(p_item + i_column))
        tl.store(p_piece + 3, i_low)
        tl.store(p_piece + 4, i_high)
        tl.store(p_piece + 5, live.to(tl.int32))
        tl.store(p_piece + 6, whole.to(tl.int32))
    p_item, i_first = cut_item(plan, i_p, BN)
    p_cut = cuts + i_p * (4 + programs)
    for i_column in tl.static_range(3):
        tl.store(p_cut + i_column, tl.load(p_item + i_column))
    tl.store(p_cut + 3, i_first)
    for i_run in range(i_first, i_p + 1):
        tl.store(p_cut + 4 + i_run, part_slot(plan, i_run, i_first))


Piece = tuple[tuple[int, ...], int, int, bool, int]  # (sequence, head, row), tiles low and high, whole, slot


def read(plan: Plan, batch: Batch) -> tuple[list[list[Piece]], dict[tuple[int, ...], list[int]]]:
    """Live pieces of each program; of each cut item the slots of its parts."""
    programs, room = batch.programs, plan.items.shape[0] + 2
    pieces = torch.zeros((programs, room, 7), dtype=torch.int32)
    counts = torch.zeros(programs, dtype=torch.int32)
    cuts = torch.full((programs, 4 + programs), -1, dtype=torch.int32)
    read_kernel[(programs,)](plan, pieces, counts, cuts, programs, room, BN=batch.tile_keys)
    found: list[list[Piece]] = []
    for p, n in enumerate(counts.tolist()):
        rows = [row for row in pieces[p, :n].tolist() if row[5]]
        found.append([((a, b, c), low, high, bool(whole), 2 * p + (low == 0)) for a, b, c, low, high, _, whole in rows])
    merges = {tuple(row[:3]): [x for x in row[4:] if x >= 0] for p, row in enumerate(cuts.tolist()) if row[3] < p}
    assert len(merges) == sum(row[3] < p for p, row in enumerate(cuts.tolist())), "an item is merged twice"
    return found, merges


def check(batch: Batch) -> None:
    plan = batch.plan()
    items, programs = expected_items(batch), batch.programs
    got = plan.items.tolist()
    assert [tuple(row) for row in got[: len(items)]] == items
    total = sum(cost_of(item, batch) for item in items)
    assert all((row[3:6], row[7]) == ([0, 0, total], 0) for row in got[len(items) :])
    dealt = plan.dealt.item()
    assert dealt == dealt_rounds(items, batch)
    pieces, merges = read(plan, batch)
    # the dealt items, whole and in order
    for p, found in enumerate(pieces):
        assert [x[0] for x in found[:dealt]] == [item[:3] for item in items[p : dealt * programs : programs]]
        assert all(x[3] for x in found[:dealt])
    # every tile of every item once
    parts: dict[tuple[int, ...], list[Piece]] = {item[:3]: [] for item in items}
    for piece in (piece for found in pieces for piece in found):
        parts[piece[0]].append(piece)
    for item in items:
        of_item = sorted(parts[item[:3]], key=lambda x: x[1])
        bounds = [(low, high) for _, low, high, _, _ in of_item]
        assert bounds[0][0] == 0 and bounds[-1][1] == cost_of(item, batch) - OVERHEAD.value
        assert all(x[1] == y[0] for x, y in zip(bounds[:-1], bounds[1:], strict=True))
        assert len(of_item) == 1 or all(low < high for low, high in bounds)
        assert all(whole == (len(of_item) == 1) for _, _, _, whole, _ in of_item)
    # cut items are merged, by one program, from the slots that their parts are in
    cut = {name: [x[4] for x in sorted(of, key=lambda x: x[1])] for name, of in parts.items() if len(of) > 1}
    assert merges == cut
    slots = [slot for of in cut.values() for slot in of]
    assert len(slots) == len(set(slots))
    # loads: of the dealt items and of the run
    runs = plan.runs[:, 1].diff().tolist()
    assert plan.runs[-1, 1] == total and min(runs) >= 0
    load = [sum(cost_of(item, batch) for item in items[p : dealt * programs : programs]) for p in range(programs)]
    rest = total - sum(load)
    short = min(SHORTEST.value, rest)
    if rest >= programs * SHORTEST.value:
        assert all(abs(x + y - total / programs) <= 1 for x, y in zip(load, runs, strict=True))
        assert dealt or min(runs) >= SHORTEST.value
    else:
        assert all(run == 0 or run >= short for run in runs)
        assert max(x + y for x, y in zip(load, runs, strict=True)) < total / programs + 2 * SHORTEST.value


def random_batch(seed: int) -> Batch:
    r = random.Random(seed)
    n = r.randint(1, 9)
    group, kv_heads = r.choice([(1, 1), (1, 4), (3, 2), (7, 2), (8, 1), (16, 1)])
    most = r.choice([300, 3000])
    kind = r.choice(["mixed", "decode", "uniform", "no lengths"])
    nk = [r.choice([0, 1, r.randint(1, 300), r.randint(1, most)]) for _ in range(n)]
    nq = [r.choice([0, 1, 1, r.randint(1, 50), r.randint(1, 200)]) for _ in range(n)]
    if kind == "decode":
        nq = [1] * n
    if kind in ("uniform", "no lengths"):
        nq = [r.choice([1, 4, 30])] * n
    if kind == "no lengths":
        nk = [most] * n
    causal = r.random() < 0.8
    return Batch(
        tuple(zip(nq, nk, strict=True)),
        padding=0 if kind in ("uniform", "no lengths") else r.choice([0, 0, 1, 9]),
        keys=most,
        kv_heads=kv_heads,
        group=group,
        rows=r.choice([16, 64, 128]),
        tile_keys=r.choice([16, 32, 128]),
        programs=r.choice(PROGRAMS),
        causal=causal,
        window=r.choice([None, None, 1, 50, FAR]) if causal else None,
        packed=kind in ("mixed", "decode"),
        seqlens=kind != "no lengths",
    )


@pytest.mark.parametrize("first", range(0, 320, 40))
def test_random_batches(first: int) -> None:
    for seed in range(first, first + 40):
        batch = random_batch(seed)
        try:
            check(batch)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {batch}") from error
