"""An emulated CUDA card: CPU tensors that say they are on `cuda:0`, under rules that CUDA has and the CPU has not.

    from emulated_cuda.device import EmulatedCuda      # before torch
    with EmulatedCuda(capability=(9, 0), devices=2) as card:
        x = torch.randn(4, 4, device="cuda")           # or .to("cuda:1"), .cuda(), model.to("cuda"), device_map="auto"
        x @ torch.randn(4, 4)                          # RuntimeError: found at least two devices, cuda:0 and cpu
        x.sum().item()
    card.reads                                         # Counter({("item", "tests/test_it.py:5"): 1})

`python -m pytest -p emulated_cuda.plugin PATHS`, with `tests` on PYTHONPATH, runs tests on it; `make test-cuda` runs
all that belong to it. Needs g++ and a build of torch without CUDA.

Enforced: no operator mixes devices (CPU scalars beside tensors of the card and CPU indices excepted, as CUDA has it);
generators are of the operator's device; `.numpy()` raises; a Triton launch takes tensors of the current device only;
integer matrix products and the operators in `tensor.CPU_ONLY` raise; an event's time is read after a wait only.

Counted, with the line that asked: what makes the host wait for the card (`reads`), copies from memory that is not
pinned (`uploads`), launches. Reads and uploads raise inside `torch.cuda.graph`, and a graph replays what it captured.

Not emulated: CUDA's arithmetic (TF32, atomics, order of sums), asynchrony and streams, the fused kernels of torch's
scaled_dot_product_attention (its math form runs), torch.compile and opcheck, inference mode (it is no_grad), memory
(all of it is free). An operator that `tensor.CPU_ONLY` does not name is taken to have a CUDA kernel for the CPU's
dtypes.
"""

import contextlib
import dataclasses
import os
import threading
import types
from typing import Any
from unittest import mock

from . import state  # before torch, since it loads the guard

# isort: split
import torch
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils import dlpack
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from .stand_ins import Event, Generator, Graph, Stream, graph
from .tensor import CudaTensor, Mode, unwrap


