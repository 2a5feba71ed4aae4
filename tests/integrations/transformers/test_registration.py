"""The package beside transformers: import order, Hugging Face's own package `kernels`, nothing heavy too early."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Without importing the package, whose import is what is tested.
PREPARE = "import runpy; runpy.run_path('app/torchvision_compat.py')['make_torchvision_importable'](); "


def python(code: str, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "triton", "sklearn", "numpy"
    code = f"import sys, videoanchor_triton; print([name for name in {heavy!r} if name in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("first", ["videoanchor_triton", "transformers"])
def test_registered_whatever_is_imported_first(first: str) -> None:
    second = {"videoanchor_triton": "transformers", "transformers": "videoanchor_triton"}[first]
    code = PREPARE + (
        f"import {first}; import {second}; from transformers import AttentionInterface, AttentionMaskInterface; "
        "print('videoanchor_triton' in AttentionInterface(), 'videoanchor_triton' in AttentionMaskInterface())"
    )
    assert python(code) == "True True"


def test_transformers_imports_in_the_root_with_hugging_face_kernels() -> None:
    if find_spec("kernels") is None or find_spec("kernels").origin is None:  # pyright: ignore[reportOptionalMemberAccess]
        pytest.fail("the package `kernels` of the dev extra is not installed")
    code = PREPARE + (
        "import sys; sys.path.insert(0, ''); from transformers import PreTrainedModel; "
        "import kernels; print(kernels.__file__)"
    )
    assert "site-packages" in python(code)


def test_transformers_imports_in_the_root_without_hugging_face_kernels(tmp_path: Path) -> None:
    """The folder `kernels` in the root must not pass for that package: a copy of the environment without it."""
    for site in {Path(entry) for entry in sys.path if entry.endswith("site-packages")}:
        for entry in site.iterdir():
            link = tmp_path / entry.name
            if not entry.name.lower().startswith("kernels") and not link.exists():
                link.symlink_to(entry)
    path = os.pathsep.join([str(ROOT), str(tmp_path), str(ROOT / "src")])
    code = PREPARE + (
        "import kernels; assert kernels.__file__ is None; from transformers import PreTrainedModel; "
        "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    )
    assert python(code, "-S", PYTHONPATH=path) == "False"


BROKEN_TORCHVISION = """
import torch
from . import first
try:
    torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")
except RuntimeError as error:
    raise RuntimeError("operator torchvision::nms does not exist") from error
whole = True
"""


@pytest.mark.parametrize("first", ["", "from importlib.util import find_spec; find_spec('torchvision'); "])
def test_torchvision_of_another_torch_is_imported(first: str, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN_TORCHVISION)
    (tmp_path / "torchvision" / "first.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    code = f"import videoanchor_triton; {first}import torchvision; print(torchvision.whole)"
    assert python(code, PYTHONPATH=path) == "True"


def test_another_failure_of_torchvision_stays(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('disk')")
    code = "import videoanchor_triton\ntry:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)"
    assert python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src")])) == "disk"
