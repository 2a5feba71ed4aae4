"""A call that is made many times over the same memory: on a GPU a CUDA graph, one launch for all of its kernels."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


class Repeated:
    """A call without arguments, which leaves the host alone and finds what it reads at the same addresses each time.

    Args:
        call: what is called. What it allocates and returns is overwritten at each further time.
        device: where it runs. On a CUDA device the first time loads its kernels, the second is captured, and from then
            on the capture is replayed; elsewhere it is a plain call.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._call, self._device = call, device
        self._times, self._result = 0, None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Any:
        self._times += 1
        if self._device.type != "cuda" or self._times == 1:
            return self._call()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        """Not by `torch.cuda.graph`, which first waits for the device and gives its free memory back."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current, stream = torch.cuda.current_stream(), _capture_stream(self._device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._result = self._call()
                finally:
                    graph.capture_end()
            current.wait_stream(stream)
        self._graph = graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)
