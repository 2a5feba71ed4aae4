"""A model, not a measurement, of how work lists for attention over a mixed batch compare: no GPU is used.

    python benchmarks/attention/work_list.py --out DIR [--batches a b]

"ours" is the list that kernels/plan_kernel.py makes, run in Triton's interpreter. Beside it stand other rules: cut (the
same costs in equal runs, nothing dealt whole), fit (the smallest chunk whose count fits the programs), segments (16 for
each row block) and whole (no split). Programs walk the tiles of their pieces in step, share the memory's bandwidth
and find tiles in an L2 that forgets the least recently used; what is assumed of the device is in `Machine`. The floor
is the bytes of keys and values read once, or the products at the peak. The launch that makes the list is not counted:
one serves all layers of a step, if the caller keeps it. Written are DIR/work_list.csv and .json.
"""

import argparse
import csv
import heapq
import json
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
SEGMENTS = 16


@dataclass(frozen=True)
class Machine:
    """What the model assumes of the device: an H200 in round figures, none of them measured here."""

    programs: int = 132
    bytes_per_second: float = 4.8e12
    bytes_per_second_of_a_program: float = 90e9
    flops: float = 989e12
    share_of_flops: float = 0.6
    seconds_of_a_piece: float = 1.5e-6
    seconds_of_a_launch: float = 2e-6
    l2_bytes: int = 40 * 2**20


