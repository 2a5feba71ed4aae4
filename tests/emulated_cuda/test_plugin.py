"""Where there can be no emulated card, one sentence says why; which of the kernels' tests run on it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulated_cuda import guard

FOLDER = Path(__file__).parent


def test_without_a_compiler_the_plugin_says_what_to_install(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": "", "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-p", "emulated_cuda.plugin", str(FOLDER / "test_device.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the emulated card needs a C++ compiler: install g++" in done.stdout + done.stderr


@pytest.mark.parametrize(("cuda", "said"), [(True, "a CUDA build"), (False, "before torch")])
def test_another_build_of_torch_or_one_that_is_loaded_is_refused(
    cuda: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    if cuda:
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(guard.NotEmulatedError, match=said) as refused:
        guard.load()
    assert refused.value.fault is not cuda


def test_without_the_plugin_these_tests_are_not_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
