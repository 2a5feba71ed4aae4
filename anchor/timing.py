"""Wall time of the stages of a computation, and reports of how far it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Called with a stage, what is done of it, and all there is to do.
Progress = Callable[[str, int, int], None]


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


def throttled(progress: Progress | None) -> Progress:
    """`progress`, called at most four times a second."""
    next_call = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal next_call
        now = time.monotonic()
        if progress is not None and now >= next_call:
            next_call = now + 0.25
            progress(stage, done, total)

    return report
