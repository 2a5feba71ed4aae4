"""Each script of examples/ runs as a user starts it, on what `make demo` makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from videoanchor_triton.app import demo

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples")
    (path / "out" / "demo").mkdir(parents=True)
    demo.make_clip(path / "out" / "demo" / "clip.mp4")
    demo.make_checkpoint(path / "out" / "demo" / "checkpoint")
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, path], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "False" not in done.stdout
    assert "Warning" not in done.stderr, done.stderr
