"""Without a GPU the Triton kernels run in the interpreter, which has to be chosen before triton is imported."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side must not each take every core; read by torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait take nothing from what else runs here
os.environ.setdefault("VIDEOANCHOR_SELF_CHECK", "off")  # a kernel that is wrong must be seen to be, not answered for
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads; names that do not exist fail at once

import torch

# what inductor keeps of one instruction set it may load under another (ATEN_CPU_CAPABILITY), and then fails
kept = f"videoanchor-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), kept)))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter_fixes

    sys.path.pop(0)
    interpreter_fixes.apply()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
