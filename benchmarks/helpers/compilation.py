"""Compile what a section's tasks will launch, many kernels at a time, before the first of them runs.

The tasks themselves are run once with launches that only compile, so that each kernel is bound and specialised by
Triton's own launch path, on the tensors of the launch that comes later. Triton compiles in threads here: nearly all of
it happens outside of Python's lock, in LLVM and in ptxas.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.helpers.channel import alive
from benchmarks.helpers.measure import Task
from benchmarks.helpers.record import COMPILE, FAILED, OK, Row

# Whose tasks launch all that they need at once. The models launch five kernels in all, and go on from what these wrote.
SECTIONS = ("sanity", "correctness", "mixed", "decode", "prefill", "backward")
PATIENCE_SECONDS = 300.0


def compile_task(name: str, tasks: list[Task]) -> Task:
    """A task that compiles the kernels of other tasks; its time is milliseconds for all of them."""
    return Task(Row(COMPILE, name, "Triton"), f"compile {name}", lambda row: compiled(row, tasks))


def compiled(row: Row, tasks: list[Task]) -> Row:
    """The row with the time, or failed with what did not compile; the tasks that need it will say so again."""
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = Compilations(pool)
        with only_compiling(found), triton.AsyncCompileMode(found, ignore_errors=True):  # type: ignore[arg-type]
            for number, task in enumerate(tasks):
                if number % 20 == 0:
                    alive(f"looking for kernels: {number} of {len(tasks)} tasks, {len(found.names)} kernels")
                # it judges what no kernel wrote: only what it launches counts
                with contextlib.suppress(Exception):
                    task.run(task.row)
            failures = list(found.failures())
    found.forget()
    said = f"{len(found.names)} kernels, {os.cpu_count()} at a time"
    if failures:
        reason = f"{len(failures)} of {said} did not compile: {'; '.join(failures)}"
        return replace(row, status=FAILED, reason=reason[:400])
    return replace(row, status=OK, ms=1e3 * (time.perf_counter() - start), unit="ms", reason=said)


class Compilations:
    """What Triton takes for an executor: it also knows which kernel each compilation is for."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.names: dict[Future[Any], str] = {}
        self.kernels: set[JITFunction[Any]] = set()
        self.launched = ""

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        def compile_both() -> Any:
            kernel = function()
            # up to Triton 3.6 each signature has a launcher in C, which takes its time too
            active: Any = driver.active
            active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        future = self.pool.submit(compile_both)
        self.names[future] = self.launched
        return future

    def failures(self) -> Iterator[str]:
        """Wait for all, saying how many are done; the kernel and the first line of the error of each that failed."""
        for number, future in enumerate(as_completed(self.names), 1):
            alive(f"compiled {number} of {len(self.names)} kernels", PATIENCE_SECONDS)
            if (error := future.exception()) is not None:
                lines = [line for line in str(error).splitlines() if line.strip()] or [""]
                yield f"{self.names[future]}: {type(error).__name__}: {lines[-1].strip()[:120]}"

    def forget(self) -> None:
        """Let the launches look into Triton's cache on disk, where a failed compilation is not kept as a kernel."""
        for kernel in self.kernels:
            kernel.device_caches.clear()


@contextlib.contextmanager
def only_compiling(found: Compilations) -> Iterator[None]:
    """Launches compile and launch nothing."""
    run: Any = JITFunction.run

    def compile_only(kernel: JITFunction[Any], *args: Any, **options: Any) -> Any:
        found.launched = kernel.__name__
        found.kernels.add(kernel)
        return run(kernel, *args, **(options | {"warmup": True}))

    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
