"""Scores of a long video within a memory budget: seconds, peak memory and certificates, beside another revision.

    python benchmarks/scores/long_video.py --out DIR [--tokens 100000] [--ranks 16 64] [--against fa832ec]
    python benchmarks/scores/long_video.py --out DIR --whole --against none

All tokens of a long video take a CPU half an hour and more. So --sample tokens are solved over all the others, each
revision in a process of its own, in turn: what a token takes does not depend on how many are solved; the peak holds
what the solver needs for a block of the full size, and not the spectral step. --whole scores all tokens, from PCA to
scores.

Tokens as a vision encoder leaves them (`token_sets.vit_like`). Peaks are of the whole process beyond the tokens, PCA
included; `s` is processor seconds of the solver, one thread, the penalty weights, which look at all pairs of tokens
once, apart (--whole: wall time, with them). The exit status is 1 if a token has no certificate, or the
peak is above --most-gib.

Writes DIR/scores-long-video.csv, .json and .md; the same command goes on where it ended.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.helpers.record import FAILED, OK, WRONG
from benchmarks.helpers.resume import RefusedError
from benchmarks.scores.helpers.resumed import Results
from benchmarks.scores.helpers.revisions import ROOT, FailedError, Revision, checkout

NAME = "scores-long-video"
NOW = "now"
KEY = ("tokens", "rank", "revision", "whole", "turn")


@dataclass(frozen=True)
class Row:
    """A revision on the tokens; see the top of this file. `ratio` is the other revision's time over ours."""

    tokens: int
    rank: int
    revision: str
    whole: bool
    turn: int
    solved: int
    budget_mib: float
    status: str = FAILED
    solve_seconds: float | None = None
    ms_a_token: float | None = None
    peak_mib: float | None = None
    gap: float | None = None
    unconverged: int | None = None
    iterations: int | None = None
    mean_iterations: float | None = None
    weights_seconds: float | None = None
    ratio: float | None = None
    reason: str = ""


def measured(row: Row, worker: Revision) -> Row:
    """The row of one run, without a time where a token has no certificate."""
    try:
        found = worker.ask(
            data="vit", tokens=row.tokens, rank=row.rank, tol=1e-3, memory_budget=int(row.budget_mib * 2**20),
            sample=None if row.whole else row.solved, checked=0,
        )  # fmt: skip
    except FailedError as failure:
        return replace(row, reason=str(failure))
    row = replace(
        row, solved=found["rows"], gap=found["gap"], unconverged=found["unconverged"], iterations=found["iterations"],
        mean_iterations=found["mean_iterations"], peak_mib=found["peak_mib"],
    )  # fmt: skip
    if row.unconverged:
        return replace(row, status=WRONG, reason=f"{row.unconverged} of {row.solved} tokens are not certified")
    seconds = found["seconds"]["solve"] if row.whole else found["solve_cpu"]
    return replace(
        row, status=OK, solve_seconds=seconds, ms_a_token=1e3 * seconds / row.solved,
        weights_seconds=found.get("weights_cpu"),
    )  # fmt: skip


def summary(rows: list[Row]) -> str:
    """Markdown: one table."""
    columns: dict[str, Callable[[Row], object]] = {
        "tokens": lambda row: row.tokens,
        "rank": lambda row: row.rank,
        "solved": lambda row: "whole" if row.whole else f"{row.solved} over the others",
        "revision": lambda row: row.revision,
        "s (solver)": lambda row: row.solve_seconds,
        "ms a token": lambda row: row.ms_a_token,
        "s (penalty weights)": lambda row: row.weights_seconds,
        "ratio": lambda row: row.ratio,
        "peak MiB beyond the tokens": lambda row: row.peak_mib,
        "largest gap": lambda row: row.gap,
        "iterations, mean": lambda row: row.mean_iterations,
        "at most": lambda row: row.iterations,
        "": lambda row: "" if row.status == OK else f"{row.status}: {row.reason}",
    }
    budget = f"Budget of the solver {rows[0].budget_mib:g} MiB."
    return f"# Scores of a long video within a memory budget\n\n{budget}\n\n{report.table(rows, columns)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000], help="numbers of tokens (default 100000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64], help="principal components (default 16 64)")
    parser.add_argument("--memory-gib", type=float, default=1.0, help="budget of the solver in GiB (default 1)")
    parser.add_argument("--most-gib", type=float, default=1.5, help="peak that the process may have (default 1.5)")
    parser.add_argument("--sample", type=int, default=512, help="tokens that are solved (default 512)")
    parser.add_argument("--turns", type=int, default=1, help="runs of each revision, in turn (default 1)")
    parser.add_argument("--whole", action="store_true", help="all tokens, from PCA to scores")
    parser.add_argument("--against", default="fa832ec", help='a commit, the folder of a working tree, or "none"')
    parser.add_argument("--anew", action="store_true", help="replace the results of earlier calls")
    options = parser.parse_args(arguments)
    measured_on = environment(torch.device("cpu"), processor())
    try:
        results = Results(options.out, NAME, Row, KEY, measured_on, summary, options.anew)
        with tempfile.TemporaryDirectory() as folder:
            sources = {} if options.against == "none" else {options.against: checkout(options.against, Path(folder))}
            run(results, sources | {NOW: ROOT / "src"}, options)
    except (RefusedError, FailedError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    print(f"-> {options.out}")
    ours = [row for row in results.rows if row.revision == NOW]
    kept = all(row.status == OK and (row.peak_mib or 0) <= 1024 * options.most_gib for row in ours)
    return 0 if kept else 1


def run(results: Results, sources: dict[str, Path], options: argparse.Namespace) -> None:
    """The rows that are not there yet; each run in a new process, so that its peak is its own."""
    for n_tokens in options.tokens:
        for rank in options.ranks:
            for turn in range(options.turns):
                times: list[float | None] = []
                for name, src in sources.items():
                    if results.known(tokens=n_tokens, rank=rank, revision=name, whole=options.whole, turn=turn):
                        continue
                    solved = n_tokens if options.whole else options.sample
                    row = Row(n_tokens, rank, name, options.whole, turn, solved, 1024 * options.memory_gib)
                    with Revision(src) as worker:
                        row = measured(row, worker)
                    times.append(row.solve_seconds)
                    if name == NOW and len(times) == 2 and times[0] and times[1]:
                        row = replace(row, ratio=times[0] / times[1])
                    results.add(row)
                    print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
