"""The scores in gpu_check.py: distance from the certified optimum first, then seconds by stage, the ways to solve, and
the textbook form.

Tokens as a vision encoder leaves them, rank 64, default settings. On a CPU the same code runs at a tiny size, NumPy in
place of CuPy, without times.
"""

import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

import videoanchor_triton as va
from benchmarks.helpers.measure import Task, full_size, judged, skip_for_memory, with_peak
from benchmarks.helpers.record import OK, SKIPPED, Row
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.reference import Optimum, Problem, certified_optimum, objectives, textbook_iterates
from videoanchor_triton.anchor.options import Algorithm, SolverOptions
from videoanchor_triton.anchor.problem import penalty_weights, token_features
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.anchor.timing import mark_time, seconds_between

CHECKED_TOKENS = 16
STAGES = ("pca", "solve", "spectral", "score")
ALGORITHMS: tuple[Algorithm, ...] = ("dense", "blocked", "working-set")
MOST_TOKENS_FOR_ALL = 16384  # beyond that only the one that "auto" chooses
LEAST_RUNS, REPEAT_SECONDS = 3, 10.0
TEXTBOOK_ITERATIONS = 3
# N x N float64 matrices that the textbook and its check hold at a time.
TEXTBOOK_MATRICES = 14
# The textbook's coefficients and those of algorithm="authors" differ by roundoff only.
SAME_ITERATES = 1e-8


def score_tasks(device: torch.device) -> Iterator[Task]:
    """For each number of tokens: the check, the whole with its stages, and an iteration of the textbook."""
    sizes = {2048: 0, 8192: 0, 16384: 0, 65536: 1} if full_size(device) else {96: 0}
    for n_tokens, order in sizes.items():
        scores = Scores(n_tokens, device)
        runs = {
            "ours, distance from the optimum": scores.check,
            "ours, total": scores.total,
            **{f"ours, {stage}": scores.stage(stage) for stage in STAGES},
            "ours, an iteration": scores.iteration,
            "textbook, an iteration": scores.textbook,
        }
        if n_tokens <= MOST_TOKENS_FOR_ALL:
            runs |= {f"ours, solve {algorithm}": scores.solve(algorithm) for algorithm in ALGORITHMS}
        for contender, run in runs.items():
            row = Row("scores", f"N={n_tokens} r={scores.config.pca_rank}", contender, keys=n_tokens)
            yield Task(row, f"{contender.split(',')[0]}, N={n_tokens}", run, order)


