"""A torchvision that was built for another torch: `make` repairs its own environments, the command line says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "import torch\ndef _has_ops():\n    return False\n"
PACKAGE = """
import torch
from . import extension
try:
    torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")
except RuntimeError as error:
    raise RuntimeError("operator torchvision::nms does not exist") from error
from . import transforms
"""


@pytest.fixture
def torchvision(tmp_path: Path) -> Path:
    """One whose library cannot be loaded, before the installed one."""
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "extension.py").write_text(LIBRARY)
    (folder / "transforms.py").write_text("class InterpolationMode:\n    NEAREST = BILINEAR = BICUBIC = 0\n")
    return folder


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)


def test_repaired_once(torchvision: Path) -> None:
    script, extension = str(ROOT / "tools" / "repair_torchvision.py"), torchvision / "extension.py"
    assert "nms does not exist" in python(torchvision.parent, "-c", "import torchvision").stderr
    done = python(torchvision.parent, script)
    assert (done.returncode, "Python transforms are used" in done.stdout) == (0, True), done.stderr
    repaired = extension.read_text()
    assert repaired.startswith(LIBRARY)
    assert python(torchvision.parent, "-c", "import torchvision").returncode == 0
    again = python(torchvision.parent, script)
    assert (again.returncode, again.stdout, extension.read_text()) == (0, "", repaired)


def test_another_failure_is_left(torchvision: Path) -> None:
    (torchvision / "extension.py").write_text("raise OSError('disk')")
    done = python(torchvision.parent, str(ROOT / "tools" / "repair_torchvision.py"))
    assert (done.returncode, done.stdout) == (0, "")
    assert (torchvision / "extension.py").read_text() == "raise OSError('disk')"


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--out", "out"],
        ["run", "--model=m", "--video=clip.mp4", "--question=?", "--out=out", "--alpha-k=1", "--alpha-v=1"],
        ["info", "--backbones"],
    ],
    ids=lambda command: command[0],
)
def test_commands_say_so_in_one_sentence(
    command: list[str], torchvision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(torchvision.parent)
    Path("clip.mp4").touch()
    done = python(torchvision.parent, "-m", "videoanchor_triton.app.cli", *command)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"videoanchor {command[0]}: the installed torchvision was built for another torch and cannot be imported "
        "(operator torchvision::nms does not exist): install torch and torchvision together, both for the CPU or both "
        "for the same CUDA"
    )
