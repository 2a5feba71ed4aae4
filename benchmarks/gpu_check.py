"""One command for a machine with a GPU: is every kernel right, and how fast is it beside what torch offers?

    python benchmarks/gpu_check.py --out DIR [--minutes 8] [--sections ...] [--device cpu]

Correctness of every op against an fp64 oracle comes first, then times of our kernels and of torch's, case by case in
order of importance until the minutes are used up; what is left then is written as skipped rows. All rows so far are in
DIR/gpu_check.json, DIR/gpu_check.csv and DIR/summary.md at any moment. A row without a correct result carries no time.

Everything that touches the device runs in a process of its own (helpers/worker.py), which is ended when it is silent
for too long; a kernel that hung or crashed is a row with its reason, and a new process goes on with the next kernel.
The exit status is 1 if a result of ours was wrong or missing. `--device cpu` runs the same code in Triton's interpreter
at tiny sizes, without times. `python benchmarks/plot.py DIR/gpu_check.csv --out DIR` draws the figures.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.helpers.record import FAILED, SKIPPED, TIME_BUDGET, Row, headline_table, write

ROOT = Path(__file__).resolve().parents[1]
WORKER = [sys.executable, str(ROOT / "benchmarks" / "helpers" / "worker.py")]
PATHS = (ROOT, ROOT / "src", ROOT / "tests", ROOT / "tests" / "kernels")
SECTIONS = ("ceiling", "correctness", "prefill", "decode", "backward", "scores")
START_SECONDS = 180.0
SILENCE_SECONDS = 90.0
GRACE_SECONDS = 15.0


def messages(command: list[str], device: str, log: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """What a worker says, until it ends; a last message with "died" if it did not end by itself and well.

    It is ended when silent for SILENCE_SECONDS (START_SECONDS before its first word), or GRACE_SECONDS past the
    deadline.
    """
    path = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    patience = START_SECONDS
    try:
        while True:
            left = max(deadline + GRACE_SECONDS - time.time(), 0)
            try:
                line = lines.get(timeout=min(patience, left))
            except queue.Empty:
                yield {"died": TIME_BUDGET if left < patience else f"no answer within {patience:g} s"}
                return
            if line is None:
                if process.wait() != 0:
                    yield {"died": f"the process ended with status {process.returncode}: {_last_line(log)}"}
                return
            if line.startswith("{"):
                patience = SILENCE_SECONDS
                yield json.loads(line)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1][:200]


def collect(device: str, sections: list[str], out: Path, deadline: float) -> Iterator[dict[str, str] | Row]:
    """The environment, then a row for each task of the plan, from as many workers as it takes."""
    plan: list[dict[str, Any]] = []
    done, broken = 0, []
    while done < len(plan) or not plan:
        command = [*WORKER, "--device", device, "--deadline", str(deadline), "--start", str(done)]
        command += ["--sections", *sections, "--broken", *broken]
        died = None
        for message in messages(command, device, out / "worker.log", deadline):
            if "plan" in message:
                if not plan:
                    yield message["environment"]
                plan = message["plan"]
            elif "row" in message:
                done += 1
                yield Row(**message["row"])
            else:
                died = message["died"]
        if not plan:
            raise RuntimeError(f"the worker did not start: {died} (see {out / 'worker.log'})")
        if died is not None and died != TIME_BUDGET and done < len(plan):
            yield replace(Row(**plan[done]["row"]), status=FAILED, reason=died)
            broken.append(plan[done]["kernel"])
            done += 1
        if died is None or time.time() > deadline:
            break
    for task in plan[done:]:
        yield replace(Row(**task["row"]), status=SKIPPED, reason=TIME_BUDGET)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget of the whole run (default 8)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {options.minutes}")
    deadline = time.time() + 60 * options.minutes - GRACE_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "worker.log").unlink(missing_ok=True)
    environment: dict[str, str] = {}
    rows: list[Row] = []
    ceilings: dict[str, float] = {}
    try:
        for item in collect(options.device, options.sections, options.out, deadline):
            if isinstance(item, dict):
                environment = item
                continue
            if item.section == "ceiling" and item.rate is not None:
                ceilings[item.unit] = item.rate
            elif item.rate is not None and item.unit in ceilings:
                item = replace(item, share=item.rate / ceilings[item.unit])
            rows.append(item)
            print(item.line(), flush=True)
            write(options.out, environment, rows)
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    print(f"\n{headline_table(rows)}\n")
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "wrong", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"-> {options.out}")
    return 1 if not rows or any(row.bad for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
