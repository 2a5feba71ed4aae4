"""How fast are whole scores on a CPU, beside another revision of this package, in one run?

    python benchmarks/scores/speed.py --out DIR [--against fa832ec] [--sizes 648 1024 2048 4096 8192] [--data vit photo]

Each revision has a process of its own (helpers/revision_worker.py), the same tokens, settings and number of threads,
and its own defaults otherwise; the two take turns. `--against` is a commit of this repository or the folder of another
working tree.

    whole    `anchor_scores`: PCA, solver, spectral step, score
    sample   above --whole tokens the solver alone, for --sample tokens: over the tokens that are not in the sample, in
             revisions that cannot do that over all others

A row has a time only if the package claims its tolerance for every token and --checked tokens are within it of an
optimum that is certified apart from the package (helpers/reference.py). Times are processor seconds of the process,
the least of --repeats runs; `seconds` is wall time. `ratio` is the other revision's processor time over ours, `goal`
what was to be reached; with more than one thread, it is of wall time, against one thread of ours that takes turns.

Writes DIR/scores-speed.csv, .json, .md and .png; the same command goes on where it ended.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.helpers.record import FAILED, OK, WRONG
from benchmarks.helpers.resume import RefusedError
from benchmarks.scores.helpers.resumed import Results
from benchmarks.scores.helpers.revisions import ROOT, FailedError, Revision, checkout

NAME = "scores-speed"
NOW, OTHER_WRONG = "now", "the other revision misses tokens"
KEY = ("data", "tokens", "rank", "tol", "threads", "revision")
# What was to be reached, by (rank, tolerance, tokens), with one thread; nothing may be slower.
GOALS = {(64, 1e-3, 1024): 1.6, (64, 1e-3, 2048): 2.8, (16, 1e-3, 1024): 5.0, (16, 1e-3, 2048): 3.0}
GOALS |= {(64, 1e-4, 1024): 4.0} | {(64, 1e-4, tokens): 3.0 for tokens in (2048, 4096, 8192)}


@dataclass(frozen=True)
class Row:
    """A revision on a set of tokens; see the top of this file. `distance` is the checked tokens' largest, known to
    `known_to`."""

    data: str
    tokens: int
    rank: int
    tol: float
    threads: int
    revision: str
    solved: int  # tokens that were solved: all, or those of the sample
    status: str
    cpu_seconds: float | None = None
    seconds: float | None = None
    ms_a_token: float | None = None
    gap: float | None = None
    unconverged: int | None = None
    distance: float | None = None
    known_to: float | None = None
    iterations: int | None = None
    mean_iterations: float | None = None
    ratio: float | None = None
    goal: float | None = None
    reason: str = ""

    @property
    def whole(self) -> bool:
        return self.solved == self.tokens

    def line(self) -> str:
        """The row for a terminal."""
        what = "whole" if self.whole else f"sample of {self.solved}"
        said = f"{self.status:6} {self.data} N={self.tokens} r={self.rank} tol={self.tol:g} {what}, {self.revision}"
        said += f", {self.threads} threads: " if self.threads > 1 else ": "
        if self.cpu_seconds is not None:
            said += f"{self.cpu_seconds:.3g} s, {self.ms_a_token:.3g} ms a token, {self.iterations} iterations at most"
        if self.ratio is not None:
            said += f", ratio {self.ratio:.2f}" + (f" (goal {self.goal:g})" if self.goal is not None else "")
        return f"{said} {self.reason}".rstrip()


def measured(row: Row, answers: list[dict[str, Any]]) -> Row:
    """The row of the runs of a revision: checked first, and the least time of those that are right."""
    worst = max(answers, key=lambda x: (x["unconverged"], x.get("distance", 0.0)))
    row = replace(
        row, solved=worst["rows"], gap=worst["gap"], unconverged=worst["unconverged"], iterations=worst["iterations"],
        mean_iterations=worst.get("mean_iterations"), distance=worst.get("distance"), known_to=worst.get("known_to"),
    )  # fmt: skip
    if row.unconverged or not (row.distance is None or row.distance <= row.tol + (row.known_to or 0.0)):
        said = f"{row.unconverged} of {row.solved} tokens are not within the tolerance by its own account"
        return replace(row, status=WRONG, reason=f"{said}, a checked one is {row.distance:.2g} from the optimum")
    cpu = min(x.get("solve_cpu", x["cpu"]) for x in answers)
    seconds = min(x["seconds"].get("solve", 0.0) if "solve_cpu" in x else x["seconds"]["whole"] for x in answers)
    return replace(row, status=OK, cpu_seconds=cpu, seconds=seconds, ms_a_token=1e3 * cpu / row.solved)


def attempt(row: Row, workers: dict[str, Revision], options: argparse.Namespace) -> list[Row]:
    """A row of each worker's revision; they take turns."""
    whole = row.tokens <= options.whole
    request = {name: getattr(row, name) for name in ("data", "tokens", "rank", "tol")}
    request |= {"memory_budget": None, "sample": None if whole else options.sample}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for turn in range(options.repeats):
        for name, worker in workers.items():
            try:
                answers[name].append(worker.ask(**request, checked=0 if turn else options.checked))
            except FailedError as failure:
                failed[name] = str(failure)
    rows = []
    for name, found in answers.items():
        mine = replace(row, revision=name)
        rows.append(replace(mine, status=FAILED, reason=failed[name]) if name in failed else measured(mine, found))
    return rows


