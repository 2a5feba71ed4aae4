"""The process of gpu_check.py that touches the device: says its plan, then a row of JSON after each task."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from benchmarks.attention.helpers.checks import correctness
from benchmarks.attention.helpers.contenders import attention_tasks
from benchmarks.attention.helpers.gradients import backward_tasks
from benchmarks.helpers.environment import environment
from benchmarks.helpers.measure import Task, ceiling_tasks
from benchmarks.helpers.record import FAILED, Row
from benchmarks.scores.helpers.gpu_tasks import score_tasks

SECTIONS = {
    "ceiling": ceiling_tasks,
    "correctness": correctness,
    "prefill": lambda device: attention_tasks("prefill", device),
    "decode": lambda device: attention_tasks("decode", device),
    "backward": backward_tasks,
    "scores": score_tasks,
}


def tasks(device: torch.device, sections: list[str]) -> list[Task]:
    """All tasks in the order in which they run: by section, times by importance across the sections."""
    chosen = [task for name, make in SECTIONS.items() if name in sections for task in make(device)]
    return sorted(chosen, key=lambda task: task.rank)


def poisoned(failure: Exception) -> bool:
    """Whether a failure leaves the process's GPU context unusable."""
    text = str(failure)
    return "out of memory" not in text and ("CUDA error" in text or "HIP error" in text)


def run(planned: list[Task], deadline: float, broken: list[str]) -> Iterator[Row]:
    """A row for each task until the deadline. A failure that poisons the process ends it, as a crash would."""
    for task in planned:
        if time.time() > deadline:
            return
        if task.kernel in broken:
            yield replace(task.row, status=FAILED, reason=f"not run: {task.kernel} hung or crashed before")
            continue
        try:
            row = task.run(task.row)
        except Exception as failure:
            line = (str(failure).strip().splitlines() or [""])[0]
            row = replace(task.row, status=FAILED, reason=f"{type(failure).__name__}: {line}"[:200])
            if poisoned(failure):
                print(row.reason, file=sys.stderr, flush=True)
                os._exit(1)
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--start", type=int, required=True, help="index of the first task to run")
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), required=True)
    parser.add_argument("--broken", nargs="*", default=[], help="kernels that are not to be run again")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible; --device cpu runs the script in Triton's interpreter", file=sys.stderr)
        return 2
    if device.type == "cpu":
        import interpreter_fixes

        interpreter_fixes.apply()
    planned = tasks(device, options.sections)
    plan = [{"row": asdict(task.row), "kernel": task.kernel} for task in planned]
    print(json.dumps({"environment": environment(device, "cpu, Triton interpreter"), "plan": plan}), flush=True)
    for row in run(planned[options.start :], options.deadline, options.broken):
        print(json.dumps({"row": asdict(row)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
