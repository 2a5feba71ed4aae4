"""Streams, events, graphs and generators of the emulated card."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import state


class Stream:
    """A stream: all of them are one, and everything is done when it is asked for."""

    cuda_stream = 0

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = state.card().place(device)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        state.card().read("synchronize")

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """An event. Its time is that of the host; it may be read once something has waited for it."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed, self.time, self.tick = enable_timing, 0.0, 0
        self.device: torch.device | None = None

    def record(self, stream: Stream | None = None) -> None:
        card = state.card()
        card.clock += 1
        self.device = stream.device if stream else card.place(None)
        self.time, self.tick = time.perf_counter(), card.clock

    def query(self) -> bool:
        state.card().finished = max(state.card().finished, self.tick)
        return True

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None:
        state.card().read("synchronize")

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        if not (self.timed and end.timed and self.tick and end.tick):
            raise ValueError("Both events must be created with argument 'enable_timing=True' and recorded.")
        if self.device != end.device:
            raise RuntimeError(f"CUDA error: invalid resource handle (events of {self.device} and {end.device})")
        if max(self.tick, end.tick) > state.card().finished:
            raise RuntimeError("CUDA error: device not ready (nothing has waited for the event)")
        return 1000 * (end.time - self.time)


class Graph:
    """torch.cuda.CUDAGraph: replay() runs again what was captured, into the same memory."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[Any] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        state.card().captured = self.calls = []

    def capture_end(self) -> None:
        with _disable_current_modes():
            state.card().end_capture()

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def graph(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


class Generator(torch.Generator):
    """torch.Generator(device="cuda"). On its way to an operator it loses its class, so that it is known by address."""

    _cdata: int

    def __new__(cls, device: Any = "cpu") -> Any:
        self = super().__new__(cls)
        if torch.device(device).type == "cuda":
            state.card().generators[self._cdata] = state.card().place(device)
        return self

    def __del__(self) -> None:
        if state.CARD is not None:
            state.CARD.generators.pop(self._cdata, None)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        places = {} if state.CARD is None else state.CARD.generators
        return places.get(self._cdata, torch.device("cpu"))
