import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def far_store(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """More than 2**31 fp16 elements, of which only the pages that a test touches are ever backed by memory."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of GPU memory")
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        return torch.empty(2**31 + 2**29, dtype=torch.float16, device=device)
