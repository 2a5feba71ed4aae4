"""How fast is the self-expression on a CPU, beside the textbook ADMM, at the same distance from the optimum?

    python benchmarks/scores/speed.py --out DIR [--sizes 512 1024 2048] [--targets 1e-2 1e-3] [--minutes 60]

Tokens as a vision encoder leaves them (`token_sets.vit_like`), rank 64, affine, published weights. The optimum of some
tokens is certified first (helpers/reference.py); a result of ours that is further from it than promised is "wrong" and
gets no time. A target bounds the relative distance of the objective from the optimum.

The textbook ADMM solves an N x N system in each iteration, with the published penalty 300, in float64. Some of its
iterations are timed. How many it needs is counted on the certified tokens alone, whose iterates do not depend on the
others: until the first time that all of them are within the target. Ours must prove the target for every token, which
takes more iterations. The textbook's time to the target is the product of the two numbers and is marked as one, unless
--direct seconds are enough to run the factorised form to the end.

Writes DIR/ssc-speed.csv, .json, .md and .png after each size.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.helpers.record import FAILED, OK, SKIPPED, TIME_BUDGET, WRONG
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.peak_memory import PeakMemory
from benchmarks.scores.helpers.reference import Optimum, Problem, certified_optimum, objectives, textbook_iterates
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.solver import SelfExpression, self_expression

NAME = "ssc-speed"
ALPHA = 800.0
TEXTBOOK, FACTORISED = "textbook, N x N solve in each iteration", "textbook, factorised once"
AUTHORS = "authors' iterates and stopping rule"
OURS = {
    "ours, dense, float64": ("dense", torch.float64),
    "ours, dense": ("dense", torch.float32),
    "ours, blocked": ("blocked", torch.float32),
    "ours, working set": ("working-set", torch.float32),
}
# Coefficients of the textbook and of ours after the same iterations differ by roundoff only.
SAME_ITERATES = 1e-9
MOST_SOLVER_ITERATIONS = 100_000
CHECK_EVERY = 10
REPEAT_SECONDS, MOST_RUNS = 10.0, 3
TEXTBOOK_SECONDS, LEAST_ITERATIONS, MOST_ITERATIONS = 20.0, 3, 10


@dataclass(frozen=True)
class Row:
    """A contender at a target. `distance` is the largest of a checked token: (objective - lower bound) / objective."""

    tokens: int
    rank: int
    contender: str
    target: float | None
    status: str = SKIPPED
    iterations: int | None = None
    ms_per_iteration: float | None = None
    seconds: float | None = None
    product: bool = False
    distance: float | None = None
    peak_mib: float | None = None
    faster_per_iteration: float | None = None
    faster: float | None = None
    reason: str = ""

    def line(self) -> str:
        """The row for a terminal."""
        target = "own rule" if self.target is None else f"{self.target:g}"
        parts = [f"{self.status:7} N={self.tokens} {self.contender}, target {target}"]
        if self.ms_per_iteration is not None:
            parts.append(f"{self.ms_per_iteration:.3g} ms an iteration")
        if self.seconds is not None:
            parts.append(f"{self.iterations} iterations, {self.seconds:.3g} s{' (product)' if self.product else ''}")
        if self.distance is not None:
            parts.append(f"distance {self.distance:.2g}")
        return "  ".join([*parts, self.reason])


class OutOfTimeError(Exception):
    """The deadline passed during a run."""


@dataclass(frozen=True)
class Bench:
    """A problem with its certified optimum, and when to stop."""

    Y: torch.Tensor
    problem: Problem
    optimum: Optimum
    deadline: float

    def solve(self, dtype: torch.dtype, **options: Any) -> SelfExpression:
        def progress(*_: object) -> None:
            if time.time() > self.deadline:
                raise OutOfTimeError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            settings: dict[str, Any] = {"max_iter": MOST_SOLVER_ITERATIONS} | options
            return self_expression(self.Y, SolverOptions(**settings), dtype=dtype, progress=progress)

    def timed(self, dtype: torch.dtype, **options: Any) -> tuple[SelfExpression, float]:
        start = time.perf_counter()
        solution = self.solve(dtype, **options)
        return solution, time.perf_counter() - start

    def distance(self, C: np.ndarray) -> float:
        """The largest distance of the checked tokens, given their coefficients (N, n)."""
        values = objectives(self.problem, C, self.optimum.tokens)
        return float(np.max(1 - self.optimum.lower / values))

    def distance_of(self, solution: SelfExpression) -> float:
        tokens = self.optimum.tokens
        C = np.zeros((self.Y.shape[1], len(tokens)))
        indices, values = solution.indices[tokens].numpy(), solution.values[tokens].double().numpy()
        for i in range(len(tokens)):
            np.add.at(C[:, i], indices[i], values[i])
        return self.distance(C)


def published_problem(Y: np.ndarray) -> Problem:
    """The affine problem with lambda_e = 800 / mu_e and lambda_z = 800 / mu_z by their definition."""
    norms = np.sort(np.abs(Y).sum(0))
    products = np.abs(Y.T @ Y)
    np.fill_diagonal(products, 0)
    return Problem(Y, ALPHA / norms[-2], ALPHA / products.max(0).min(), affine=True)


def measured(bench: Bench, row: Row, dtype: torch.dtype, **options: Any) -> Row:
    """The row of a run of ours: checked, then timed by the median of up to MOST_RUNS runs, the checked one included."""
    peak = PeakMemory()
    solution, seconds = bench.timed(dtype, **options)
    row = replace(row, iterations=solution.n_iter, distance=bench.distance_of(solution), peak_mib=peak.mib(), status=OK)
    promised = float(solution.gap.max()) if row.target is None else row.target
    if not solution.converged or row.distance is None or not row.distance <= promised:
        return replace(row, status=WRONG, reason=f"promised {promised:.2g}, {len(solution.unconverged)} unconverged")
    times = [seconds]
    while len(times) < MOST_RUNS and sum(times) < REPEAT_SECONDS and time.time() < bench.deadline:
        times.append(bench.timed(dtype, **options)[1])
    return replace(row, seconds=median(times), ms_per_iteration=1e3 * median(times) / solution.n_iter)


def textbook(bench: Bench, factorised: bool) -> tuple[Row, list[np.ndarray]]:
    """A row with the median time of an iteration and no target yet, and the coefficients after each iteration."""
    peak = PeakMemory()
    times: list[float] = []
    found: list[np.ndarray] = []
    iterates = textbook_iterates(bench.problem, factorised)
    while len(times) < LEAST_ITERATIONS or (len(times) < MOST_ITERATIONS and sum(times) < TEXTBOOK_SECONDS):
        start = time.perf_counter()
        C = next(iterates)
        times.append(time.perf_counter() - start)
        found.append(C)
    rank, n_tokens = bench.problem.Y.shape
    row = Row(n_tokens, rank, FACTORISED if factorised else TEXTBOOK, None, status=OK, peak_mib=peak.mib())
    return replace(row, ms_per_iteration=1e3 * median(times[1:])), found


def iterates_differ(bench: Bench, textbook_coefficients: list[np.ndarray]) -> float:
    """The largest difference of the textbook's coefficients and of algorithm="authors", after as many iterations."""
    ours = bench.solve(torch.float64, algorithm="authors", max_iter=len(textbook_coefficients)).to_dense().numpy()
    return float(np.abs(ours - textbook_coefficients[-1]).max())


