"""The command line in a process of its own, the demo that it made there, and `videoanchor run` on that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GATE = ("--alpha-k", "9.5", "--alpha-v", "2.5")
SMALL = (*GATE, "--max-frames", "2", "--max-new-tokens", "1", "--n-clusters", "4", "--scorer", "kmeans")


def videoanchor(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "videoanchor_triton.app.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = videoanchor("demo", "--out", folder / "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def run_arguments(demo: Path, out: Path, *options: object) -> list[str]:
    run = ("run", "--model", demo / "checkpoint", "--video", demo / "clip.mp4", "--question", "?", "--out", out)
    return [*map(str, (*run, *SMALL, *options))]
