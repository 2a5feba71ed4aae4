"""What the emulated card knows: which device is current, who waited for it, what a graph has captured."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from . import guard

GUARD = guard.load()

import torch  # noqa: E402 (after the guard)

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[2]
PASSED_OVER = tuple(f"/site-packages/{name}/" for name in ("torch", "numpy", "scipy", "sklearn", "triton"))


def line_that_asked() -> str:
    """The innermost "file:line" outside of torch, the numerical libraries, contextlib and this tool.

    A file of the package is named from its area (kernels/api.py), others from the repository or from site-packages.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_passed_over(frame.f_code.co_filename):
        frame = frame.f_back
    name = frame.f_code.co_filename.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
    return f"{name.removeprefix('src/videoanchor_triton/')}:{frame.f_lineno}"


@cache
def _is_passed_over(name: str) -> bool:
    path = Path(name)
    tool = path.parent == HERE and not path.name.startswith("test_")
    library = any(part in name for part in PASSED_OVER)
    return tool or library or path.name == "contextlib.py" or not path.is_absolute()


class State:
    """Counts and rules that operators, launches and torch.cuda share.

    reads: how often the host waited for the device, by (what, "file:line").
    uploads: copies from memory that is not pinned, which wait too, by (what, "file:line").
    launches: Triton kernels launched.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self.reads: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()
        self.launches = 0
        self.captured: list[Callable[[], object]] | None = None
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # a capture, by address
        self.generators: dict[int, torch.device] = {}  # by address
        self.clock = 0  # of events: what was recorded before the last wait is over
        self.finished = 0

    @property
    def devices(self) -> int:
        return self._devices

    @devices.setter
    def devices(self, count: int) -> None:
        self._devices = count
        GUARD.emulated_set_devices(count)

    @property
    def current(self) -> int:
        return GUARD.emulated_current()

    @current.setter
    def current(self, index: int) -> None:
        if not 0 <= index < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {self.devices})")
        GUARD.emulated_set_current(index)

    def place(self, device: Any) -> torch.device:
        """A CUDA device with its index; None and a device without one are the current device."""
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        index = self.current if index is None or index < 0 else index
        if index >= self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {self.devices})")
        return torch.device("cuda", index)

    def reset(self) -> None:
        self.reads.clear()
        self.uploads.clear()
        self.launches = 0

    def read(self, what: str) -> None:
        """The host waits for what the device computes."""
        self.reads[what, line_that_asked()] += 1
        self.finished = self.clock
        self.refuse_to_capture(what)

    def upload(self, what: str) -> None:
        """The host copies from pageable memory."""
        self.uploads[what, line_that_asked()] += 1
        self.refuse_to_capture(f"{what}, from pageable memory")

    def refuse_to_capture(self, what: str) -> None:
        if self.captured is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def remember(self, tensors: Iterable[torch.Tensor]) -> None:
        """While a graph is captured: CPU tensors that a call may write to, which on a card it does at replays only."""
        if self.captured is None:
            return
        for storage in (x.untyped_storage() for x in tensors):
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()

    def end_capture(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)
        self.before, self.captured = {}, None

    def capture(self, call: Callable[[], object]) -> None:
        """Keep what a graph has to run again."""
        if self.captured is not None:
            self.captured.append(call)


CARD: State | None = None


def card() -> State:
    if CARD is None:
        raise RuntimeError("a tensor of the emulated card is used where no EmulatedCuda is in force")
    return CARD
