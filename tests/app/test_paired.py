"""What the bootstrap over videos promises."""

from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from videoanchor_triton.app.evaluation.paired import Difference, compare, interval_text, tails


def alone(scores: np.ndarray, baseline: np.ndarray, **options: Any) -> Difference:
    """Every question about a video of its own."""
    return compare(scores, baseline, np.arange(len(scores)), **options)


def bounds(found: Difference) -> tuple[float, float]:
    return found.low, found.high


def exact_interval(draws: list[float], n_videos: int) -> tuple[float, float]:
    """The ends over all draws that there can be."""
    values, counts = np.unique(np.round(draws, 12), return_counts=True)
    chances = np.cumsum(counts) / len(draws)
    ends = tails(n_videos)
    assert not any(abs(chances[:-1] - tail).min() < 0.002 for tail in ends), "too close for 10,000 draws to tell"
    low, high = values[np.searchsorted(chances, ends)]
    return float(low), float(high)


def test_interval_of_a_known_distribution() -> None:
    """Means of 100 draws of +1, 0, -1: the normal interval by the central limit theorem."""
    values = np.repeat([1.0, 0.0, -1.0], [40, 40, 20])
    found = alone(values, np.zeros(100))
    half = 1.984 * values.std(ddof=1) / 10  # Student's t of 99 degrees of freedom
    assert bounds(found) == pytest.approx((0.2 - half, 0.2 + half), abs=0.012)
    assert alone(values, np.zeros(100)) == found
    assert bounds(alone(np.full(7, 0.25), np.zeros(7))) == (0.25, 0.25)


def test_videos_of_one_question_are_drawn_like_questions() -> None:
    """The interval is that of the plain bootstrap over questions, to the bit: a multinomial draw of the values."""
    rng = np.random.default_rng(3)
    scores, baseline = rng.integers(0, 11, (2, 150)) / 10
    values, counts = np.unique((scores - baseline).round(12), return_counts=True)
    means = np.random.default_rng(7).multinomial(150, counts / 150, 10_000) @ values / 150
    low, high = np.quantile(means.round(12), tails(150))
    shuffled = rng.permutation(150)
    assert bounds(compare(scores, baseline, shuffled, seed=7)) == (low, high)


@pytest.mark.parametrize("k", [2, 7, 18])
@pytest.mark.parametrize("by_type", [False, True], ids=["questions", "types"])
def test_repeated_questions_tell_nothing_new(k: int, by_type: bool) -> None:
    """Each question asked k times about its video: the same interval and verdict, though k times the questions."""
    rng = np.random.default_rng(k)
    scores, baseline = rng.integers(0, 11, (2, 90)) / 10
    videos, types = rng.integers(0, 20, 90), rng.integers(0, 3, 90) if by_type else np.zeros(90)
    once = compare(scores, baseline, videos, types)
    again = compare(*(np.repeat(one, k) for one in (scores, baseline, videos, types)))
    assert (again.n, again.n_videos) == (k * once.n, once.n_videos)
    assert (again.n_changed, again.n_videos_changed) == (k * once.n_changed, once.n_videos_changed)
    assert bounds(again) == bounds(once)
    assert again.verdict == once.verdict


def test_questions_of_one_video_are_drawn_together() -> None:
    """Four videos that gain or lose all of their 25 questions: the distribution of 4 draws of +1, +1, +1, -1."""
    effect = np.array([1.0, 1.0, 1.0, -1.0])
    found = compare(np.repeat(effect, 25), np.zeros(100), np.repeat(np.arange(4), 25))
    assert bounds(found) == exact_interval([float(np.mean(draw)) for draw in product(effect, repeat=4)], 4) == (-1, 1)
    assert bounds(alone(np.repeat(effect, 25), np.zeros(100))) == pytest.approx((0.33, 0.66), abs=0.02)


def test_types_share_the_draw_of_videos() -> None:
    """What a video gains in one type it loses in the other: no draw of videos has a mean but 0."""
    gains = np.arange(8) / 8
    changes, videos, types = np.r_[gains, -gains], np.tile(np.arange(8), 2), np.repeat(["a", "b"], 8)
    found = compare(changes, np.zeros(16), videos, types)
    assert bounds(found) == (0, 0)
    assert (found.n_changed, found.n_videos_changed) == (14, 0)
    assert bounds(compare(changes, np.zeros(16), videos)) == (0, 0)
    assert alone(changes, np.zeros(16), groups=types).high > 0.1


def test_few_videos_have_wider_intervals() -> None:
    """As wide as Student's t makes them: the ends are as far out in the normal distribution."""
    for n, student in ((6, 2.5706), (20, 2.0930), (288, 1.9683)):
        low, high = tails(n)
        assert NormalDist().inv_cdf(high) == pytest.approx(student * (n / (n - 1)) ** 0.5, abs=1e-3)
        assert low == pytest.approx(1 - high)