def with_ratio(ours: Row, other: Row | None) -> Row:
    """Our row with the other revision's time over ours, and the goal."""
    goal = GOALS.get((ours.rank, ours.tol, ours.tokens), 1.0)
    if other is None or other.cpu_seconds is None or not ours.cpu_seconds:
        missed = other is not None and other.status == WRONG and ours.status == OK
        return replace(ours, goal=goal, reason=OTHER_WRONG if missed else ours.reason)
    return replace(ours, ratio=other.cpu_seconds / ours.cpu_seconds, goal=goal)


def summary(rows: list[Row]) -> str:
    """Markdown: the goals, and the tables."""
    columns: dict[str, Callable[[Row], object]] = {
        "tokens": lambda row: row.tokens,
        "solved": lambda row: "whole" if row.whole else f"sample of {row.solved}",
        "revision": lambda row: row.revision,
        "s (processor)": lambda row: row.cpu_seconds,
        "s (wall)": lambda row: row.seconds,
        "ms a token": lambda row: row.ms_a_token,
        "iterations, mean": lambda row: row.mean_iterations,
        "at most": lambda row: row.iterations,
        "largest gap": lambda row: row.gap,
        "distance, checked": lambda row: row.distance,
        "ratio": lambda row: row.ratio,
        "goal": lambda row: row.goal,
        "": lambda row: row.reason if row.status == OK else f"{row.status}: {row.reason}",
    }
    parts = ["# Scores on a CPU, beside another revision", verdict(rows)]
    for data, rank, tol, threads in dict.fromkeys((row.data, row.rank, row.tol, row.threads) for row in rows):
        here = [row for row in rows if (row.data, row.rank, row.tol, row.threads) == (data, rank, tol, threads)]
        title = f"## {data}, rank {rank}, gap {tol:g}, {threads} thread{'s' if threads > 1 else ''}"
        parts.append(f"{title}\n\n{report.table(here, columns)}")
    return "\n\n".join(parts)


def verdict(rows: list[Row]) -> str:
    """How many goals are reached, and which are not."""
    judged = [row for row in rows if row.revision == NOW and row.threads == 1]
    alone = [row for row in judged if row.reason == OTHER_WRONG]
    met = [row for row in judged if row.ratio is not None and row.goal is not None and row.ratio >= row.goal]
    missed = [row for row in judged if row not in met and row not in alone]
    said = f"{len(met)} of {len(judged)} goals are reached; {len(alone)} more have no ratio: {OTHER_WRONG}."
    return "\n".join([said, *(f"- {row.line()}" for row in missed)])


