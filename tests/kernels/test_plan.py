"""The work list against one in plain Python: every tile once, loads even, whole items in rounds."""

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from videoanchor_triton.kernels import plan_kernel as plan_module
from videoanchor_triton.kernels.plan import item_count, make_plan, plan_arguments
from videoanchor_triton.kernels.plan_kernel import (
    OVERHEAD,
    SHORTEST,
    Plan,
    cut_item,
    part_slot,
    piece_count,
    piece_of,
)

PROGRAMS = (1, 2, 3, 5, 5, 8)
MANY = {7: 17, 58: 132, 109: 264}  # by seed: slow in the interpreter
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
    """What a program of the other kernels sees: pieces (P, room, 7), counts (P,), cuts (P, 4 + P)."""
    i_p = tl.program_id(0)
    n = piece_count(plan, i_p)
    tl.store(counts + i_p, n)
    for i_piece in range(n):
        p_item, i_low, i_high, live, whole = piece_of(plan, i_piece, i_p, programs, BN)  # pyright: ignore
        p_piece = pieces + (i_p * room + i_piece) * 7
        for i_column in range(3):
            tl.store(p_piece + i_column, tl.load(p_item + i_column))
        tl.store(p_piece + 3, i_low)
        tl.store(p_piece + 4, i_high)
        tl.store(p_piece + 5, live.to(tl.int32))
        tl.store(p_piece + 6, whole.to(tl.int32))
    p_item, i_first = cut_item(plan, i_p, BN)
    p_cut = cuts + i_p * (4 + programs)
    for i_column in range(3):
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
    launch: Any = read_kernel[(programs,)]
    launch(plan, pieces, counts, cuts, programs, room, BN=batch.tile_keys)
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
    dealt = int(plan.dealt)
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
        assert bounds[0][0] == 0
        assert bounds[-1][1] == cost_of(item, batch) - OVERHEAD.value
        assert all(x[1] == y[0] for x, y in pairwise(bounds))
        assert len(of_item) == 1 or all(low < high for low, high in bounds)
        assert all(whole == (len(of_item) == 1) for _, _, _, whole, _ in of_item)
    # cut items are merged, by one program, from the slots that their parts are in
    cut = {name: [x[4] for x in sorted(of, key=lambda x: x[1])] for name, of in parts.items() if len(of) > 1}
    assert merges == cut
    slots = [slot for of in cut.values() for slot in of]
    assert len(slots) == len(set(slots))
    # loads: of the dealt items and of the run
    runs = plan.runs[:, 1].diff().tolist()
    assert plan.runs[-1, 1] == total
    assert min(runs) >= 0
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
        programs=MANY.get(seed) or r.choice(PROGRAMS),
        causal=causal,
        window=r.choice([None, None, 1, 50, FAR]) if causal else None,
        packed=kind in ("mixed", "decode"),
        seqlens=kind != "no lengths",
    )


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_batches(first: int) -> None:
    for seed in range(first, first + 40):
        batch = random_batch(seed)
        try:
            check(batch)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {batch}") from error


EDGES = {
    "nothing": Batch(((0, 0), (0, 9)), programs=3),
    "padding alone": Batch(((0, 5),), padding=3),
    "no keys": Batch(((1, 0), (4, 0)), padding=2),
    "more queries than keys": Batch(((90, 3), (5, 4)), rows=64),
    "beyond the capacity": Batch(((1, 9000), (1, -4), (3, 2**31 - 1), (1, -(2**31))), keys=500),
    "one long among short": Batch(((1, 4000), *[(1, 64)] * 30), programs=8),
    "one long behind short": Batch((*[(1, 64)] * 30, (1, 4000)), programs=8),
    "fewer tiles than programs": Batch(((1, 300),), kv_heads=1, programs=40),
    "cut within an empty item": Batch(((1, 39 * 32), *[(1, 0)] * 21), kv_heads=1),
    "a little more than a round": Batch(((1, 2000),) * 9, kv_heads=1, programs=8),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    check(EDGES[name])


def test_equal_items_are_not_cut() -> None:
    """A batch whose items fill the programs evenly needs no merge."""
    batch = Batch(((1, 1000),) * 12, kv_heads=2, programs=8, packed=False)
    plan = batch.plan()
    assert plan.dealt.item() == 3
    pieces, merges = read(plan, batch)
    assert [len(x) for x in pieces] == [3] * 8
    assert not merges


def test_short_rest_is_left_to_few() -> None:
    """Without a dealt round the first programs share it; none gets less than SHORTEST."""
    runs = EDGES["fewer tiles than programs"].plan().runs[:, 1].diff()
    assert runs[runs > 0].tolist() == [4, 4, 4]
    assert (runs[:3] > 0).all()


def test_lengths_that_are_out_of_order_stay_within_q() -> None:
    batch = Batch(((5, 50), (5, 50), (5, 50)), padding=1)
    given: dict[str, Any] = batch.given()
    given["cu_seqlens_q"] = torch.tensor([7, -3, 2**31 - 1, 4], dtype=torch.int32)
    plan = make_plan(**given)
    n_items = item_count(3, 16, 2, 7, 16, packed=True)
    assert plan.items.shape == (n_items + 1, 8)
    items = plan.items[:-1]
    assert (items[:, 6] >= 0).all()
    assert (items[:, 6] + items[:, 7] <= 16).all()
    assert (items[:, 7] >= 0).all()
    assert (items[:, 3] >= 0).all()
    assert (items[:, 3] <= items[:, 4]).all()
    assert (items[:, 4] <= 50 * 100).all()
    assert (plan.runs[:, 0] >= 0).all()
    assert (plan.runs[:, 0] <= n_items).all()


def test_costs_that_31_bits_hold() -> None:
    """Costs near the limit are exact; beyond it the call raises before anything is allocated."""
    long = Batch(((1, 2**30), (1, 2**30), (1, 2**30)), keys=2**30, kv_heads=20, group=1, tile_keys=32, programs=7)
    plan = long.plan()
    total = int(plan.runs[-1, 1])
    assert total == 60 * (2**25 + 2)
    assert (plan.runs[:, 1].diff() + 8 * (2**25 + 2) - total / 7).abs().max() <= 1
    given: dict[str, Any] = long.given()
    given["tile_keys"] = 16
    with pytest.raises(ValueError, match="less than 2\\*\\*31 tiles of keys, got up to"):
        plan_arguments(**{name: value for name, value in given.items() if name != "queries"})


def test_nothing_that_grows_with_a_batch_is_specialised() -> None:
    """So that no length compiles the kernel again."""
    given = EDGES["no keys"].given()
    arguments = plan_arguments(**{name: value for name, value in given.items() if name != "queries"})
    scalars = {name for name, value in arguments.items() if type(value) is int and name.islower()} - {"num_warps"}
    source = Path(plan_module.__file__).read_text(encoding="utf-8")
    assert scalars == set(re.findall(r'"(\w+)"', re.findall(r"do_not_specialize=\[(.*?)\]", source)[0]))