@pytest.mark.parametrize(("n_videos", "least"), [(6, 0.91), (20, 0.92)])
def test_the_interval_of_few_videos_covers_the_truth(n_videos: int, least: float) -> None:
    """Of 500 seeded studies with 10 questions a video, each video with an effect of its own; plain percentiles cover
    less."""
    covered, videos = 0, np.repeat(np.arange(n_videos), 10)
    for seed in range(500):
        rng = np.random.default_rng(seed)
        effect = np.clip(0.2 * rng.standard_normal(n_videos), -0.5, 0.5)[videos]
        baseline, scores = rng.random((2, len(videos))) < np.stack([np.full(len(videos), 0.5), 0.5 + effect])
        found = compare(scores, baseline, videos, seed=seed)
        covered += found.low <= 0 <= found.high
    assert least <= covered / 500 <= 0.98


def test_a_type_that_a_draw_leaves_out() -> None:
    """Its mean is left out of the mean of that draw. Type a: two videos, one with two questions; type b: the third
    video, and one question of the first. All 27 draws by hand."""
    rows = [(0, "a", 1.0), (0, "b", 0.5), (1, "a", -1.0), (1, "a", 0.0), (2, "b", 0.25)]
    videos, types, changes = (np.array(column) for column in zip(*rows, strict=True))
    means = []
    for draw in product(range(3), repeat=3):
        groups = [
            [value for one in draw for video, name, value in rows if (video, name) == (one, kind)] for kind in "ab"
        ]
        means.append(float(np.mean([np.mean(group) for group in groups if group])))
    found = compare(changes, np.zeros(5), videos, types)
    assert bounds(found) == pytest.approx(exact_interval(means, 3), abs=1e-9)
    assert found.difference == pytest.approx((0.0 + 0.375) / 2)


def test_types_count_alike() -> None:
    """A type of 90 questions without a change and one of 10 with gains: half of the gain, not a tenth."""
    scores, baseline = np.r_[np.zeros(90), np.ones(10)], np.zeros(100)
    types = np.r_[np.zeros(90), np.ones(10)]
    assert alone(scores, baseline).difference == pytest.approx(0.1)
    assert alone(scores, baseline, groups=types).difference == 0.5
    assert alone(scores, baseline, groups=types).low == 0.5


def test_the_interval_covers_the_truth() -> None:
    """Of 200 seeded studies of 60 videos with 5 questions each, about 95% cover the true difference of 0.1, though each
    video has an effect of its own; benchmarks/evaluation/interval_coverage.py has more of this."""
    covered, videos = 0, np.repeat(np.arange(60), 5)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        effect = 0.1 + 0.3 * rng.choice([-1, 1], 60)[videos]
        baseline, scores = rng.random((2, 300)) < np.stack([np.full(300, 0.4), 0.4 + effect])
        found = compare(scores, baseline, videos, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / 200 <= 0.98


def test_pairing_narrows_the_interval() -> None:
    """Questions differ much, the runs little: shuffling one run's rows widens the interval."""
    rng = np.random.default_rng(1)
    baseline = rng.random(200)
    scores = baseline + 0.05 + 0.01 * rng.standard_normal(200)
    paired, unpaired = alone(scores, baseline), alone(rng.permutation(scores), baseline)
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    assert (paired.verdict, unpaired.verdict) == ("gain", "no gain shown")


def test_one_video_tells_nothing_of_others() -> None:
    assert interval_text("-1", "+2", 2) == "-1 to +2"
    assert interval_text("+1", "+1", 1) == "? (one video)"


def test_verdicts() -> None:
    zero = np.zeros(100)
    for n_better, verdict in ((0, "no gain shown"), (2, "no gain shown"), (5, "no gain shown"), (8, "gain")):
        scores = np.r_[np.ones(n_better), np.zeros(100 - n_better)]
        assert alone(scores, zero).verdict == verdict
        assert alone(zero, scores).verdict == ("loss" if verdict == "gain" else verdict)
    assert alone(np.ones(3), np.zeros(3)).verdict == "no gain shown"  # three questions show nothing


@pytest.mark.parametrize(("n_videos", "verdict"), [(1, "no gain shown"), (5, "no gain shown"), (6, "gain")])
def test_many_questions_about_few_videos_show_nothing(n_videos: int, verdict: str) -> None:
    found = compare(np.ones(60), np.zeros(60), np.arange(60) % n_videos)
    assert (found.n_changed, found.n_videos_changed, found.low) == (60, n_videos, 1.0)
    assert found.verdict == verdict


def test_a_video_whose_changes_cancel_has_not_changed() -> None:
    """Five videos gain; fifteen win a question and lose another, which speaks for neither side."""
    changes = np.r_[np.tile([1.0, 1.0], 5), np.tile([0.3, -0.3], 15), np.zeros(2)]
    found = compare(changes, np.zeros(42), np.repeat(np.arange(21), 2))
    assert (found.n_changed, found.n_videos_changed) == (40, 5)
    assert found.low > 0
    assert found.verdict == "no gain shown"


def test_compare_refuses_what_is_not_paired() -> None:
    for sizes in ((3, 4, 3), (3, 3, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"same \(n,\) shape with n >= 1"):
            compare(*(np.zeros(size) for size in sizes))
    with pytest.raises(ValueError, match="same"):
        compare(np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="finite"):
        alone(np.array([1.0, np.nan]), np.zeros(2))