def draw(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """Milliseconds a token against the number of tokens, a panel for each rank and tolerance, the first data."""
    data = rows[0].data
    shown = [row for row in rows if row.data == data and row.threads == 1 and row.ms_a_token]
    panels = list(dict.fromkeys((row.rank, row.tol) for row in shown))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels) + 1, 4.4), squeeze=False)
    revisions = list(dict.fromkeys(row.revision for row in shown))
    for panel, (rank, tol) in zip(axes[0], panels, strict=True):
        for number, name in enumerate(revisions):
            here = [row for row in shown if (row.rank, row.tol, row.revision) == (rank, tol, name)]
            points = [(row.tokens, row.ms_a_token) for row in here if row.ms_a_token]
            report.line(panel, number, name, points, dashed=name != NOW)
        sizes = sorted({row.tokens for row in shown})
        panel.set(xscale="log", yscale="log", title=f"rank {rank}, gap {tol:g}", xlabel=f"tokens ({data})")
        panel.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        panel.minorticks_off()
    axes[0, 0].set_ylabel("ms a token, one thread")
    report.save(figure, path, measured_on, axes[0, 0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--against", default="fa832ec", help="a commit, or the folder of a working tree")
    parser.add_argument("--data", nargs="+", default=["vit"], choices=("vit", "photo", "digits"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[648, 1024, 2048, 4096, 8192], help="numbers of tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16], help="principal components")
    parser.add_argument("--tols", type=float, nargs="+", default=[1e-3, 1e-4], help="relative duality gaps")
    parser.add_argument("--threads", type=int, nargs="*", default=[2], help="further numbers of threads, ours alone")
    parser.add_argument("--whole", type=int, default=2048, help="most tokens that are scored whole (default 2048)")
    parser.add_argument("--sample", type=int, default=256, help="tokens of a sample (default 256)")
    parser.add_argument("--checked", type=int, default=8, help="tokens whose optimum is certified (default 8)")
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the least time counts (default 2)")
    parser.add_argument("--anew", action="store_true", help="replace the results of earlier calls")
    options = parser.parse_args(arguments)
    measured_on = environment(torch.device("cpu"), processor())
    try:
        results = Results(options.out, NAME, Row, KEY, measured_on, summary, options.anew)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            other = checkout(options.against, Path(folder))
            workers = {
                options.against: stack.enter_context(Revision(other)),
                NOW: stack.enter_context(Revision(ROOT / "src")),
            }
            more = {n: stack.enter_context(Revision(ROOT / "src", n)) for n in options.threads}
            for size in options.sizes:
                for data in options.data:
                    for rank in options.ranks:
                        for tol in options.tols:
                            run_case(results, Row(data, size, rank, tol, 1, NOW, size, FAILED), workers, more, options)
    except (RefusedError, FailedError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    draw(results.rows, options.out / f"{NAME}.png", measured_on)
    print(verdict(results.rows), f"-> {options.out}", sep="\n")
    return 1 if any(row.status != OK for row in results.rows if row.revision == NOW) else 0


def run_case(
    results: Results, row: Row, workers: dict[str, Revision], more: dict[int, Revision], options: argparse.Namespace
) -> None:
    """The rows of a case that are not there yet."""
    key = {name: getattr(row, name) for name in KEY}
    if not results.known(**key):
        other, ours = attempt(row, workers, options)
        for found in (other, with_ratio(ours, other)):
            results.add(found)
            print(found.line(), flush=True)
    for threads, worker in more.items():
        if row.tokens > options.whole or results.known(**key | {"threads": threads}):
            continue
        one, found = attempt(replace(row, threads=threads), {"one thread": workers[NOW], NOW: worker}, options)
        if found.seconds and one.seconds:
            found = replace(found, ratio=one.seconds / found.seconds)
        results.add(found)
        print(found.line(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
