"""The README's Python runs as written, with the demo's checkpoint and clip in place of a download."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from videoanchor_triton.app import demo

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{n}" for n in range(len(BLOCKS))])
def test_python_of_the_readme(block: str, tmp_path: Path) -> None:
    """In a Python of its own, as a user starts it: nothing of this suite is imported first."""
    if "from_pretrained" in block:
        demo.make_checkpoint(tmp_path / "checkpoint")
        demo.make_clip(tmp_path / "clip.mp4")
        for name, made in (("Qwen/Qwen2.5-VL-7B-Instruct", "checkpoint"), ("room.mp4", "clip.mp4")):
            assert name in block
            block = block.replace(name, str(tmp_path / made))
        block = block.replace("max_frames=32", "max_frames=4").replace("max_new_tokens=64", "max_new_tokens=2")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "handle" in block:
        assert "tensor([" in done.stdout


def test_command_of_the_readme_parses() -> None:
    from videoanchor_triton.app.cli import _parser

    command = re.search(r"```\n(videoanchor run .*?)```", README, re.DOTALL)
    assert command is not None
    import shlex

    arguments = shlex.split(command.group(1).replace("\\\n", " "))[1:]
    assert _parser().parse_args(arguments).max_frames == 32
