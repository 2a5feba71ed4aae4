"""Wall time of the stages of a computation, and reports of how far it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Called with a stage, what is done of it, and all there is to do.
Progress = Callable[[str, int, int], None]
# A moment on a device's clock: an event of its stream, or on the CPU the seconds of `time.perf_counter`.
Mark = float | torch.cuda.Event


def mark_time(device: torch.device) -> Mark:
    """Now, on the clock of `device`: when what has been queued on its current stream is done. Nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Wall time from one mark to a later one of the same device; waits until the device has come to the later one."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # pyright: ignore[reportArgumentType]
    if not end.query():
        end.synchronize()
    return begin.elapsed_time(end) / 1000


class Stopwatch:
    """The wall time of each stage of a computation on a device, read once at the end: no stage waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stages: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block."""
        begin = mark_time(self._device)
        yield
        self._stages.append((name, begin, mark_time(self._device)))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, in the order in which they ran."""
        return {name: seconds_between(begin, end) for name, begin, end in self._stages}


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
