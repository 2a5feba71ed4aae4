"""McNemar's test and the difference that could be shown."""

from itertools import product

import numpy as np
import pytest

from videoanchor_triton.app.evaluation.paired import compare
from videoanchor_triton.app.evaluation.significance import detectable, mcnemar


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (3, 3), (1, 7), (9, 2)])
def test_mcnemar_by_all_ways_to_toss(only_first: int, only_second: int) -> None:
    """p: the share of all ways in which coins can fall that are as uneven, or more."""
    first = np.r_[np.ones(only_first), np.zeros(only_second), 1.0, 1.0, 0.0]
    second = np.r_[np.zeros(only_first), np.ones(only_second), 1.0, 1.0, 0.0]
    n = only_first + only_second
    tosses = [abs(2 * sum(toss) - n) >= abs(only_first - only_second) for toss in product((0, 1), repeat=n)]
    found = mcnemar(first, second)
    assert found is not None
    assert found[:2] == (only_first, only_second)
    assert found.p == pytest.approx(sum(tosses) / len(tosses))


def test_mcnemar_takes_right_and_wrong_only() -> None:
    assert mcnemar(np.array([1.0, 0.5]), np.array([1.0, 1.0])) is None


def test_detectable_is_the_formula_for_independent_questions() -> None:
    changes = np.random.default_rng(0).integers(-1, 2, 400).astype(float)
    expected = (1.966 + 0.8425) * changes.std(ddof=1) / 20
    assert detectable(changes, np.arange(400), np.zeros(400)) == pytest.approx(expected, rel=1e-3)


def test_questions_of_a_video_do_not_count_as_so_many() -> None:
    """Each asked nine times about its video: as good as asked once."""
    changes = np.random.default_rng(1).integers(-1, 2, 50).astype(float)
    once = detectable(changes, np.arange(50), np.zeros(50))
    again = detectable(np.repeat(changes, 9), np.repeat(np.arange(50), 9), np.zeros(450))
    assert again == pytest.approx(once)
    types = np.random.default_rng(2).integers(0, 3, 50)
    assert detectable(np.repeat(changes, 9), np.repeat(np.arange(50), 9), np.repeat(types, 9)) == pytest.approx(
        detectable(changes, np.arange(50), types)
    )


def test_nothing_can_be_said_of_one_video_or_of_equal_ones() -> None:
    assert detectable(np.array([1.0, 0.0]), np.zeros(2), np.zeros(2)) is None
    assert detectable(np.full(9, 0.25), np.arange(9), np.zeros(9)) is None


def test_what_is_detectable_is_shown_four_times_in_five() -> None:
    """300 made-up comparisons of 60 videos with 5 questions, with just that difference."""
    videos, rng = np.repeat(np.arange(60), 5), np.random.default_rng(3)
    noise = rng.normal(0, 0.3, (300, 60))[:, videos] + rng.normal(0, 0.4, (300, 300))
    shown = 0
    for changes in noise:
        found = detectable(changes, videos, np.zeros(300))
        assert found is not None
        shown += compare(changes + found, np.zeros(300), videos).verdict == "gain"
    assert 0.72 <= shown / 300 <= 0.88
