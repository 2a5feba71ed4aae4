"""Triton's own launch path on emulated tensors, without its interpreter: `python -m emulated_cuda.launch_path sm_90`.

Each launch is bound, specialised and compiled for the card, and only left out. A process of its own, since Triton asks
once whether it is to interpret; it prints a line of JSON for each call: what was launched, compiled, read, uploaded.
The tensors are on `cuda:1` while `cuda:0` is current.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from emulated_cuda.device import EmulatedCuda

# isort: split
import torch
from emulated_cuda.attention_calls import CALLS, Inputs, Sizes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from videoanchor_triton.anchor.atoms import Atoms
from videoanchor_triton.anchor.newton_kernel import newton_step
from videoanchor_triton.anchor.slopes_kernel import take_in_violators

os.environ["VIDEOANCHOR_SELF_CHECK"] = "off"  # nothing is launched, so that there is nothing to compare
DEVICE = torch.device("cuda", 1)
# bytes that a program may have
SHARED_LIMIT = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Driver:
    """What Triton asks of a driver, for a card of the emulated one's capability; also its `utils`."""

    def __init__(self, card: EmulatedCuda) -> None:
        self.card, self.utils, self.arch = card, self, 10 * card.capability[0] + card.capability[1]
        self.launched: list[str] = []
        self.compiled: dict[str, int] = {}  # shared memory in bytes by kernel

    def get_current_device(self) -> int:
        return self.card.current

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[f"sm_{self.arch}"], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, _: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert device == self.card.current
        self.compiled[name] = shared
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads that fit

    def launcher_cls(self, _: Any, metadata: Any) -> Callable[..., None]:
        def launch(grid_0: int, grid_1: int, grid_2: int, *arguments: Any) -> None:
            grid = grid_0, grid_1, grid_2
            assert all(0 < n <= limit for n, limit in zip(grid, GRID_LIMITS, strict=True)), f"the grid is {grid}"
            for x in arguments:
                self.card.kernel_argument(x)
            self.launched.append(metadata.name)

        return launch


def calls(sizes: Sizes) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each form of the attention's kernels."""
    inputs = Inputs(sizes, DEVICE)
    for name, call in CALLS.items():
        if not name.startswith("merge"):
            yield name, lambda call=call: call(inputs, backend="triton")
    if torch.cuda.get_device_capability() == (9, 0):
        gates = inputs.gates if sizes.dtype == torch.bfloat16 else {"gamma_k": inputs.gates["gamma_k"]}
        for form in ("log-bias", "post-exp"):
            options = {"causal": True, "gate_form": form, "backend": "hopper", **gates}
            yield f"hopper: {form}", lambda options=options: inputs.attend(**options)


def solver_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """An iteration of the solver, of tokens of 64 features in both precisions."""
    for dtype in (torch.float32, torch.float64):
        exact, k = torch.ones(300, 65, dtype=torch.float64, device=DEVICE), 90
        scale, limit = (torch.ones(n, dtype=torch.float64, device=DEVICE) for n in (65, 64))
        atoms = Atoms(exact, exact.to(dtype), scale, limit, 1.0, True)
        candidates = torch.zeros(5, k, dtype=torch.int64, device=DEVICE)
        x, u, weights, pairs = (torch.ones(5, n, dtype=torch.float64, device=DEVICE) for n in (65, k + 64, k, 2))
        taken = torch.zeros(5, 300, dtype=torch.uint8, device=DEVICE)
        open_ = torch.ones(5, dtype=torch.uint8, device=DEVICE)
        numbers = torch.ones(5, dtype=torch.float64, device=DEVICE)
        yield f"newton: {dtype}", partial(newton_step, atoms, open_, candidates, x, x, u, u, u, numbers)
        swap = partial(take_in_violators, n_swaps=32, tf32=dtype == torch.float32)
        yield f"swap: {dtype}", partial(swap, atoms, open_, candidates, taken, x, u, u, u, weights, pairs, numbers)


def main(target: str, *precisions: str) -> None:
    """Make every call on a card of `target` with each precision, "dtype:head_dim"."""
    capability = divmod(int(target[3:]), 10)
    with EmulatedCuda(capability=capability, devices=2) as card:
        triton_driver = Driver(card)
        driver.set_active(triton_driver)  # pyright: ignore[reportArgumentType]
        for precision in precisions:
            dtype, head_dim = precision.split(":")
            sizes = Sizes(300, 500, int(head_dim), getattr(torch, dtype), page=64)
            for name, call in (*calls(sizes), *(solver_calls() if precision == precisions[0] else ())):
                card.reset()
                triton_driver.launched.clear()
                triton_driver.compiled.clear()
                call()
                counts = {"reads": list(card.reads), "uploads": list(card.uploads)}
                kernels = {"launched": triton_driver.launched, "compiled": triton_driver.compiled}
                print(json.dumps({"call": f"{name}, {precision}", **counts, **kernels}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
