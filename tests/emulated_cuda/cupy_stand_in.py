"""NumPy and SciPy in CuPy's place on the emulated card: arrays of a device that change hands by DLPack only."""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from emulated_cuda.device import EmulatedCuda


class Array:
    """A cupy.ndarray: no NumPy array, and none of its numbers without DLPack."""

    def __init__(self, inner: np.ndarray, index: int) -> None:
        self.inner, self.index = inner, index

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index  # kDLCUDA

    def __dlpack__(self, **_: Any) -> Any:
        return np.array(self.inner).__dlpack__()


def from_dlpack(x: Any) -> Array:
    """cupy.from_dlpack, of tensors of the card."""
    kind, index = x.__dlpack_device__()
    assert kind == 2, "CuPy takes memory of a CUDA device"
    return Array(torch._C._from_dlpack(x.__dlpack__(stream=1)).numpy(), index)


def install(monkeypatch: pytest.MonkeyPatch, card: EmulatedCuda, eigsh: Callable[..., Any] | None = None) -> list[int]:
    """Put the stand-in where `import cupy` finds it; the devices that were entered."""
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        before, card.current = card.current, index
        yield
        card.current = before

    def find(operator: Any, *, k: int, which: str, v0: Array, tol: float) -> tuple[Array, Array]:
        assert card.current == v0.index

        def product(x: np.ndarray) -> np.ndarray:
            result = operator.matvec(Array(x, v0.index))
            assert result.index == v0.index
            return result.inner

        inner = scipy.sparse.linalg.LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)  # pyright: ignore[reportCallIssue]
        values, vectors = scipy.sparse.linalg.eigsh(inner, k=k, which=which, v0=v0.inner, tol=tol)  # pyright: ignore[reportArgumentType]
        return Array(values, v0.index), Array(vectors, v0.index)

    def operator(shape: tuple[int, int], matvec: Callable[[Array], Array], dtype: np.dtype) -> types.SimpleNamespace:
        return types.SimpleNamespace(shape=shape, matvec=matvec, dtype=dtype)

    names = ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.sparse", "cupyx.scipy.sparse.linalg")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["cupy"].from_dlpack = from_dlpack
    modules["cupy"].cuda = types.SimpleNamespace(Device=device)
    modules["cupyx"].scipy = modules["cupyx.scipy"]
    modules["cupyx.scipy"].sparse = modules["cupyx.scipy.sparse"]
    modules["cupyx.scipy.sparse"].linalg = modules["cupyx.scipy.sparse.linalg"]
    modules["cupyx.scipy.sparse.linalg"].__dict__.update(LinearOperator=operator, eigsh=eigsh or find)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return entered
