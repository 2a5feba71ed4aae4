"""One command for a machine with a GPU: is every kernel right, and how fast is it beside what others offer?

    python benchmarks/gpu_check.py --out DIR [--minutes 8] [--sections ...] [--small] [--device cpu]

What matters most comes first: one call of each kernel, the models, mixed batches over pages (with each form of gates,
quantised caches, page sizes, the plan and the writing by themselves), decode, scores, prefill, backward, each checked
against an fp64 oracle just before it is timed, an engine of vLLM with the plug-in, then what torch offers, and
flash-attn and vLLM's Triton kernel where they are installed. Kernels are compiled many at a time before the first task
that needs them. A row without a correct result carries no time.

All rows so far are in DIR/gpu_check.json, DIR/gpu_check.csv and DIR/summary.md at any moment, whatever ends the run.
The same command goes on where it ended: what the minutes left out is run, what failed is not (--retry), and another
device, version or commit is refused (--anew starts over).

`--apply DIR ...` runs nothing: it writes the tiles and rules that the runs in these folders found faster, and the
devices whose every check was right, into kernels/measured.py, from where the kernels take them.

Everything that touches the device runs in a process of its own (helpers/worker.py), which is ended when it is silent
for too long; a kernel that hung or crashed is a row with its reason, and a new process goes on with the next kernel.
The exit status is 1 if a result of ours was wrong or missing, 2 if nothing could be run or written. `--small` runs
everything at tiny sizes on the GPU, `--device cpu` in Triton's interpreter, without times. `python benchmarks/plot.py
DIR/gpu_check.csv --out DIR` draws the figures.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.helpers import watch
from benchmarks.helpers.record import FAILED, SKIPPED, TIME_BUDGET, Row, headline_table, write
from benchmarks.helpers.resume import RefusedError, difference, earlier

ROOT = Path(__file__).resolve().parents[1]
WORKER = [sys.executable, str(ROOT / "benchmarks" / "helpers" / "worker.py")]
PATHS = (ROOT, ROOT / "src", *(ROOT / "tests" / part for part in ("", "kernels", "integrations/transformers")))
SECTIONS = ("ceiling", "sanity", "model", "correctness", "mixed", "decode", "scores", "prefill", "backward", "serving")


@dataclass
class Results:
    """The rows so far, on disk after each as far as the disk takes them."""

    out: Path
    environment: dict[str, Any]
    rows: list[Row]
    unwritten: str = ""

    def add(self, row: Row) -> None:
        self.rows.append(row)
        ceilings = {r.unit: r.rate for r in self.rows if r.section == "ceiling" and r.rate}
        if row.rate is not None and row.section != "ceiling" and row.unit in ceilings:
            self.rows[-1] = replace(row, share=row.rate / ceilings[row.unit])
        print(self.rows[-1].line(), flush=True)
        self.write()

    def write(self) -> None:
        try:
            write(self.out, self.environment, self.rows)
            self.unwritten = ""
        except OSError as failure:
            if not self.unwritten:
                print(f"warning: the rows from here on are not on disk yet: {failure}", file=sys.stderr, flush=True)
            self.unwritten = str(failure)


def collect(options: argparse.Namespace, results: Results, deadline: float) -> None:
    """Add a row for each task of the plan that has none yet, from as many workers as it takes."""
    before, log = results.environment, options.out / "worker.log"
    while True:
        planned: list[Row] = []
        left, died = 0, ""
        for message in _worker(options, results.rows, log, deadline):
            if "plan" in message:
                results.environment = message["environment"]
                if differs := before and difference(before, results.environment):
                    held = f"{options.out} holds results of another run"
                    raise RefusedError(f"{held} ({differs}): give another --out or --anew")
                planned = [Row(**row) for row in message["plan"]]
                left = len(planned)
            elif "row" in message:
                left -= 1
                results.add(Row(**message["row"]))
            elif "alive" in message:
                print(f"        ... {message['alive']}", flush=True)
            else:
                died = message["died"]
        if died and not planned:
            raise RefusedError(f"the worker did not start: {died} (see {log})")
        rest = planned[len(planned) - left :] if planned else []
        if died and died != TIME_BUDGET and rest:
            results.add(replace(rest.pop(0), status=FAILED, reason=died))
        if not rest or not died or time.time() > deadline:
            break
    for row in rest:
        results.add(replace(row, status=SKIPPED, reason=TIME_BUDGET))


def _worker(options: argparse.Namespace, rows: list[Row], log: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """The messages of a worker that leaves out the tasks that have a row."""
    path = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1", "VIDEOANCHOR_SELF_CHECK": "off"}
    settings |= {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}
    command = [*WORKER, "--device", options.device, "--deadline", str(deadline), "--sections", *options.sections]
    command += ["--small"] if options.small else []
    order = {"done": [row.key for row in rows], "died": [row.key for row in rows if row.died]}
    return watch.messages(command, os.environ | settings, order, log, deadline)


def _apply(folders: list[Path]) -> int:
    import torch  # not needed to watch a worker

    sys.path[:0] = map(str, PATHS)
    from benchmarks.attention.helpers.checks import correctness
    from benchmarks.helpers.apply import apply

    try:
        print(apply(folders, [task.row.key for task in correctness(torch.device("cuda"))]))
    except RefusedError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--apply", nargs="+", type=Path, metavar="DIR",
        help="run nothing: write what earlier runs in these folders decided into kernels/measured.py",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget of the whole run (default 8)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="the sizes of --device cpu on a GPU: does everything run?")
    parser.add_argument("--retry", action="store_true", help="run again what failed in an earlier call")
    parser.add_argument("--anew", action="store_true", help="replace the results of earlier calls")
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.apply is None):
        parser.error("give --out DIR to run, or --apply DIR to write what runs decided into kernels/measured.py")
    if options.apply:
        return _apply(options.apply)
    if not options.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {options.minutes}")
    deadline = time.time() + 60 * options.minutes - watch.GRACE_SECONDS
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "worker.log").write_text("")
        results = Results(options.out, *({}, []) if options.anew else earlier(options.out, options.retry))
        if results.rows:
            print(f"{len(results.rows)} rows of an earlier call stand", flush=True)
        collect(options, results, deadline)
    except (RefusedError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    if results.unwritten:
        results.write()
    print(f"\n{headline_table(results.rows)}\n")
    counts = {s: sum(row.status == s for row in results.rows) for s in ("ok", "wrong", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"-> {options.out}")
    if results.unwritten:
        print(f"error: not all rows above are in {options.out}: {results.unwritten}", file=sys.stderr)
        return 2
    return 1 if not results.rows or any(row.bad for row in results.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
