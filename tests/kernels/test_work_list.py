"""The cost model of the work list walks what the kernels would, and says what the work list is for."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import EDGES, read

from benchmarks.attention import work_list
from benchmarks.attention.work_list import BATCHES, RULES, Batch, Machine, items_of, pieces_of, predict

MACHINE = Machine(programs=8)


@pytest.mark.parametrize("name", ["one long behind short", "more queries than keys", "a little more than a round"])
def test_pieces_are_those_of_the_kernels(name: str) -> None:
    batch = EDGES[name]
    plan = batch.plan()
    expected = [
        [(piece[0], piece[1], piece[2]) for piece in run if piece[2] > piece[1]] for run in read(plan, batch)[0]
    ]
    found = pieces_of(plan, batch.programs, batch.tile_keys)
    assert [[(tuple(x.item[:3]), x.low, x.high) for x in run] for run in found] == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [((1, 3000), (1, 130), (1, 500)), ((40, 2000), (1, 64))], ids=["decode", "mixed"])
def test_every_rule_does_every_tile_once(lengths: tuple[tuple[int, int], ...], rule: str) -> None:
    batch = Batch("small", lengths, 16)
    pieces = [piece for run in RULES[rule](batch, MACHINE) for piece in run]
    tiles = [(piece.item, i) for piece in pieces for i in range(piece.low, piece.high)]
    assert sorted(tiles) == sorted((item, i) for item in items_of(batch) for i in range(item.tiles))


def test_a_long_sequence_is_shared() -> None:
    batch = replace(BATCHES["a2"], lengths=((1, 32768), *[(1, 1024)] * 15))
    ours, whole = (predict(batch, rule, Machine(programs=32)) for rule in ("ours", "whole"))
    assert ours.longest_over_mean < 1.15
    assert whole.longest_over_mean > 4
    assert 3 * ours.microseconds < whole.microseconds


def test_row_blocks_find_their_keys_in_the_l2() -> None:
    # 37 row blocks of one head, an L2 of 20 tiles: whole ones walk the same keys together
    batch = Batch("chunk", ((338, 8192),), 64, kv_heads=1)
    machine = replace(MACHINE, l2_bytes=20 * batch.tile_bytes)
    ours, cut = (predict(batch, rule, machine) for rule in ("ours", "cut"))
    assert ours.tiles_from_memory < 0.35 < 0.7 < cut.tiles_from_memory


def test_results_of_the_model(tmp_path: Path) -> None:
    assert work_list.main(["--out", str(tmp_path), "--batches", "b"]) == 0
    with (tmp_path / "work_list.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((tmp_path / "work_list.json").read_text())
    assert [row["rule"] for row in rows] == [row["rule"] for row in content["rows"]] == list(RULES)
    assert content["kind"] == "cost model, nothing timed"
    assert content["assumed"]["programs"] == 132
