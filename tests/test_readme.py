"""The README's Python runs as written, with the demo's checkpoint and clip in place of a download."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from videoanchor_triton.app import demo

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{n}" for n in range(len(BLOCKS))])
def test_python_of_the_readme(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "from_pretrained" in block:
        demo.make_checkpoint(tmp_path / "checkpoint")
        demo.make_clip(tmp_path / "clip.mp4")
        for name, made in (("Qwen/Qwen2.5-VL-7B-Instruct", "checkpoint"), ("room.mp4", "clip.mp4")):
            assert name in block
            block = block.replace(name, str(tmp_path / made))
        block = block.replace("max_frames=32", "max_frames=4").replace("max_new_tokens=64", "max_new_tokens=2")
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    if "handle" in names:
        assert "tensor([" in capsys.readouterr().out


def test_imports_of_the_readme_in_a_fresh_python() -> None:
    """In the order in which they stand there, beside whatever torchvision there is."""
    lines = [line for line in BLOCKS[0].splitlines() if line.startswith(("import ", "from "))]
    assert any("transformers" in line for line in lines)
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command_of_the_readme_parses() -> None:
    from videoanchor_triton.app.cli import _parser

    command = re.search(r"```\n(videoanchor run .*?)```", README, re.DOTALL)
    assert command is not None
    import shlex

    arguments = shlex.split(command.group(1).replace("\\\n", " "))[1:]
    assert _parser().parse_args(arguments).max_frames == 32
