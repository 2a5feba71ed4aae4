"""The strengths of the gate for a model: coordinate search with successive halving, judged on questions held out."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...integrations.errors import InputError
from .paired import Difference, interval_text

Point = tuple[float, float]
"""alpha_k, alpha_v."""
Evaluate = Callable[[Sequence[Point], Sequence[int]], np.ndarray]
"""(points, numbers of questions) -> (points, questions) scores in [0, 1], NaN for failures."""

LEAST_QUESTIONS = 8
"""The first rung of a search asks no fewer, where there are as many."""
KEEP = 2
"""Of the points of a rung, one in so many goes on to the next, which asks so many times more questions."""
MAX_PASSES = 3
"""Over both coordinates; two passes mostly end at the same point."""


@dataclass(frozen=True)
class Trial:
    """One point in one rung.

    Attributes:
        coordinate: "alpha_k" or "alpha_v", the one that is searched.
        search_pass, rung: from 1.
        alpha_k, alpha_v: the point.
        n: questions whose score is known for all points of the rung.
        mean: score over them.
        kept: it went on to the next rung, or won the last.
    """

    coordinate: str
    search_pass: int
    rung: int
    alpha_k: float
    alpha_v: float
    n: int
    mean: float
    kept: bool


def split(
    types: Sequence[str], videos: Sequence[str] | np.ndarray, held_out: float, seed: int
) -> tuple[list[int], list[int]]:
    """Questions to search on and questions to judge on, no video in both: what suits a video by chance must not be
    judged on it again.

    Videos are held out in random order, each that brings the number of questions of every type closer to its share.

    Args:
        types, videos: (N,) of each question; types of a single question count as one type.
        held_out: share to judge on, between 0 and 1.
        seed: of the order.

    Returns:
        the numbers to search on, in random order with the types mixed evenly from the start, and those held out.

    Raises:
        InputError: a part would be empty, or `held_out` is no share.
    """
    if not 0 < held_out < 1:
        raise InputError(f"--held-out: expected a share between 0 and 1, got {held_out}")
    rng = np.random.default_rng(seed)
    often = Counter(types)
    kinds = np.array([kind if often[kind] > 1 else "" for kind in types])
    video = np.unique(videos, return_inverse=True)[1]
    names, kind = np.unique(kinds, return_inverse=True)
    counts = np.zeros((video.max() + 1, len(names)))
    np.add.at(counts, (video, kind), 1)
    wanted, chosen = held_out * counts.sum(0), np.zeros(len(counts), dtype=bool)
    for one in rng.permutation(len(counts)):
        if ((wanted - counts[one]) ** 2).sum() < (wanted**2).sum():
            wanted -= counts[one]
            chosen[one] = True
    held = chosen[video]
    if held.all() or not held.any():
        raise InputError(
            f"{len(types)} questions about {len(counts)} videos cannot be split with --held-out {held_out}, in whole "
            "videos: give questions about more videos"
        )
    places = np.zeros(len(types))
    for name in names:
        rest = rng.permutation(np.flatnonzero((kinds == name) & ~held))
        places[rest] = (np.arange(len(rest)) + rng.random()) / max(len(rest), 1)
    return sorted(np.flatnonzero(~held).tolist(), key=places.__getitem__), np.flatnonzero(held).tolist()


def coordinate_search(
    evaluate: Evaluate, grid_k: Sequence[float], grid_v: Sequence[float], order: Sequence[int]
) -> tuple[Point, list[Trial]]:
    """Searches alpha_k with alpha_v fixed, then alpha_v with alpha_k fixed, until a pass changes nothing.

    Each line search is successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all values on a part of the
    questions, the better half on twice as many, and so on; the last rung asks all. Of equal means the smaller strength
    wins. It starts from the smallest values.

    Args:
        evaluate: scores of points on questions; asked again for what it has answered before.
        grid_k, grid_v: values to try, >= 0, at least one of each.
        order: numbers of the questions; a rung takes the first ones.

    Returns:
        the point found, and all trials.

    Raises:
        InputError: all answers failed.
    """
    grids = {"alpha_k": sorted(map(float, {*grid_k})), "alpha_v": sorted(map(float, {*grid_v}))}
    best: Point = grids["alpha_k"][0], grids["alpha_v"][0]
    trials: list[Trial] = []
    for search_pass in range(1, MAX_PASSES + 1):
        before = best
        for coordinate, values in grids.items():
            points = [(value, best[1]) if coordinate == "alpha_k" else (best[0], value) for value in values]
            n_rungs = math.ceil(math.log(len(points), KEEP))
            for rung in range(1, n_rungs + 1):
                n = min(len(order), max(math.ceil(len(order) / KEEP ** (n_rungs - rung)), LEAST_QUESTIONS))
                scores = evaluate(points, order[:n])
                known = ~np.isnan(scores).any(0)
                if not known.any():
                    raise InputError(f"no question was answered with all of {len(points)} strengths: see the failures")
                means = scores[:, known].mean(1).round(12)
                n_kept = 1 if rung == n_rungs else math.ceil(len(points) / KEEP)
                kept = sorted(np.argsort(-means, kind="stable")[:n_kept].tolist())
                trials += [
                    Trial(coordinate, search_pass, rung, *point, int(known.sum()), float(means[p]), p in kept)
                    for p, point in enumerate(points)
                ]
                points = [points[p] for p in kept]
            best = points[0]
        if best == before:
            break
    return best, trials


def best_gate(trials: Sequence[Trial]) -> Point | None:
    """Of the points of a search with a gate, the one that did best on the most questions, of equals the weakest; None
    where none was tried."""
    gates = [trial for trial in trials if trial.alpha_k or trial.alpha_v]
    if not gates:
        return None
    best = max(gates, key=lambda trial: (trial.n, trial.mean, -trial.alpha_k - trial.alpha_v))
    return best.alpha_k, best.alpha_v


def conclusion(
    point: Point, gate: Point | None, held_out: Difference | None, n_unreadable: int = 0, n_replies: int = 1
) -> str:
    """What the search shows, in one sentence.

    Args:
        point: that the search prefers.
        gate: the same, or `best_gate` where it prefers none.
        held_out: the gate against none on the questions held out; None where there is no gate.
        n_unreadable, n_replies: of the questions held out.
    """
    if n_unreadable == n_replies:
        return f"Nothing could be judged: no letter or number could be read from any of {n_replies} replies."
    none = "No gain shown: the search itself prefers no gate (alpha_k = alpha_v = 0)"
    if gate is None or held_out is None:
        return f"{none}."
    interval = interval_text(f"{100 * held_out.low:+.1f}", f"{100 * held_out.high:+.1f}", held_out.n_videos)
    numbers = (
        f"{100 * held_out.difference:+.1f} points, 95% interval {interval}, on {held_out.n} questions "
        f"about {held_out.n_videos} videos held out, {held_out.n_videos_changed} of which changed"
    )
    if not any(point):
        return f"{none}; the best gate it tried, alpha_k = {gate[0]:g}, alpha_v = {gate[1]:g}: {numbers}."
    said = {"gain": "Gain shown", "loss": "Loss shown", "no gain shown": "No gain shown"}[held_out.verdict]
    return f"{said} for alpha_k = {gate[0]:g}, alpha_v = {gate[1]:g}: {numbers}."
