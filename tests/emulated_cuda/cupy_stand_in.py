"""NumPy in CuPy's place on the emulated card: arrays of a device that change hands by DLPack only, and its elementwise
kernels, compiled for the CPU."""

import contextlib
import ctypes
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda.device import EmulatedCuda

C_TYPES = {"float64": ("double", ctypes.c_double), "int64": ("long long", ctypes.c_longlong)}


class Array:
    """A cupy.ndarray: no NumPy array, and none of its numbers without DLPack."""

    def __init__(self, inner: np.ndarray, index: int) -> None:
        self.inner, self.index = inner, index

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index  # kDLCUDA

    def __dlpack__(self, **_: Any) -> Any:
        return np.array(self.inner).__dlpack__()


def from_dlpack(x: Any) -> Array:
    """cupy.from_dlpack, of tensors of the card; without a copy."""
    kind, index = x.__dlpack_device__()
    assert kind == 2, "CuPy takes memory of a CUDA device"
    return Array(torch._C._from_dlpack(x.__dlpack__(stream=1)).numpy(), index)


class ElementwiseKernel:
    """cupy.ElementwiseKernel, of raw arrays and scalars and of one array that is written: the same C, in a loop."""

    def __init__(self, arguments: str, result: str, operation: str, name: str) -> None:
        self.parameters = [parameter.split() for parameter in arguments.split(", ")]
        declared = [
            f"{C_TYPES[parameter[-2]][0]} {'*' if len(parameter) == 3 else ''}{parameter[-1]}"
            for parameter in self.parameters
        ]
        kind, written = C_TYPES[result.split()[0]][0], result.split()[1]
        source = (
            f'extern "C" void {name}({", ".join(declared)}, {kind} *result, long long size)'
            f"{{ for (long long i = 0; i < size; ++i) {{ {kind} {written}; {operation} result[i] = {written}; }} }}"
        )
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "kernel.so")
            command = ["g++", "-O1", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
            subprocess.run(command, input=source, text=True, check=True)
            self.run = getattr(ctypes.CDLL(str(library)), name)

    def __call__(self, *arguments: Any) -> None:
        *given, result = arguments
        assert len(given) == len(self.parameters)
        passed = []
        for parameter, value in zip(self.parameters, given, strict=True):
            if parameter[0] == "raw":
                assert value.inner.dtype == parameter[1]
                passed.append(self.pointer(value, result.index))
            else:
                passed.append(C_TYPES[parameter[0]][1](value))
        self.run(*passed, self.pointer(result, result.index), ctypes.c_longlong(result.inner.size))

    def pointer(self, array: Array, index: int) -> ctypes.c_void_p:
        assert array.inner.flags.c_contiguous
        assert array.index == index, "an array of another card"
        return ctypes.c_void_p(array.inner.ctypes.data)


def install(monkeypatch: pytest.MonkeyPatch, card: EmulatedCuda) -> list[int]:
    """Put the stand-in where `import cupy` finds it; the devices that were entered."""
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        before, card.current = card.current, index
        yield
        card.current = before

    def made(make: Any) -> Any:
        return lambda *arguments, **options: Array(make(*arguments, **options), card.current)

    cupy: Any = types.ModuleType("cupy")
    cupy.from_dlpack, cupy.ElementwiseKernel = from_dlpack, ElementwiseKernel
    cupy.ones, cupy.zeros, cupy.arange = made(np.ones), made(np.zeros), made(np.arange)
    cupy.cuda = types.SimpleNamespace(Device=device, ExternalStream=lambda _stream, _device: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return entered