def rows_of_size(bench: Bench, targets: list[float], direct: float) -> Iterator[Row]:
    """All rows of one problem, without the ratios."""
    rank, n_tokens = bench.problem.Y.shape
    plain, _ = textbook(bench, factorised=False)
    fast, coefficients = textbook(bench, factorised=True)
    difference = iterates_differ(bench, coefficients)
    if difference > SAME_ITERATES:
        wrong = {
            "status": WRONG,
            "reason": f"not the iterates of algorithm='authors': {difference:.2g}",
        }
        plain, fast = replace(plain, **wrong), replace(fast, **wrong)
    run = partial(measured, bench)
    yield attempt(Row(n_tokens, rank, AUTHORS, None), partial(run, dtype=torch.float64, algorithm="authors"))
    needed = iterations_needed(bench, targets)
    for target in targets:
        for timed in (plain, fast):
            yield textbook_to_target(bench, replace(timed, target=target), needed.get(target), direct)
        for contender, (algorithm, dtype) in OURS.items():
            options = {"dtype": dtype, "algorithm": algorithm, "tol": target}
            yield attempt(Row(n_tokens, rank, contender, target), partial(run, **options))


def iterations_needed(bench: Bench, targets: list[float]) -> dict[float, tuple[int, float]]:
    """The textbook's iterations until all checked tokens are within each target, and their distance then.

    A target that is not reached before the deadline is left out.
    """
    found: dict[float, tuple[int, float]] = {}
    for n_iter, C in enumerate(textbook_iterates(bench.problem, True, bench.optimum.tokens), start=1):
        if n_iter % CHECK_EVERY == 0:
            distance = bench.distance(C)
            found |= {target: (n_iter, distance) for target in targets if distance <= target and target not in found}
            if len(found) == len(targets) or time.time() > bench.deadline:
                break
    return found