class Scores:
    """`anchor_scores` of N tokens. What a task needs of an earlier one is computed again in a new process."""

    def __init__(self, n_tokens: int, device: torch.device) -> None:
        self.n_tokens, self.device = n_tokens, device
        self.config = va.VideoAnchorConfig(
            alpha_k=0, alpha_v=0, pca_rank=64 if full_size(device) else 32, n_clusters=24
        )
        self.checked: Row | None = None
        self.runs: list[va.AnchorResult] = []

    def tokens(self) -> torch.Tensor:
        return torch.from_numpy(token_sets.vit_like(self.n_tokens).X).float().to(self.device)

    def check(self, row: Row) -> Row:
        self.checked = self.distance(row, self.config)
        return self.checked

    def distance(self, row: Row, config: va.VideoAnchorConfig) -> Row:
        """The largest distance of sampled tokens from their certified optimum; allowed is the tolerance."""
        solution = self_expression(token_features(self.tokens(), config.pca_rank), config.solver_options())
        problem, optimum = self.optimum
        indices = solution.indices[optimum.tokens].cpu().numpy()
        values = solution.values[optimum.tokens].double().cpu().numpy()
        C = np.zeros((self.n_tokens, CHECKED_TOKENS))
        for i in range(CHECKED_TOKENS):
            np.add.at(C[:, i], indices[i], values[i])
        distance = 1 - optimum.lower / objectives(problem, C, optimum.tokens)
        return judged(row, float(max(distance.max(), solution.gap.max())), config.tol)

    @cached_property
    def optimum(self) -> tuple[Problem, Optimum]:
        problem = self.problem(token_features(self.tokens(), self.config.pca_rank))
        sampled = torch.randperm(self.n_tokens, generator=torch.Generator().manual_seed(0))[:CHECKED_TOKENS].numpy()
        return problem, certified_optimum(problem, sampled)

    def problem(self, Y: torch.Tensor) -> Problem:
        weights = penalty_weights(Y, self.config.alpha_e, self.config.alpha_z)
        return Problem(Y.cpu().numpy(), *weights, self.config.affine)

    def total(self, row: Row) -> Row:
        """All stages, with the peak memory of torch's allocator (CuPy's own pool is not in it)."""
        checked = self.checked or self.check(row)
        if checked.status != OK:
            return replace(row, status=checked.status, reason=f"distance from the optimum: {checked.reason}")
        tokens = self.tokens()

        def run() -> torch.Tensor:
            self.runs.append(va.anchor_scores(tokens, self.config))
            return self.runs[-1].scores

        self.runs.clear()
        scores, peak = with_peak(run, self.device)
        if not bool(torch.isfinite(scores).all()):
            return judged(row, float("inf"), 1.0)
        spent = sum(self.runs[0].seconds.values())
        while len(self.runs) < LEAST_RUNS and spent < REPEAT_SECONDS:
            run()
            spent += sum(self.runs[-1].seconds.values())
        row = replace(row, status=OK, peak_extra_mib=peak)
        return self.with_times(row, [sum(result.seconds.values()) for result in self.runs])

    def stage(self, name: str) -> Callable[[Row], Row]:
        return lambda row: self.of_runs(row, lambda result: result.seconds[name])

    def solve(self, algorithm: Algorithm) -> Callable[[Row], Row]:
        """The solver in one of its ways, after its own check."""

        def run(row: Row) -> Row:
            config = replace(self.config, algorithm=algorithm)
            try:
                row = self.distance(row, config)
            except MemoryError as error:
                return replace(row, status=SKIPPED, reason=str(error))
            Y, seconds = token_features(self.tokens(), config.pca_rank), []
            while row.status == OK and len(seconds) < LEAST_RUNS and sum(seconds) < REPEAT_SECONDS:
                begin = mark_time(self.device)
                self_expression(Y, config.solver_options())
                seconds.append(seconds_between(begin, mark_time(self.device)))
            return self.with_times(row, seconds)

        return run

    def iteration(self, row: Row) -> Row:
        return self.of_runs(row, lambda result: result.seconds["solve"] / result.n_iter)

    def of_runs(self, row: Row, seconds: Callable[[va.AnchorResult], float]) -> Row:
        if not self.runs:
            whole = self.total(row)
            if whole.status != OK:
                return whole
        return self.with_times(replace(row, status=OK), [seconds(result) for result in self.runs])

    def textbook(self, row: Row) -> Row:
        """The authors' ADMM with its N x N solve in every iteration, float64; compared with algorithm="authors"."""
        if skipped := skip_for_memory(row, TEXTBOOK_MATRICES * 8.0 * self.n_tokens**2, self.device):
            return skipped
        xp: Any = np
        if self.device.type == "cuda":
            try:
                xp = importlib.import_module("cupy")
            except ImportError:
                return replace(row, status=SKIPPED, reason="CuPy is not installed")
        Y = token_features(self.tokens(), self.config.pca_rank)
        iterates = textbook_iterates(self.problem(Y), factorised=False, xp=xp)
        times, C = [], None
        for _ in range(TEXTBOOK_ITERATIONS):
            start = time.perf_counter()
            C = next(iterates)
            float(C[0, 0])  # waits for the device
            times.append(time.perf_counter() - start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            options = SolverOptions(algorithm="authors", max_iter=TEXTBOOK_ITERATIONS)
            ours = self_expression(Y, options, dtype=torch.float64).to_dense()
        theirs = torch.as_tensor(C, device=self.device)
        row = judged(row, float((ours - theirs).abs().max()), SAME_ITERATES)
        return self.with_times(row, times[1:])

    def with_times(self, row: Row, seconds: list[float]) -> Row:
        if row.status != OK or self.device.type != "cuda":
            return row
        p20, p50, p80 = np.quantile(1e3 * np.array(seconds), [0.2, 0.5, 0.8]).tolist()
        return replace(row, ms=p50, ms_p20=p20, ms_p80=p80, unit="ms")
