"""The process of gpu_check.py that touches the device: says its plan, then a row of JSON after each task."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from triton import knobs

from benchmarks.attention.helpers.candidates import candidate_tasks
from benchmarks.attention.helpers.checks import correctness
from benchmarks.attention.helpers.contenders import attention_tasks
from benchmarks.attention.helpers.gradients import backward_tasks
from benchmarks.attention.helpers.mixed_tasks import mixed_tasks
from benchmarks.attention.helpers.sanity_tasks import sanity_tasks
from benchmarks.helpers import compilation, measure
from benchmarks.helpers.channel import end_with_parent, open_channel, say
from benchmarks.helpers.decisions import CANDIDATE
from benchmarks.helpers.environment import environment, source_digest
from benchmarks.helpers.measure import Task, ceiling_tasks
from benchmarks.helpers.record import FAILED, Row
from benchmarks.model.helpers.generation import model_tasks
from benchmarks.scores.helpers.gpu_tasks import score_tasks
from benchmarks.serving.gpu_tasks import serving_tasks
from videoanchor_triton.kernels.dispatch import triton_target

SECTIONS = {
    "ceiling": ceiling_tasks,
    "sanity": sanity_tasks,
    "model": model_tasks,
    "correctness": correctness,
    "mixed": mixed_tasks,
    "decode": lambda device: chain(attention_tasks("decode", device), candidate_tasks("decode", device)),
    "scores": score_tasks,
    "prefill": lambda device: chain(attention_tasks("prefill", device), candidate_tasks("prefill", device)),
    "serving": serving_tasks,
    "backward": lambda device: chain(backward_tasks(device), candidate_tasks("backward", device)),
}
# What runs first. The checks of a section's kernels stand just before its times.
GROUPS = ("ceiling", "sanity", "model", "mixed", "decode", "scores", "prefill", "backward", "serving")
CHECKED_BEFORE = {"paged": "mixed", "decode": "decode", "cache": "decode"}
CHECKED_BEFORE |= {"backward": "backward", "varlen backward": "backward"}
OURS, CANDIDATES = 0, 1  # the turns before torch's own: ours, and what ours could be
SLOWEST = "FlexAttention"  # compiled for each shape, one after the other


def place(task: Task) -> tuple[int, int, int, bool]:
    """Where a task stands in the order: by whose kernel it is, important shapes first, then by group."""
    row = task.row
    if row.ours or row.section == "ceiling":
        turn = OURS
    else:
        turn = CANDIDATES if row.contender.startswith(CANDIDATE) else 3 if row.contender.startswith(SLOWEST) else 2
    check = row.section == "correctness"
    group = CHECKED_BEFORE.get(task.kernel, "prefill") if check else row.section
    return turn, task.rank, GROUPS.index(group), not check


def tasks(device: torch.device, sections: list[str]) -> list[Task]:
    """All tasks in the order in which they run."""
    return sorted((task for name, make in SECTIONS.items() if name in sections for task in make(device)), key=place)


def with_compilation(planned: list[Task]) -> list[Task]:
    """The tasks, with a task that compiles the kernels of ours before the first of each turn, rank and group."""
    steps: dict[tuple[int, int, int], list[Task]] = {}
    for task in planned:
        if place(task)[0] <= CANDIDATES and task.row.section in compilation.SECTIONS:
            steps.setdefault(place(task)[:3], []).append(task)
    found: list[Task] = []
    for task in planned:
        if (where := place(task)[:3]) in steps:
            turn, rank, group = where
            name = GROUPS[group] + (", candidates" if turn else "") + (f", rank {rank}" if rank else "")
            found.append(compilation.compile_task(name, steps.pop(where)))
        found.append(task)
    return found


def run(planned: list[Task], deadline: float, broken: set[str]) -> Iterator[Row]:
    """A row for each task until the deadline. A failure that leaves the GPU unusable ends the process, as a crash."""
    for task in planned:
        if time.time() > deadline:
            return
        if task.kernel in broken:
            yield replace(task.row, status=FAILED, reason=f"not run: {task.kernel} hung or crashed before")
            continue
        row = finished(task)
        try:
            # an error of the GPU's context stays, whoever words it, and would be held against the next kernel
            synchronize()
        except Exception as failure:
            _end(row.reason or reason(failure))
        yield row


def finished(task: Task) -> Row:
    try:
        return task.run(task.row)
    except Exception as failure:
        return replace(task.row, status=FAILED, reason=reason(failure))


def reason(failure: Exception) -> str:
    line = (str(failure).strip().splitlines() or [""])[0]
    return f"{type(failure).__name__}: {line}"[:200]


def synchronize() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def _end(last_words: str) -> None:
    try:
        print(last_words, file=sys.stderr, flush=True)
    finally:  # no clean-up: it would wait for the GPU
        os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), required=True)
    parser.add_argument("--small", action="store_true", help="the sizes of a CPU on a GPU")
    options = parser.parse_args()
    end_with_parent()
    open_channel()
    order: dict[str, Any] = json.load(sys.stdin)
    done, died = ({tuple(key) for key in order[name]} for name in ("done", "died"))
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible; --device cpu runs the script in Triton's interpreter", file=sys.stderr)
        return 2
    if knobs.runtime.interpret:
        import interpreter_fixes

        interpreter_fixes.apply()
    measure.small = options.small
    known = tasks(device, options.sections)
    planned = [task for task in known if task.row.key not in done]
    if device.type == "cuda" and not knobs.runtime.interpret:
        planned = [task for task in with_compilation(planned) if task.row.key not in done]
    found = environment(device, "cpu, Triton interpreter")
    found |= {"source": source_digest(), "sizes": "full" if measure.full_size(device) else "small"}
    found["target"] = str(triton_target(device)[0])
    say({"environment": found, "plan": [asdict(task.row) for task in planned]})
    broken = {task.kernel for task in known if task.row.key in died}
    for row in run(planned, options.deadline, broken):
        say({"row": asdict(row)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
