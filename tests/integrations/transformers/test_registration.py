"""The package beside transformers: import order, Hugging Face's own package `kernels`, nothing heavy too early."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


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


@pytest.mark.parametrize(
    "imports",
    [
        "import videoanchor_triton; from transformers import AutoModel",
        "import transformers; import videoanchor_triton; from transformers import AutoModel",
        "from transformers import AutoModel; import videoanchor_triton",
    ],
    ids=["first", "between", "last"],
)
def test_registered_whatever_is_imported_first(imports: str) -> None:
    code = (
        f"{imports}; from transformers import AutoModelForCausalLM, Qwen2Config; "
        "config = Qwen2Config(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=8); "
        "model = AutoModelForCausalLM.from_config(config, attn_implementation='videoanchor_triton'); "
        "from transformers import AttentionMaskInterface; "
        "print(model.config._attn_implementation, 'videoanchor_triton' in AttentionMaskInterface())"
    )
    assert python(code) == "videoanchor_triton True"


def test_registered_after_an_import_that_failed_at_first(tmp_path: Path) -> None:
    """As where a package that transformers needs is mended in a running notebook."""
    (tmp_path / "safetensors.py").write_text("raise ImportError('mended soon')")
    code = (
        "import sys, videoanchor_triton\n"
        "try:\n    import transformers.modeling_utils\nexcept ImportError as error:\n    print(error)\n"
        "sys.path.remove(sys.path[1])\n"
        "from transformers import AttentionInterface\n"
        "print('videoanchor_triton' in AttentionInterface())"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    assert python(code, PYTHONPATH=path).splitlines() == ["mended soon", "True"]


def test_transformers_imports_in_the_root_with_hugging_face_kernels() -> None:
    if find_spec("kernels") is None or find_spec("kernels").origin is None:  # pyright: ignore[reportOptionalMemberAccess]
        pytest.fail("the package `kernels` of the dev extra is not installed")
    code = (
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
    code = (
        "import kernels; assert kernels.__file__ is None; from transformers import PreTrainedModel; "
        "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    )
    assert python(code, "-S", PYTHONPATH=path) == "False"
