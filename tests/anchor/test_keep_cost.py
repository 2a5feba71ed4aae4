"""The measurement of merged tokens, at a tiny size."""

import importlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_models as tiny

from videoanchor_triton.anchor.grouping import Group

keep_cost: Any = importlib.import_module("benchmarks.scores.keep_cost")


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 merges nothing")
def test_it_runs(tmp_path: Path) -> None:
    assert keep_cost.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "keep-cost.json").read_text())["rows"]
    assert {row["group"] for row in rows if row["grouping"]} == {*get_args(Group)}
    sizes = {row["keep"]: row["kv"] for row in rows if row["kv"]}
    a_position = 4 * 2 * 2 * 64 * 4  # layers, keys and values, heads, features, bytes
    assert sizes == {keep: (7 + round(96 * keep)) * a_position for keep in (1.0, 0.5, 0.25, 0.1)}
    assert (tmp_path / "keep-cost.md").read_text().count("| 96 |") == 13


def test_large_sizes_are_grouped_and_not_scored() -> None:
    rows = list(keep_cost.grouping_rows({96: (6, 4, 4), 48: (6, 2, 4)}, 1, 48))
    assert {row.tokens for row in rows if row.scoring is None and row.share is None} == {96}
    assert {row.tokens for row in rows if row.scoring is not None and row.share == row.grouping / row.scoring} == {48}
    assert {row.tokens for row in rows if row.group == "subspace"} == {48}