def attempt(row: Row, run: Callable[[Row], Row]) -> Row:
    """What the run makes of the row, or the row with the reason why it made nothing."""
    try:
        return run(row)
    except OutOfTimeError:
        return replace(row, reason=TIME_BUDGET)
    except Exception as failure:
        return replace(row, status=FAILED, reason=f"{type(failure).__name__}: {failure}")


def textbook_to_target(bench: Bench, row: Row, needed: tuple[int, float] | None, direct: float) -> Row:
    """The textbook's time to the target: run, if `direct` seconds are enough, else iterations * time of one."""
    if row.status != OK or row.ms_per_iteration is None:
        return row
    if needed is None:
        return replace(row, reason="its iterations were not counted: time budget")
    iterations, distance = needed
    seconds = iterations * row.ms_per_iteration / 1e3
    row = replace(row, iterations=iterations, distance=distance)
    if row.contender == TEXTBOOK or seconds > min(direct, bench.deadline - time.time()):
        return replace(row, seconds=seconds, product=True)
    start = time.perf_counter()
    C = next(islice(textbook_iterates(bench.problem, factorised=True), iterations - 1, None))
    return replace(row, seconds=time.perf_counter() - start, distance=bench.distance(C[:, bench.optimum.tokens]))


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with how many times faster they are than the unfactorised textbook, an iteration and to the target."""
    base = {(row.tokens, row.target): row for row in rows if row.contender == TEXTBOOK and row.status == OK}

    def ratio(theirs: float | None, mine: float | None) -> float | None:
        return theirs / mine if theirs and mine else None

    def compared(row: Row) -> Row:
        plain = base.get((row.tokens, row.target))
        if plain is None or row.status != OK:
            return row
        an_iteration = ratio(plain.ms_per_iteration, row.ms_per_iteration)
        return replace(row, faster_per_iteration=an_iteration, faster=ratio(plain.seconds, row.seconds))

    return [compared(row) for row in rows]


def summary(rows: list[Row], certified: dict[int, str]) -> str:
    """Markdown: the two aims, and the tables."""
    parts = ["# Self-expression on a CPU", *certified.values(), *aims(rows)]
    columns: dict[str, Callable[[Row], object]] = {
        "contender": lambda row: row.contender,
        "target": lambda row: "own rule" if row.target is None else row.target,
        "iterations": lambda row: row.iterations,
        "ms an iteration": lambda row: row.ms_per_iteration,
        "seconds": lambda row: f"{row.seconds:.3g}{' (product)' if row.product else ''}" if row.seconds else None,
        "distance from the optimum": lambda row: row.distance,
        "peak MiB": lambda row: row.peak_mib,
        "times faster, an iteration": lambda row: row.faster_per_iteration,
        "times faster, to the target": lambda row: row.faster,
        "": lambda row: "" if row.status == OK else f"{row.status}: {row.reason}",
    }
    for size in dict.fromkeys(row.tokens for row in rows):
        parts.append(f"## N = {size}\n\n{report.table([row for row in rows if row.tokens == size], columns)}")
    return "\n\n".join(parts)


def aims(rows: list[Row]) -> Iterator[str]:
    """A sentence for each size: how ours compares with the textbook an iteration, and with the published settings."""
    for size in dict.fromkeys(row.tokens for row in rows):
        here = [row for row in rows if row.tokens == size and row.status == OK]
        ratios = [row.faster_per_iteration for row in here if row.contender == "ours, dense"]
        authors = next((row for row in here if row.contender == AUTHORS), None)
        if ratios and ratios[0] is not None:
            yield f"N = {size}: an iteration of ours (dense, float32) takes 1 / {ratios[0]:.3g} of the textbook's."
        if authors is not None and authors.distance is not None:
            nearer = [row for row in here if row.contender == "ours, dense" and (row.distance or 1) < authors.distance]
            said = [f"ours {row.iterations}, at {row.distance:.2g}" for row in nearer]
            yield (
                f"N = {size}: the published settings stop after {authors.iterations} iterations at a distance of "
                f"{authors.distance:.2g} from the optimum; {'; '.join(said) or 'no row of ours is nearer'}."
            )


def draw(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """Time of an iteration, and time to the smallest target, against the number of tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.8))
    smallest = min(row.target for row in rows if row.target is not None)
    right_title = f"time to a distance of {smallest:g} from the optimum"
    contenders = [TEXTBOOK, FACTORISED, *OURS]
    for number, name in enumerate(contenders):
        here = [row for row in rows if row.contender == name and row.target == smallest and row.status == OK]
        dashed = name in (TEXTBOOK, FACTORISED)
        report.line(
            left, number, name, [(x.tokens, x.ms_per_iteration / 1e3) for x in here if x.ms_per_iteration], dashed
        )
        report.line(right, number, name, [(x.tokens, x.seconds) for x in here if x.seconds], dashed)
    for panel, title in ((left, "time of one iteration"), (right, right_title)):
        sizes = sorted({row.tokens for row in rows})
        panel.set(xscale="log", yscale="log", title=title, xlabel="tokens", ylabel="seconds")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
    report.save(figure, path, measured_on, left)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048], help="numbers of tokens")
    parser.add_argument("--rank", type=int, default=64, help="principal components (default 64)")
    parser.add_argument("--targets", type=float, nargs="+", default=[1e-2, 1e-3], help="relative distances")
    parser.add_argument("--checked", type=int, default=128, help="tokens whose optimum is certified (default 128)")
    parser.add_argument("--direct", type=float, default=120.0, help="seconds that the textbook may take (default 120)")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget of the whole run (default 60)")
    options = parser.parse_args(arguments)
    deadline = time.time() + 60 * options.minutes
    measured_on = environment(torch.device("cpu"), processor())
    rows: list[Row] = []
    certified: dict[int, str] = {}
    for size in options.sizes:
        tokens = token_sets.vit_like(size).X
        Y = token_features(torch.from_numpy(tokens), options.rank)
        problem = published_problem(Y.numpy())
        chosen = np.random.default_rng(0).permutation(len(tokens))[: options.checked]
        bench = Bench(Y, problem, certified_optimum(problem, chosen), deadline)
        certified[size] = f"N = {size}: the optimum of {len(chosen)} tokens is known to {bench.optimum.gap:.1e}."
        print(certified[size], flush=True)
        for row in rows_of_size(bench, options.targets, options.direct):
            print(row.line(), flush=True)
            rows.append(row)
        rows = with_ratios(rows)
        report.write(options.out, NAME, measured_on, rows, summary(rows, certified))
        draw(rows, options.out / f"{NAME}.png", measured_on)
    print("\n".join(aims(rows)), f"-> {options.out}")
    return 1 if any(row.status in (WRONG, FAILED) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
