"""`videoanchor viz` on a run of other backbones than that of the demo."""

import json
from pathlib import Path

import pytest
from test_viz import FIGURES, OVERLAYS, TABLES, moving_pattern, rows_of
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.app import cli
from videoanchor_triton.app.video.reader import write_video


@pytest.mark.parametrize(("name", "n_extra"), [("internvl", 0), ("llava_onevision", 1)])
def test_another_backbone(name: str, n_extra: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A square of tokens a frame; LLaVA-OneVision puts a token of no place behind them."""
    save_checkpoint(name, tmp_path / "checkpoint")
    write_video(tmp_path / "clip.mp4", moving_pattern(20, 32, 48), fps=5)
    files = ("run", "--model", tmp_path / "checkpoint", "--video", tmp_path / "clip.mp4", "--out", tmp_path / "run")
    gate = ("--question", "word5 word6", "--alpha-k", "2", "--alpha-v", "1", "--max-frames", "6", "--n-clusters", "4")
    assert cli.main([*map(str, files), *gate, "--max-new-tokens", "1", "--tol", "0.01"]) == 0
    capsys.readouterr()
    assert cli.main(["viz", str(tmp_path / "run"), "--what", "all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {Path(path).name for path in report["files"]} == FIGURES | TABLES | OVERLAYS | {"frames", "viz.html"}
    assert report["affinity"]["largest_difference_to_recorded_scores"] < 1e-4
    assert (report["affinity"]["outside_grid"] > 0) == (n_extra > 0)
    assert 0 < report["attention"]["share_before_gate"] < report["attention"]["share_after_gate"] < 1
    rows = rows_of(tmp_path / "run" / "viz" / "tokens.csv")
    assert len(rows) == 24 + n_extra
    assert [row["step"] for row in rows].count("") == n_extra
