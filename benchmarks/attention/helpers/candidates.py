"""What is timed to settle a table of kernels/measured.py: our kernels with another tile, split or border of decode.

A candidate is a contender that decisions.py reads by its name. It is no kernel of ours until it is applied: where it
is wrong, it is left out, and the run does not fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from benchmarks.attention.helpers.contenders import HEADS, Contender, Run, measurement, ours, ours_decode
from benchmarks.attention.helpers.gradients import TRAINERS, training
from benchmarks.attention.helpers.settled import entry, key_of, values
from benchmarks.helpers.decisions import FEW_QUERIES, candidate_name
from benchmarks.helpers.measure import Inputs, Shape, Task, full_size
from videoanchor_triton.kernels.tiles import MAX_QUERIES

RANK = 1  # after the most important shapes of ours
FEW = (4, 8, 16)
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
    tables, make = (("PREFILL",), ours("triton", "post-exp"))
    if section == "decode":
        tables, make = ("DECODE", "SPLIT_KEYS"), ours_decode(True, False)
    for shape in _shapes(section, small):
        for table in tables:
            for value in values(table, key_of(device, shape.head_dim)):
                yield _task(section, shape, candidate_name(table, value), _tried(table, value, make), device)
    if section == "decode":
        yield from _border(device, small)


def _border(device: torch.device, small: bool) -> Iterator[Task]:
    """A few queries over many keys, by decode and by prefill: where decode ends."""
    make = ours("triton", "post-exp")
    for queries in FEW[:1] if small else FEW:
        shape = Shape(1, 4, 2, 16, queries, 70, True) if small else Shape(1, *HEADS[0], 128, queries, 32768, True)
        by_decode = _tried("DECODE_QUERIES", MAX_QUERIES, make)
        yield _task("decode", shape, FEW_QUERIES, by_decode, device)
        name = candidate_name("DECODE_QUERIES", queries - 1)
        yield _task("decode", shape, name, _tried("DECODE_QUERIES", queries - 1, make), device)


def _shapes(section: str, small: bool) -> Iterator[Shape]:
    if small:
        yield Shape(1, 4, 2, 16, 40, 40, True) if section == "prefill" else Shape(2, 4, 2, 16, 1, 150, True)
    elif section == "prefill":
        for head_dim, keys, causal in product((128, 64), (8192, 32768), (True, False)):
            if causal or head_dim == 128:
                yield Shape(1, *HEADS[0], head_dim, keys, keys, causal)
    else:
        for batch, keys in product((1, 8), (8192, 32768, 131072)):
            yield Shape(batch, *HEADS[0], 128, 1, keys, True)


def _task(section: str, shape: Shape, name: str, make: Make, device: torch.device) -> Task:
    kernel = name if name.startswith("candidate") else "decode"
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
