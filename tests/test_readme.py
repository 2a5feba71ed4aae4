"""The README's code runs as written, in a fresh Python, with the demo's checkpoint and clip in place of a download."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from videoanchor_triton.app import demo
from videoanchor_triton.app.cli import _parser
from videoanchor_triton.app.video.reader import write_video

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MADE = {"Qwen/Qwen2.5-VL-7B-Instruct": "checkpoint", "room.mp4": "clip.mp4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    demo.make_checkpoint(path / "checkpoint")
    write_video(path / "clip.mp4", np.random.default_rng(0).integers(0, 255, (8, 112, 112, 3), dtype=np.uint8), fps=4)
    return path


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{n}" for n in range(len(BLOCKS))])
def test_python_of_the_readme(block: str, folder: Path) -> None:
    for name, made in MADE.items():
        block = block.replace(name, str(folder / made))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", block], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("tensor([" in done.stdout) == ("print(" in block)


def test_the_readme_shows_a_first_use() -> None:
    assert sum(all(name in block for name in MADE) for block in BLOCKS) == 2


def test_commands_of_the_readme_parse() -> None:
    commands = re.findall(r"^videoanchor (?:.*\\\n)*.*", README, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        _parser().parse_args(shlex.split(command.replace("\\\n", " ").replace(" A", " 1"))[1:])
