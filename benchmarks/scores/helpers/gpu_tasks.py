"""The scores in gpu_check.py: distance from the certified optimum first, then the whole, seconds by stage, and how many
kernels an iteration launches.

Tokens as a vision encoder leaves them, rank 64, default settings. On a CPU the same code runs at a tiny size without
times, and torch's operators are counted in place of launches.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import videoanchor_triton as va
from benchmarks.helpers.channel import alive
from benchmarks.helpers.measure import Task, full_size, judged, with_peak
from benchmarks.helpers.record import OK, WRONG, Row
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.reference import Optimum, Problem, certified_optimum, objectives
from videoanchor_triton.anchor.problem import penalty_weights, token_features
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.anchor.timing import Progress

CHECKED_TOKENS = 16
STAGES = ("pca", "solve", "spectral", "score")
LEAST_RUNS, REPEAT_SECONDS = 3, 10.0
# How long a stage may be silent (the spectral step of 65,536 tokens, on the CPU), and how often it says something.
STAGE_SECONDS, SAY_EVERY = 240.0, 10.0
LAUNCHES = ("LaunchKernel", "GraphLaunch")  # in the names of the driver's and the runtime's calls


def score_tasks(device: torch.device) -> Iterator[Task]:
    """For each number of tokens: the check, the whole with its stages, and the launches of an iteration."""
    sizes = {2048: 0, 8192: 0, 16384: 0, 65536: 1} if full_size(device) else {96: 0}
    for n_tokens, order in sizes.items():
        scores = Scores(n_tokens, device)
        runs = {
            "ours, distance from the optimum": scores.check,
            "ours, total": scores.total,
            **{f"ours, {stage}": scores.stage(stage) for stage in STAGES},
            "ours, an iteration": scores.iteration,
            "ours, launches": scores.launches,
        }
        for contender, run in runs.items():
            row = Row("scores", f"N={n_tokens} r={scores.config.pca_rank}", contender, keys=n_tokens)
            yield Task(row, f"{contender.split(',')[0]}, N={n_tokens}", run, order)


def saying(what: str) -> Progress:
    """A progress that tells the watching process, at each new stage and from time to time, that `what` is not hung."""
    last_stage, last_time = "", 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        if stage != last_stage or time.monotonic() - last_time > SAY_EVERY:
            last_stage, last_time = stage, time.monotonic()
            alive(f"{what}: {stage}, {done} of {total}", STAGE_SECONDS)

    return report


class Scores:
    """`anchor_scores` of N tokens. What a task needs of an earlier one is computed again in a new process."""

    def __init__(self, n_tokens: int, device: torch.device) -> None:
        self.n_tokens, self.device = n_tokens, device
        self.config = va.VideoAnchorConfig(
            alpha_k=0, alpha_v=0, pca_rank=64 if full_size(device) else 32, n_clusters=24
        )
        self.progress = saying(f"scores of {n_tokens} tokens")
        self.checked: Row | None = None
        self.runs: list[va.AnchorResult] = []

    def tokens(self) -> torch.Tensor:
        return torch.from_numpy(token_sets.vit_like(self.n_tokens).X).float().to(self.device)

    def check(self, row: Row) -> Row:
        """The largest distance of sampled tokens from their certified optimum; allowed is the tolerance."""
        Y = token_features(self.tokens(), self.config.pca_rank)
        solution = self_expression(Y, self.config, progress=self.progress)
        problem, optimum = self.optimum
        indices, values = (part[optimum.tokens].cpu().numpy() for part in (solution.indices, solution.values))
        distance = 1 - optimum.lower / objectives(problem, indices, values, optimum.tokens)
        self.checked = judged(row, float(max(distance.max(), solution.gap.max())), self.config.tol)
        return self.checked

    @cached_property
    def optimum(self) -> tuple[Problem, Optimum]:
        problem = self.problem(token_features(self.tokens(), self.config.pca_rank))
        sampled = torch.randperm(self.n_tokens, generator=torch.Generator().manual_seed(0))[:CHECKED_TOKENS].numpy()
        found = []
        for i, token in enumerate(sampled):
            self.progress(f"optimum of token {token}", i, CHECKED_TOKENS)
            found.append(certified_optimum(problem, sampled[i : i + 1]))
        bounds = [np.concatenate([getattr(one, name) for one in found]) for name in ("lower", "upper")]
        return problem, Optimum(sampled, *bounds)

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
            self.runs.append(va.anchor_scores(tokens, self.config, progress=self.progress))
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

    def iteration(self, row: Row) -> Row:
        return self.of_runs(row, lambda result: result.seconds["solve"] / result.n_iter)

    def of_runs(self, row: Row, seconds: Callable[[va.AnchorResult], float]) -> Row:
        if not self.runs:
            whole = self.total(row)
            if whole.status != OK:
                return whole
        return self.with_times(replace(row, status=OK), [seconds(result) for result in self.runs])

    def launches(self, row: Row) -> Row:
        """Kernels and graphs that the solver launches, over the iterations of the slowest token."""
        whole = self.checked or self.check(row)
        if whole.status != OK:
            return replace(whole, contender=row.contender)
        alive(f"launches of {self.n_tokens} tokens", STAGE_SECONDS)  # which are slow while they are counted
        Y = token_features(self.tokens(), self.config.pca_rank)
        counted = Launches(self.device)
        with counted:
            solution = self_expression(Y, self.config, progress=self.progress)
        if counted.n == 0 or solution.n_iter == 0:
            return replace(row, status=WRONG, reason="no launch was counted")
        what = "launches" if self.device.type == "cuda" else "operators"
        return replace(row, status=OK, rate=counted.n / solution.n_iter, unit=f"{what} an iteration")

    def with_times(self, row: Row, seconds: list[float]) -> Row:
        if row.status != OK or self.device.type != "cuda":
            return row
        p20, p50, p80 = np.quantile(1e3 * np.array(seconds), [0.2, 0.5, 0.8]).tolist()
        return replace(row, ms=p50, ms_p20=p20, ms_p80=p80, unit="ms")


class Launches:
    """Counts what is launched within its block: on a GPU kernels and graphs, on a CPU operators of torch."""

    def __init__(self, device: torch.device) -> None:
        self.n = 0
        self._operators = None if device.type == "cuda" else Operators()
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def __enter__(self) -> "Launches":
        (self._operators or self._profile).__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        (self._operators or self._profile).__exit__(*raised)
        if self._operators is not None:
            self.n = self._operators.n
        else:
            events = self._profile.key_averages()
            self.n = sum(event.count for event in events if any(name in event.key for name in LAUNCHES))


class Operators(TorchDispatchMode):
    """Counts operators that compute something: views are free."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))
