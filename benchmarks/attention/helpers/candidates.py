"""What is timed to settle a table of kernels/measured.py: our kernels with another tile, and where prefill begins.

A candidate is a contender that decisions.py reads by its name. It is no kernel of ours until it is applied: where it
is wrong, it is left out, and the run does not fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from benchmarks.attention.helpers.contenders import HEADS, Contender, Run, measurement, ours
from benchmarks.attention.helpers.gradients import TRAINERS, training
from benchmarks.attention.helpers.settled import entry, key_of, values
from benchmarks.helpers.decisions import FEW_QUERIES, candidate_name
from benchmarks.helpers.measure import Inputs, Shape, Task, full_size

RANK = 1  # after the most important shapes of ours
FEW = (64, 128, 256, 512)
Make = Callable[[Inputs], Run]


def candidate_tasks(section: str, device: torch.device) -> Iterator[Task]:
    """The candidates of "prefill", "decode" or "backward", and what they are compared with that nothing else times."""
    small = not full_size(device)
    if section == "backward":
        for length in (40,) if small else (2048, 8192):
            shape = Shape(1, *((4, 2) if small else HEADS[0]), 16 if small else 128, length, length, True)
            for value in values("BACKWARD", key_of(device, shape.head_dim)):
                name = candidate_name("BACKWARD", value)
                trainer = replace(TRAINERS[0], name=name, tiles=value)
                yield Task(shape.row("backward", name), name, training(shape, trainer, device), RANK)
        return
    if section == "decode":
        yield from _border(device, small)
        return
    make = ours("triton", "post-exp")
    for shape in _shapes(small):
        for value in values("PREFILL", key_of(device, shape.head_dim)):
            yield _task(section, shape, candidate_name("PREFILL", value), _tried("PREFILL", value, make), device)


def _border(device: torch.device, small: bool) -> Iterator[Task]:
    """Some queries over many keys, by the paged kernel, which splits the keys, and by prefill: where the first ends."""
    make = ours("triton", "post-exp")
    for queries in (17,) if small else FEW:
        shape = Shape(1, 4, 2, 16, queries, 70, True) if small else Shape(1, *HEADS[0], 128, queries, 32768, True)
        by_paged = _tried("SHORT_QUERIES", queries, make)
        yield _task("decode", shape, FEW_QUERIES, by_paged, device)
        name = candidate_name("SHORT_QUERIES", queries - 1)
        yield _task("decode", shape, name, _tried("SHORT_QUERIES", queries - 1, make), device)


def _shapes(small: bool) -> Iterator[Shape]:
    if small:
        yield Shape(1, 4, 2, 16, 40, 40, True)
        return
    for head_dim, keys, causal in product((128, 64), (8192, 32768), (True, False)):
        if causal or head_dim == 128:
            yield Shape(1, *HEADS[0], head_dim, keys, keys, causal)


def _task(section: str, shape: Shape, name: str, make: Make, device: torch.device) -> Task:
    kernel = name if name.startswith("candidate") else "paged"
    return Task(shape.row(section, name), kernel, measurement(shape, Contender(name, True, make), device), RANK)


def _tried(table: str, value: Any, make: Make) -> Make:
    """The contender with `value` in its table."""

    def tried(inputs: Inputs) -> Run:
        run, key = make(inputs), key_of(inputs.q.device, inputs.shape.head_dim)

        def run_with_it() -> torch.Tensor:
            with entry(table, key, value):
                return run()

        return run_with_it

    return tried
