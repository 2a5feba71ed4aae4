"""vLLM has an environment of its own: `make test-vllm`. Elsewhere these tests are left out."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore_glob = [] if find_spec("vllm") else ["test_served_*.py"]


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's Qwen2.5-VL."""
    from videoanchor_triton.app.demo import make_checkpoint

    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    make_checkpoint(folder)
    return folder