class EmulatedCuda(state.State):
    """The card, in force within `with`. `capability` and `memory` (bytes) are those of each of the `devices`."""

    def __init__(self, capability: tuple[int, int] = (9, 0), devices: int = 1, memory: int = 80 * 2**30) -> None:
        super().__init__(devices)
        self.capability, self.memory = capability, memory
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "EmulatedCuda":
        state.CARD = self
        self.devices, self.current = self._devices, 0
        for name, value in self._answers().items():
            self._patch(torch.cuda, name, value)
        self._patch(torch.version, "cuda", "13.0")
        self._patch(torch, "Generator", Generator)
        self._patch(torch, "inference_mode", lambda *_: torch.no_grad())  # a wrapper cannot be an inference tensor
        for name in ("tensor", "as_tensor"):
            self._patch(torch, name, _built(getattr(torch, name)))
        _device_constructors.cache_clear()  # of `with torch.device(...)`: the functions it knows
        self._patch(torch.Tensor, "pin_memory", _pinned)
        for module in (torch, dlpack):
            self._patch(module, "from_dlpack", _from_dlpack(module.from_dlpack))
        self._patch(threading.Thread, "run", _in_mode(threading.Thread.run))  # modes belong to a thread
        if os.environ.get("TRITON_INTERPRET") == "1":
            self._patch_interpreter()
        self._patches.enter_context(Mode())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        _device_constructors.cache_clear()
        state.CARD = None

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._patches.enter_context(mock.patch.object(owner, name, value, create=True))

    def _answers(self) -> dict[str, Any]:
        """What torch.cuda says."""
        card = types.SimpleNamespace(
            name="Emulated CUDA device",
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=self.memory,
            multi_processor_count=132,
            L2_cache_size=50 * 2**20,
            warp_size=32,
            gcnArchName="",
            is_integrated=0,
            shared_memory_per_block_optin=232448,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
        )
        nothing = ("_lazy_init", "_sleep", "empty_cache", "init", "ipc_collect", "manual_seed", "manual_seed_all")
        nothing += ("reset_peak_memory_stats", "set_rng_state", "set_rng_state_all")
        unused = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
        return {
            **{name: _constant(None) for name in nothing},
            **{name: _constant(0) for name in unused},
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": Stream,
            "_exchange_device": self._exchange,
            "_maybe_exchange_device": lambda index: self._exchange(index),
            "current_device": lambda: self.current,
            "current_stream": lambda device=None: Stream(device),
            "default_stream": lambda device=None: Stream(device),
            "device_count": lambda: self.devices,
            "get_arch_list": lambda: ["sm_{}{}".format(*self.capability)],
            "get_device_capability": lambda *_: self.capability,
            "get_device_name": lambda *_: card.name,
            "get_device_properties": lambda *_: card,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "get_rng_state_all": list,
            "graph": graph,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_, **__: True,
            "is_current_stream_capturing": lambda: self.captured is not None,
            "is_initialized": lambda: True,
            "mem_get_info": lambda *_: (self.memory, self.memory),
            "memory_stats": lambda *_: {},
            "set_device": lambda device: self._exchange(self.place(device).index),
            "stream": lambda *_: contextlib.nullcontext(),
            "synchronize": lambda *_: self.read("synchronize"),
        }

    def _exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            self.current = index
        return before

    def _patch_interpreter(self) -> None:
        from triton.runtime import interpreter

        launch = interpreter.GridExecutor.__call__

        def checked(executor: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(self.kernel_argument, (args, kwargs), is_leaf=_is_descriptor)
            self.launches += 1

            def run() -> Any:
                with _disable_current_modes():
                    return launch(executor, *args, **kwargs)

            with _disable_current_modes():
                self.remember(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor))
            self.capture(run)
            return run()

        self._patch(interpreter.GridExecutor, "__call__", checked)

    def kernel_argument(self, x: Any) -> Any:
        """An argument of a Triton launch as the interpreter takes it; raise where a card could not reach it."""
        if _is_descriptor(x):
            return dataclasses.replace(x, base=self.kernel_argument(x.base))
        if isinstance(x, CudaTensor) and x.device.index != self.current:
            raise RuntimeError(
                f"illegal memory access: a kernel on cuda:{self.current} was given a tensor of {x.device}"
            )
        if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) and x.dim():
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return unwrap(x)


def _constant(value: Any) -> Any:
    """A function of its own for each name: torch.compile's tables refuse one that two names share."""
    return lambda *_, **__: value


def _is_descriptor(x: Any) -> bool:
    return type(x).__name__ == "TensorDescriptor"


def _built(make: Any) -> Any:
    """torch.tensor and torch.as_tensor, which build on the CPU and go to the card from there."""

    def built(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if has_torch_function_unary(data):  # `with torch.device(...)`
            return handle_torch_function(built, (data,), data, *args, device=device, **kwargs)
        if isinstance(data, CudaTensor):
            return data.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
        data = tree_map(lambda x: x.item() if isinstance(x, CudaTensor) else x, data)
        x = make(data, *args, **kwargs)
        return x if device is None else x.to(device)

    return built


def _pinned(x: torch.Tensor, *_: Any) -> torch.Tensor:
    x = x.clone()
    x.emulated_pinned = True  # pyright: ignore[reportAttributeAccessIssue]
    return x


def _from_dlpack(real: Any) -> Any:
    def from_dlpack(x: Any, **options: Any) -> torch.Tensor:
        kind, index = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (1, 0)
        if kind != 2:
            return real(x, **options)
        return CudaTensor(torch._C._from_dlpack(x.__dlpack__(stream=1)), torch.device("cuda", index))

    return from_dlpack


def _in_mode(begin: Any) -> Any:
    def run(thread: threading.Thread) -> None:
        with Mode():
            begin(thread)

    return run
