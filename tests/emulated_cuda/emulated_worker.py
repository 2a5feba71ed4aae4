"""The worker of gpu_check.py on an emulated card, with a fault planted in each task that FAULTS names."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
from emulated_cuda.device import EmulatedCuda

# isort: split
import torch
from triton.runtime import interpreter

from benchmarks.attention.helpers import contenders, mixed_tasks
from benchmarks.helpers import measure, worker
from benchmarks.helpers.channel import alive
from videoanchor_triton.anchor import iterates

EVERY = 18  # of the checks, the models, the mixed batches and the candidates, which take minutes here
HANG_SECONDS = 2.0  # the hang is not waited for as long as what is only slow on a busy machine
ABSENT = (
    "FlexAttention",
    "SDPA efficient",
    "FlexAttention paged",
    "SDPA by sequence",
)  # no form of them takes emulated tensors


def context_dies(_: Any) -> Any:
    """As Triton words it; from here on every call of CUDA fails, as torch words it."""

    def dead(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    launches: Any = interpreter.GridExecutor
    launches.__call__ = torch.cuda.synchronize = dead
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def hangs(_: Any) -> Any:
    alive("hanging", HANG_SECONDS)
    time.sleep(1000)


def crashes(_: Any) -> Any:
    os.abort()


def wrong(run: Any, row: Any) -> Any:
    right = contenders.va.anchored_attention_decode
    contenders.va.anchored_attention_decode = lambda *given, **options: 1.02 * right(*given, **options)
    try:
        return run(row)
    finally:
        contenders.va.anchored_attention_decode = right


FAULTS = {
    ("sanity", "decode, pages", "ours"): lambda _: context_dies,
    ("decode", "B=2 Hq=4 Hkv=2 D=16 N=150", "ours, gated, pages of 64"): lambda run: partial(wrong, run),
    ("prefill", "B=1 Hq=4 Hkv=2 D=16 causal N=40", "ours, ungated"): lambda _: hangs,
    ("backward", "B=1 Hq=4 Hkv=2 D=16 causal N=40", "ours, gated, log-bias"): lambda _: crashes,
}


def thinned(make: Any, device: torch.device) -> Iterator[measure.Task]:
    for number, task in enumerate(make(device)):
        timed = worker.place(task)[0] != worker.CANDIDATES and task.row.section not in ("correctness", "model", "mixed")
        if timed or number % EVERY == 0:
            yield task


def faulty(make: Any, device: torch.device) -> Iterator[measure.Task]:
    for task in make(device):
        if task.row.contender == "ours, launches":  # the profiler interprets for minutes, and sees no launch here
            continue
        fault = FAULTS.get(task.row.key)
        yield replace(task, run=fault(task.run)) if fault else task


if __name__ == "__main__":
    iterates._runs_triton = lambda _: False
    for section, known in contenders.CONTENDERS.items():
        contenders.CONTENDERS[section] = [x for x in known if x.name.split(",")[0] not in ABSENT]
    mixed_tasks.CALLERS = tuple(x for x in mixed_tasks.CALLERS if x.name.split(",")[0] not in ABSENT)
    measure.LEAST_RUNS = measure.MOST_RUNS = 2
    for section in ("correctness", "model", "mixed", "decode", "prefill", "backward"):
        worker.SECTIONS[section] = partial(thinned, worker.SECTIONS[section])
    worker.SECTIONS |= {name: partial(faulty, make) for name, make in worker.SECTIONS.items()}
    with EmulatedCuda():
        sys.exit(worker.main())
