"""The proxy of merged tokens, on one pair of clips."""

import importlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from videoanchor_triton.anchor.grouping import Group, Merge

keep_proxy: Any = importlib.import_module("benchmarks.scores.keep_proxy")


def test_it_runs(tmp_path: Path) -> None:
    """Every rule at every share, but EVS, which keeps a sixth; counts and the grouping matter."""
    assert keep_proxy.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "keep-proxy.json").read_text())["rows"]
    per_clip = 3 * len(get_args(Group)) * len(get_args(Merge)) - len(get_args(Merge))
    assert len(rows) == 2 * per_clip
    error = {(row["case"], row["keep"], row["group"], row["merge"]): row["error"] for row in rows}
    for case in ("camera", "half"):
        assert error[case, 0.25, "ward", "counts"] < error[case, 0.25, "random", "counts"]
        assert error[case, 0.25, "ward", "counts"] < 0.3 * error[case, 0.25, "ward", "mean"]
    assert (tmp_path / "keep-proxy.md").read_text().count("| ward |") == 1


def test_rotated_is_a_rotation() -> None:
    """Products of keys and queries depend on how far apart they are alone."""
    q, k = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    at = torch.randint(0, 9, (2, 5, 3), generator=torch.Generator().manual_seed(1))
    first, moved = ((keep_proxy.rotated(q, at[0] + by) * keep_proxy.rotated(k, at[1] + by)).sum(1) for by in (0, 7))
    torch.testing.assert_close(first, moved, atol=1e-4, rtol=1e-4)
    assert first.tolist() != pytest.approx((q * k).sum(1).tolist(), abs=0.1), "the check can fail"
