"""Compiles or launches two checks of gpu_check.py on an emulated sm_90, where nothing is really launched.

`python compiling_program.py compile|launch [fault]` prints the row of the compilation, the kernels that Triton compiled
and those that it found in TRITON_CACHE_DIR. With a fault, the paged kernel does not compile.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

from emulated_cuda.device import EmulatedCuda

# isort: split
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.helpers import channel, compilation, worker


class Driver:
    """A driver that knows its card, loads nothing and launches nothing."""

    def __init__(self) -> None:
        self.utils = self
        self.launched = 0

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})
    load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))

    def launcher_cls(self, *_: Any) -> Any:
        def launch(*_: Any) -> None:
            self.launched += 1

        return launch


def main() -> None:
    what, *fault = sys.argv[1:]
    active = Driver()
    driver.set_active(active)  # type: ignore[arg-type]
    seen: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    knobs.compilation.listener = lambda **found: seen[found["cache_hit"]].update([found["metadata"]["name"]])
    if fault:
        real = triton.compiler.compiler.compile

        def failing(source: Any, *given: Any, **options: Any) -> Any:
            if "paged" in source.name:
                raise RuntimeError("ptxas ended\nPTX is not what it takes")
            return real(source, *given, **options)

        triton.compiler.compile = failing
    with EmulatedCuda(capability=(9, 0)) as card:
        device = torch.device("cuda")
        worker.measure.small = True
        wanted = {"prefill, per-batch gate": "log-bias", "decode, per-batch gate": "log-bias"}
        known = [t for t in worker.tasks(device, ["correctness"]) if t.row.case in wanted]
        plan = worker.with_compilation(known)
        said: list[Any] = []
        channel.say = said.append
        rows = []
        for task in plan:
            if (task.row.section == compilation.COMPILE) == (what == "compile"):
                rows.append(asdict(worker.finished(task)))
        reads = sum(card.reads.values())
    print(json.dumps({
        "rows": rows, "compiled": seen[False], "found": seen[True], "launched": active.launched, "reads": reads,
        "said": said,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
