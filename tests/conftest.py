"""Without a GPU the Triton kernels run in the interpreter, which has to be chosen before triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter_fixes

    sys.path.pop(0)
    interpreter_fixes.apply()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