@dataclass(frozen=True)
class Batch:
    """(queries, keys) of each sequence, 16-bit keys and values, and the tile of the kernel."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    rows: int
    tile_keys: int = 128
    kv_heads: int = 4
    group: int = 7
    head_dim: int = 128

    @property
    def tile_bytes(self) -> int:
        return self.tile_keys * self.head_dim * 4

    def floor(self, machine: Machine) -> float:
        """Seconds: keys and values read once, or the products."""
        size = sum(nk for _, nk in self.lengths) * self.kv_heads * self.head_dim * 4
        pairs = sum(nq * (nk - nq / 2) for nq, nk in self.lengths) * self.kv_heads * self.group
        return max(size / machine.bytes_per_second, 4 * pairs * self.head_dim / machine.flops)


_random = random.Random(0)
BATCHES = {
    "a": Batch("64 decodes, 1k to 128k", tuple((1, int(2 ** _random.uniform(10, 17))) for _ in range(64)), 16),
    "a2": Batch("one decode of 128k, 63 of 1k", ((1, 131072), *[(1, 1024)] * 63), 16),
    "b": Batch("one decode of 128k", ((1, 131072),), 16),
    "c": Batch("32 decodes of 8k, 4 chunks of 2k on 64k", (*[(1, 8192)] * 32, *[(2048, 65536)] * 4), 128),
    "d": Batch("30 tokens on 128k", ((30, 131072),), 128),
}


class Item(NamedTuple):
    """A row block of one KV head, and its tiles of keys."""

    sequence: int
    head: int
    row: int
    tiles: int


class Piece(NamedTuple):
    """Tiles low up to high of an item."""

    item: Item
    low: int
    high: int


Runs = list[list[Piece]]
Rule = Callable[[Batch, Machine], Runs]


def items_of(batch: Batch) -> list[Item]:
    """All row blocks of a causal batch, in the order of the work list."""
    items = []
    for sequence, (nq, nk) in enumerate(batch.lengths):
        for head in range(batch.kv_heads):
            for row in range(0, nq * batch.group, batch.rows):
                last = min((row + batch.rows - 1) // batch.group, nq - 1) + nk - nq
                items.append(Item(sequence, head, row, -(-(last + 1) // batch.tile_keys)))
    return items


def ours(batch: Batch, machine: Machine) -> Runs:
    """The work list of the kernels."""
    from videoanchor_triton.kernels.plan import make_plan

    lengths = torch.tensor(batch.lengths, dtype=torch.int32)
    queries = lengths[:, 0].tolist()
    plan = make_plan(
        torch.tensor([0, *queries]).cumsum(0).int(),
        lengths[:, 1].contiguous(),
        sequences=len(queries),
        queries=max(queries),
        total_queries=sum(queries),
        keys=int(lengths[:, 1].max()),
        kv_heads=batch.kv_heads,
        group=batch.group,
        rows=batch.rows,
        tile_keys=batch.tile_keys,
        programs=machine.programs,
        causal=True,
        window=None,
        device=torch.device("cpu"),
    )
    return pieces_of(plan, machine.programs, batch.tile_keys)


def pieces_of(plan: "tuple[torch.Tensor, torch.Tensor, torch.Tensor]", programs: int, tile_keys: int) -> Runs:
    """What each program does, in its order, as `piece_of` of the kernels reads it from a plan."""
    from videoanchor_triton.kernels.plan_kernel import OVERHEAD

    overhead = int(OVERHEAD.value)
    items, (starts, dealt) = plan[0].tolist(), (plan[1].tolist(), int(plan[2]))

    def item(i: int) -> Item:
        sequence, head, row, start, end = items[i][:5]
        return Item(sequence, head, row, -(-(end - start) // tile_keys))

    found: Runs = []
    for p in range(programs):
        (first, low), (last, high) = starts[p], starts[p + 1]
        run = [Piece(x, 0, x.tiles) for x in (item(n * programs + p) for n in range(dealt)) if x.tiles]
        # the tail of a cut item comes last
        for i in [*range(first + 1, last + 1), first]:
            before = items[i][5] + overhead
            piece = Piece(item(i), max(low - before, 0), min(max(high - before, 0), item(i).tiles))
            if piece.low < piece.high:
                run.append(piece)
        found.append(run)
    return found


def cut(batch: Batch, machine: Machine) -> Runs:
    """One stream of tiles, two more for each row block, cut into equal runs."""
    items, overhead = items_of(batch), 2
    total = sum(item.tiles + overhead for item in items)
    bounds = [p * total // machine.programs for p in range(machine.programs + 1)]
    runs: Runs = [[] for _ in range(machine.programs)]
    before, first = overhead, 0
    for item in items:
        while bounds[first + 1] <= before:
            first += 1
        for p in range(first, machine.programs):
            low, high = max(bounds[p] - before, 0), min(bounds[p + 1] - before, item.tiles)
            if bounds[p] >= before + item.tiles:
                break
            if low < high:
                runs[p].append(Piece(item, low, high))
        before += item.tiles + overhead
    return runs


def next_free(pieces: list[Piece], programs: int) -> Runs:
    """Each piece to the program that is free first."""
    heap, runs = [(0, p) for p in range(programs)], [[] for _ in range(programs)]
    for piece in pieces:
        load, p = heapq.heappop(heap)
        runs[p].append(piece)
        heapq.heappush(heap, (load + piece.high - piece.low + 1, p))
    return runs


def chunks(items: list[Item], length: int) -> list[Piece]:
    return [Piece(x, low, min(low + length, x.tiles)) for x in items for low in range(0, x.tiles, length)]


def fit(batch: Batch, machine: Machine) -> Runs:
    """Chunks of one length, the smallest of which there are no more than programs; the longest first."""
    items = items_of(batch)
    low, high = 1, max(item.tiles for item in items)
    while low < high:
        middle = (low + high) // 2
        if sum(-(-item.tiles // middle) for item in items) <= machine.programs:
            high = middle
        else:
            low = middle + 1
    return next_free(sorted(chunks(items, low), key=lambda piece: piece.low - piece.high), machine.programs)


def segments(batch: Batch, machine: Machine) -> Runs:
    """Each row block in 16."""
    pieces = [piece for item in items_of(batch) for piece in chunks([item], -(-item.tiles // SEGMENTS))]
    return next_free(pieces, machine.programs)


def whole(batch: Batch, machine: Machine) -> Runs:
    """No row block is split."""
    return next_free([Piece(item, 0, item.tiles) for item in items_of(batch)], machine.programs)


RULES: dict[str, Rule] = {"ours": ours, "cut": cut, "fit": fit, "segments": segments, "whole": whole}


@dataclass(frozen=True)
class Row:
    """What the model says of one rule: microseconds, share of the tiles that the memory is read for, cut pieces."""

    batch: str
    rule: str
    microseconds: float
    floor_microseconds: float
    of_the_floor: float
    tiles_from_memory: float
    longest_over_mean: float
    partial_results: int


def predict(batch: Batch, rule: str, machine: Machine) -> Row:
    """Walk the tiles of all programs in step."""
    runs = RULES[rule](batch, machine)
    walks = [
        [(piece.item[:2], i, i == piece.low) for piece in run for i in range(piece.low, piece.high)] for run in runs
    ]
    cache: OrderedDict[object, None] = OrderedDict()
    limit = machine.l2_bytes // batch.tile_bytes
    products = 4 * batch.rows * batch.tile_keys * batch.head_dim
    least = max(
        products / (machine.flops * machine.share_of_flops / machine.programs),
        batch.tile_bytes / machine.bytes_per_second_of_a_program,
    )
    clock, from_memory, at = [0.0] * len(walks), 0, 0
    while live := [p for p, walk in enumerate(walks) if len(walk) > at]:
        misses = 0
        for p in live:
            head, tile, _ = walks[p][at]
            key = (head, tile)
            misses += key not in cache
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > limit:
                cache.popitem(last=False)
        step = max(misses * batch.tile_bytes / machine.bytes_per_second, least)
        for p in live:
            clock[p] += step + machine.seconds_of_a_piece * walks[p][at][2]
        from_memory += misses
        at += 1
    parts = [piece.item for run in runs for piece in run if piece.high - piece.low < piece.item.tiles]
    lengths = [len(walk) for walk in walks]
    seconds = max(clock) + machine.seconds_of_a_launch
    if parts:  # partial results are written, and read by a second launch
        rows = sum(min(batch.rows, batch.lengths[x.sequence][0] * batch.group - x.row) for x in parts)
        traffic = rows * batch.head_dim * 8
        seconds += machine.seconds_of_a_launch + traffic / machine.bytes_per_second
    floor = batch.floor(machine)
    return Row(
        batch.name,
        rule,
        round(seconds * 1e6, 1),
        round(floor * 1e6, 1),
        round(seconds / floor, 3),
        round(from_memory / sum(lengths), 4),
        round(max(lengths) * machine.programs / sum(lengths), 3),
        len(parts),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    from benchmarks.helpers.environment import environment, processor

    machine, rows = Machine(), []
    for name in options.batches:
        for rule in RULES:
            row = predict(BATCHES[name], rule, machine)
            rows.append({"name": name, **asdict(row)})
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "work_list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    said = environment(torch.device("cpu"), processor())
    content = {"kind": "cost model, nothing timed", **said, "assumed": asdict(machine), "rows": rows}
    (options.out / "work_list.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
