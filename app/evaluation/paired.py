"""Whether one run is better than another on the same questions, or whether the difference may be noise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

N_RESAMPLES = 10_000
SEED = 0
"""Of the bootstrap; no report uses another."""
LEAST_CHANGED = 6
"""If m videos changed and all to the better, a two-sided sign test gives p = 2^(1 - m): below 0.05 from 6 on."""
ALL, MEAN_OF_TYPES = "all questions", "mean of types"
_DRAWS_AT_ONCE = 1000
"""Bounds the memory: 40 MB for 5,000 videos that all differ."""


@dataclass(frozen=True)
class Difference:
    """Scores of the same questions in two runs.

    Attributes:
        n, n_videos: questions, and the videos that they are about.
        baseline, mean: mean score of the baseline and of the run.
        difference: mean - baseline.
        low, high: 95% interval of the difference, see `interval`.
        n_changed: questions whose score differs.
        n_videos_changed: videos whose questions, taken together, differ.
        verdict: "gain" or "loss" where the interval leaves out 0 and at least 6 videos changed, else "no gain shown".
    """

    n: int
    n_videos: int
    baseline: float
    mean: float
    difference: float
    low: float
    high: float
    n_changed: int
    n_videos_changed: int
    verdict: Literal["gain", "loss", "no gain shown"]


def tails(n: int) -> tuple[float, float]:
    """The shares of the bootstrap distribution of `n` draws at which a 95% interval ends: 0.025 and 0.975 for many
    draws, further out for few, by as much as Student's t with its unbiased variance is wider than the normal
    distribution (Hesterberg, "What Teachers Should Know About the Bootstrap", Am. Stat. 69, 2015).

    Example:
        >>> tuple(round(tail, 4) for tail in tails(20))
        (0.0159, 0.9841)
    """
    from scipy.stats import norm, t

    low = float(norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))) if n > 1 else 0.025
    return low, 1 - low


def interval(sums: np.ndarray, counts: np.ndarray, *, seed: int = SEED) -> tuple[float, float]:
    """The 95% expanded percentile interval of a mean over groups of the mean within each, by the cluster bootstrap.

    Questions about one video stand or fall together: whole videos are drawn, with replacement, as many as there are,
    with all questions of all groups (Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69, 2007;
    on clusters in evaluations see Miller, "Adding Error Bars to Evals", arXiv 2411.00640). A group of which a draw has
    no question is left out of the mean of that draw. Of few videos the plain percentiles would lie too close together,
    see `tails`.

    It has no width for one video.

    Args:
        sums, counts: (videos, groups) sum of the values of each video in each group, and how many there are.
    """
    n_videos, n_groups = sums.shape
    distinct, repeats = np.unique(np.hstack([sums, counts]), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    draws = (
        rng.multinomial(n_videos, repeats / n_videos, _DRAWS_AT_ONCE) for _ in range(N_RESAMPLES // _DRAWS_AT_ONCE)
    )
    totals = np.concatenate([times @ distinct for times in draws])  # how often each distinct video is drawn
    with np.errstate(invalid="ignore"):
        means = np.nanmean(totals[:, :n_groups] / totals[:, n_groups:], axis=1)
    low, high = np.quantile(means.round(12), tails(n_videos))  # a sum that cancels is 0
    return float(low), float(high)


def interval_text(low: str, high: str, n_videos: int) -> str:
    """For people: with one video nothing is known of others."""
    return f"{low} to {high}" if n_videos > 1 else "? (one video)"


def compare(
    scores: np.ndarray, baseline: np.ndarray, videos: np.ndarray, groups: np.ndarray | None = None, *, seed: int = SEED
) -> Difference:
    """Compares two runs question by question.

    Args:
        scores, baseline: (n,) scores of the run and of the baseline, of the same questions in the same order.
        videos: (n,) what names the video of each question.
        groups: (n,) a group for each question: means are then taken within each group first and over the groups after,
            as VSI-Bench does over its tasks. None for one group.

    Raises:
        ValueError: the shapes differ, a score is not finite, or there is no question.
    """
    scores, baseline = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    groups = np.zeros(len(scores), dtype=int) if groups is None else np.asarray(groups)
    shapes = {one.shape for one in (scores, baseline, np.asarray(videos), groups)}
    if len(shapes) != 1 or scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"scores, baseline, videos and groups: expected the same (n,) shape with n >= 1, got {sorted(shapes)}"
        )
    changes = scores - baseline
    if not np.isfinite(changes).all():
        raise ValueError("scores and baseline: expected finite numbers; leave questions without an answer out of both")
    video_names, video = np.unique(videos, return_inverse=True)
    group_names, group = np.unique(groups, return_inverse=True)
    sums, counts = np.zeros((2, len(video_names), len(group_names)))
    np.add.at(sums, (video, group), changes)
    np.add.at(counts, (video, group), 1)
    low, high = interval(sums.round(12), counts, seed=seed)
    group_sizes = counts.sum(0)
    n_videos_changed = int(np.count_nonzero((sums / group_sizes).sum(1).round(12)))
    shown = n_videos_changed >= LEAST_CHANGED and (low > 0 or high < 0)
    before, after = (float((np.bincount(group, one) / group_sizes).mean()) for one in (baseline, scores))
    return Difference(
        n=len(scores),
        n_videos=len(video_names),
        baseline=before,
        mean=after,
        difference=after - before,
        low=low,
        high=high,
        n_changed=int(np.count_nonzero(changes)),
        n_videos_changed=n_videos_changed,
        verdict=("gain" if low > 0 else "loss") if shown else "no gain shown",
    )


def groups_of(types: np.ndarray, known: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The rows of a table of questions: all of them, the mean of the types (VSI-Bench's overall score), each type; one
    row where there is one type.

    Args:
        types: (n,) of each question.
        known: (n,) bool, questions with two scores; a type without any has no row.

    Returns:
        for each row its name, the (n,) bool mask of its questions, and the (n,) groups within which means are taken.
    """
    everything = np.ones(len(types), dtype=bool)
    rows = [(ALL, everything, everything)]
    if len(kinds := np.unique(types[known])) > 1:
        rows += [(MEAN_OF_TYPES, everything, types), *((str(kind), types == kind, everything) for kind in kinds)]
    return rows
