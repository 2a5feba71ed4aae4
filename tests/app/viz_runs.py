"""A small run of the tiny checkpoint, and all that `videoanchor viz` makes of it."""

import csv
from pathlib import Path

import numpy as np
import pytest

from videoanchor_triton.app import cli, demo
from videoanchor_triton.app.video.reader import write_video

N_FRAMES, N_SAMPLED = 10, 5
QUESTION = "Which roof is left?"


def moving_pattern(n: int, height: int, width: int) -> np.ndarray:
    """(n, height, width, 3) uint8: waves that move to the right."""
    t, y, x = np.meshgrid(np.arange(n), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x - 3 * t) / 9 + y / 17), np.cos(y / 11 - t / 5), np.sin((x + y + 2 * t) / 23)]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture(scope="session")
def viz_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of ten frames: three steps of two frames, the last one of them filled up."""
    folder = tmp_path_factory.mktemp("viz")
    demo.make_checkpoint(folder / "checkpoint")
    write_video(folder / "clip.mp4", moving_pattern(N_FRAMES, 84, 112), fps=5)
    files = ("run", "--model", folder / "checkpoint", "--video", folder / "clip.mp4", "--out", folder / "run")
    gate = ("--question", QUESTION, "--alpha-k", "9.5", "--alpha-v", "2.5", "--n-clusters", "4", "--tol", "0.01")
    assert cli.main([*map(str, files), *gate, "--max-frames", str(N_SAMPLED), "--max-new-tokens", "1"]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def gallery(viz_run: Path) -> Path:
    out = viz_run.parent / "all"
    assert cli.main(["viz", str(viz_run), "--what", "all", "--out", str(out)]) == 0
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
