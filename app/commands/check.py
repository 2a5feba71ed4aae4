"""`videoanchor check`: whether this machine computes rightly, and how fast, in about a minute."""

import argparse
import time
from typing import Any

from ...integrations.errors import InputError
from .progress_line import ProgressLine
from .shared import Commands, machine_lines

JOBS = 4


def add(commands: Commands) -> None:
    """Adds the command."""
    check = commands.add_parser(
        "check",
        help="in about a minute: is the attention right on this machine, and how fast is it",
        description="Runs each form of the attention against its dense form in fp64, prefill and decode beside torch's "
        "SDPA, and the scores of 648 tokens. The exit code is 0 where all of it is right, else 1.",
    )
    check.add_argument("--device", default="auto", help="auto (the first GPU, or else the CPU), cpu, cuda or cuda:N")
    check.add_argument("--json", action="store_true", help="the same for programs, on standard output")
    check.set_defaults(command=_check)


def _check(args: argparse.Namespace) -> int:
    from ..check.report import lines
    from ..text import json_text

    progress = ProgressLine(True)
    try:
        report = examine(args.device, progress)
    finally:
        progress.close()
    print(json_text(report) if args.json else "\n".join([*machine_lines(report), "", *lines(report)]))
    return 0 if report["right"] else 1


def examine(device: str, progress: ProgressLine) -> dict[str, Any]:
    """What is found, as `--json` has it. Nothing of the device is touched by this process.

    Raises:
        InputError: there is no such device.
        OSError: the device cannot be opened.
    """
    from ..check.children import Children
    from ..check.report import failures, verdict
    from ..threads import usable_cpus

    begun = time.monotonic()
    with Children(device) as children:

        def found(stage: str, kind: str, names: list[str], jobs: int = 1) -> list[dict[str, Any]]:
            rows: dict[str, dict[str, Any]] = {}
            progress(stage, 0, len(names))
            for task, answer in children.answers([f"{kind}: {name}" for name in names], jobs):
                rows[task] = answer
                progress(stage, len(rows), len(names))
            return [{"name": name, "status": "failed", **rows[f"{kind}: {name}"]} for name in names]

        (report,) = found("the device", "machine", [device])
        if "refused" in report:
            raise InputError(report["refused"])
        if "reason" in report:
            raise OSError(f"the device cannot be used: {report['reason']}")
        compiled = report["kernels"] == "compiled"
        # kernels are compiled side by side, and timed one after the other
        forms = found("attention", "form", report["forms"], min(JOBS, usable_cpus()) if compiled else 1)
        times = found("times", "time", ["prefill", "decode"])
        (scores,) = found("scores", "scores", ["scores of 648 tokens"])
    whole = {
        **{name: report[name] for name in ("versions", "devices", "kernels", "unused")},
        "forms": forms,
        "times": times,
        "scores": scores,
        "seconds": time.monotonic() - begun,
    }
    return {"right": not failures(whole), "verdict": verdict(whole), **whole}
