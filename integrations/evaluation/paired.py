"""Whether one run is better than another on the same questions, or whether the difference may be noise."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

N_RESAMPLES = 10_000
CONFIDENCE = 0.95
LEAST_CHANGED = 6
"""If m questions changed and all to the better, a two-sided sign test gives p = 2^(1 - m): below 0.05 from 6 on."""

Verdict = Literal["gain", "loss", "no gain shown"]


@dataclass(frozen=True)
class Difference:
    """Scores of the same questions in two runs.

    Attributes:
        n: questions.
        baseline, mean: mean score of the baseline and of the run.
        difference: mean - baseline.
        low, high: 95% interval of the difference, by the paired bootstrap.
        n_changed: questions whose score differs.
        verdict: "gain" or "loss" where the interval leaves out 0 and at least 6 questions changed, else
            "no gain shown".
    """

    n: int
    baseline: float
    mean: float
    difference: float
    low: float
    high: float
    n_changed: int
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interval(groups: Sequence[np.ndarray], *, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean over groups of the mean within each.

    Args:
        groups: the values of each group, (n_g,); each group is drawn again by itself, with replacement.
        seed: of the 10,000 draws.

    Raises:
        ValueError: there is no group, or one without a value.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("groups: expected one or more groups of one or more values, got an empty one")
    rng = np.random.default_rng(seed)
    means = np.zeros(N_RESAMPLES)
    for group in groups:
        values, counts = np.unique(np.asarray(group, dtype=float), return_counts=True)
        drawn = rng.multinomial(len(group), counts / len(group), N_RESAMPLES)  # how often each distinct value is drawn
        means += drawn @ values / len(group)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((means / len(groups)).round(12), (tail, 1 - tail))  # a sum that cancels is 0
    return float(low), float(high)


def compare(scores: np.ndarray, baseline: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> Difference:
    """Compares two runs question by question.

    Args:
        scores, baseline: (n,) scores of the run and of the baseline, of the same questions in the same order.
        groups: (n,) a group for each question: means are then taken within each group first and over the groups after,
            as VSI-Bench does over its tasks. None for one group.
        seed: of the bootstrap.

    Raises:
        ValueError: the shapes differ, or there is no question.
    """
    scores, baseline = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    if scores.shape != baseline.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"scores and baseline: expected the same (n,) shape with n >= 1, got {scores.shape} and {baseline.shape}"
        )
    groups = np.zeros(len(scores), dtype=int) if groups is None else np.asarray(groups)
    members = [groups == group for group in np.unique(groups)]
    changes = scores - baseline
    low, high = interval([changes[member] for member in members], seed=seed)
    n_changed = int(np.count_nonzero(changes))
    verdict: Verdict = "no gain shown"
    if n_changed >= LEAST_CHANGED and (low > 0 or high < 0):
        verdict = "gain" if low > 0 else "loss"
    mean_before, mean_after = (float(np.mean([x[member].mean() for member in members])) for x in (baseline, scores))
    return Difference(
        n=len(scores),
        baseline=mean_before,
        mean=mean_after,
        difference=mean_after - mean_before,
        low=low,
        high=high,
        n_changed=n_changed,
        verdict=verdict,
    )
