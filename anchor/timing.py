"""Wall time of the stages of a computation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed(stage: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Put the wall time of the block into seconds[stage]; a CUDA device is synchronised at both ends."""
    start = _now(device)
    yield
    seconds[stage] = _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
