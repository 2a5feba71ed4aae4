"""What a paired comparison could show, and the exact test where scores are right or wrong."""

from typing import NamedTuple

import numpy as np

POWER = 0.8
"""The chance at which `detectable` is stated, the customary one."""


class McNemar(NamedTuple):
    """Questions that only one of two runs has right.

    Attributes:
        only_first, only_second: how many.
        p: the two-sided exact p-value of McNemar's test; 1.0 where there are none.
    """

    only_first: int
    only_second: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar | None:
    """McNemar's exact test: of the questions that one run alone has right, each run is as likely to be that one.

    It takes questions as independent: where several are about one video, its p is too small, and the interval of
    `paired.compare` is the one to go by.

    Args:
        first, second: (n,) scores of the same questions.

    Returns:
        None where a score is neither 0 nor 1.

    Example:
        >>> mcnemar(np.array([1, 1, 0, 0, 0]), np.array([1, 0, 1, 1, 1]))
        McNemar(only_first=1, only_second=3, p=0.625)
    """
    from scipy.stats import binomtest

    if not np.isin(np.concatenate([first, second]), (0, 1)).all():
        return None
    only_first, only_second = int(np.sum(first > second)), int(np.sum(first < second))
    n = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, n).pvalue) if n else 1.0)


def detectable(changes: np.ndarray, videos: np.ndarray, groups: np.ndarray) -> float | None:
    """The true difference that as many videos, with differences that spread as much, would show with a chance of 80%.

    (t_0.975 + t_0.8) standard errors by video, with one degree of freedom less than there are videos; the standard
    error is that of the mean over groups of the mean within each, linearised (on power by clusters see Miller, arXiv
    2411.00640).

    Args:
        changes: (n,) differences of the scores.
        videos, groups: (n,) see `paired.compare`.

    Returns:
        None where it cannot be told: one video, or no difference between any two videos.

    Example:
        >>> float(round(detectable(np.array([1.0, 0.0] * 50), np.arange(100), np.zeros(100)), 3))
        0.142
    """
    from scipy.stats import t

    n_videos = len(video_names := np.unique(videos))
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    means = np.bincount(group, changes) / sizes
    influence = (changes - means[group]) / sizes[group] / len(sizes)
    by_video = np.bincount(np.searchsorted(video_names, videos), influence)
    if n_videos < 2 or not by_video.round(12).any():
        return None
    error = float(np.sqrt(n_videos / (n_videos - 1) * np.sum(by_video**2)))
    return error * float(t.ppf(0.975, n_videos - 1) + t.ppf(POWER, n_videos - 1))
