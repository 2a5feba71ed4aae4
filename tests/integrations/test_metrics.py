"""Scores of answers against values computed by hand, and what the bootstrap promises."""

import numpy as np
import pytest

from videoanchor_triton.integrations.evaluation.metrics import (
    choice_letter,
    exact_match,
    mean_relative_accuracy,
    number_in,
    score,
)
from videoanchor_triton.integrations.evaluation.paired import compare, interval

COLOURS = ("red", "blue", "green", "dark blue")
DIRECTIONS = ("front-left", "left", "right", "back")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("b)", "B"),
        ("Answer: B", "B"),
        ("The answer is (B).", "B"),
        ("The correct option is B", "B"),
        ("Option B", "B"),
        ("B. blue", "B"),
        ("B) because A is too bright", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("It is dark blue", "D"),
        ("It's the dark blue one, not the red", "D"),
        ("A red car", "A"),
        ("A green car", "C"),
        ("A", "A"),
        ("I think it's A.", "A"),
        ("I think it's C, not B", "C"),
        ("not B but C", "C"),
        ("The answer is not B, it is C", "C"),
        ("B isn't right, so D", "D"),
        ("B isn\u2019t right, so D", "D"),
        ("\u201cblue\u201d", "B"),
        ("Option A is wrong, so B", "B"),
        ("I'm not sure, but B", "B"),
        ("C rather than B", "C"),
        ("<think>Maybe A or C.</think>B", "B"),
        ("<answer>D</answer>", "D"),
        (r"So \boxed{C}", "C"),
        ("My answer: the blue one (B)", "B"),
        ("Answer: B. It is not A", "B"),
        ("A is far and C is near. The answer is C", "C"),
        ("", None),
        ("   ", None),
        ("E", None),
        ("B or C", None),
        ("A and B", None),
        ("B, C", None),
        ("(A) or (B)", None),
        ("not B", None),
        ("The answer is not C", None),
        ("red or blue", None),
        ("I cannot tell", None),
        ("a car", None),
        ("Because", None),
        ("<think>B", None),
    ],
)
def test_choice_letter(reply: str, letter: str | None) -> None:
    assert choice_letter(reply, COLOURS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("front-left", "A"), ("It is to the front-left.", "A"), ("left", "B"), ("not left, right", "C"), ("up", None)],
)
def test_an_option_within_another(reply: str, letter: str | None) -> None:
    assert choice_letter(reply, DIRECTIONS) == letter


def test_letters_win_over_options_that_are_letters() -> None:
    assert choice_letter("A", ("B", "A")) == "A"


def test_nine_options_do_not_make_a_pronoun_an_answer() -> None:
    options = [f"room {n}" for n in range(1, 10)]
    assert choice_letter("I think it is room 3", options) == "C"
    assert choice_letter("I", options) == "I"


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("5", 5),
        ("5.", 5),
        ("3.5 meters", 3.5),
        ("3.5m", 3.5),
        ("about 3.5 meters (11 feet)", 3.5),
        ("The answer is 4.", 4),
        ("There are 2 chairs and 3 tables. Answer: 5", 5),
        ("There are 7 chairs", 7),
        ("five", 5),
        ("five?", 5),
        ("Five chairs", 5),
        ("-2", -2),
        (".5", 0.5),
        ("1,234.5", 1234.5),
        ("1e3", 1000),
        ("50%", 50),
        ("(3)", 3),
        ("<think>3 or 4</think>4", 4),
        ("", None),
        ("many", None),
        ("someone", None),
        ("3-4", None),
        ("3 to 4 meters", None),
        ("between 3 and 4", None),
        ("3 or 4", None),
        ("1/2", None),
        ("3,5", None),
        ("\u22122", -2),
        ("3\u20134", None),
        ("1e999", None),
        ("nan", None),
        ("inf", None),
        ("2 chairs", 2),
        ("I see 2 chairs and 3 tables", None),
    ],
)
def test_number_in(reply: str, number: float | None) -> None:
    assert number_in(reply) == number


@pytest.mark.parametrize(
    ("predicted", "answer", "expected"),
    [
        (10, 10, 1.0),
        (10.4, 10, 1.0),  # 4% < 5%
        (21, 20, 0.9),  # exactly 5%: not below 5%, below 10%, 15%, ..., 50%
        (19, 20, 0.9),
        (10.7, 10, 0.9),
        (13, 10, 0.4),  # exactly 30%: below 35%, 40%, 45%, 50%
        (15, 10, 0.0),  # exactly 50%
        (5, 10, 0.0),
        (14.9, 10, 0.1),
        (0, 10, 0.0),
        (-10, 10, 0.0),
        (1000, 10, 0.0),
        (0.105, 0.1, 0.9),
        (1.1, 1, 0.8),  # 10% in decimals, in floating point a little more
    ],
)
def test_mean_relative_accuracy(predicted: float, answer: float, expected: float) -> None:
    assert mean_relative_accuracy(predicted, answer) == expected


@pytest.mark.parametrize(("predicted", "answer"), [(1, 0), (0, 0), (1, -1), (float("nan"), 1), (1, float("inf"))])
def test_no_relative_accuracy(predicted: float, answer: float) -> None:
    with pytest.raises(ValueError, match="answer above 0"):
        mean_relative_accuracy(predicted, answer)


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("A  Sofa.", "a sofa", 1),
        ('"sofa"', "sofa", 1),
        ("sofa bed", "sofa", 0),
        ("-5", "5", 0),
        ("0.5", "5", 0),
        ("", "sofa", 0),
        ("0", "0", 1),
    ],
)
def test_exact_match(reply: str, answer: str, expected: float) -> None:
    assert exact_match(reply, answer) == expected


def test_score_by_metric() -> None:
    assert score("B.", "B", "choice", COLOURS) == 1
    assert score("", "B", "choice", COLOURS) == 0
    assert score("21", 20, "mra") == 0.9
    assert score("twenty or so", 20, "mra") == 1
    assert score("no idea", 20, "mra") == 0
    assert score("yes", "Yes", "exact") == 1


def test_interval_of_a_known_distribution() -> None:
    """Means of 100 draws of +1, 0, -1: the normal interval by the central limit theorem."""
    values = np.repeat([1.0, 0.0, -1.0], [40, 40, 20])
    low, high = interval([values])
    half = 1.96 * values.std() / 10
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.012)
    assert interval([values]) == (low, high)
    assert interval([np.full(7, 0.25)]) == (0.25, 0.25)


def test_groups_count_alike() -> None:
    """A group of 90 questions without a change and one of 10 with gains: half of the gain, not a tenth."""
    scores, baseline = np.r_[np.zeros(90), np.ones(10)], np.zeros(100)
    groups = np.r_[np.zeros(90), np.ones(10)]
    assert compare(scores, baseline).difference == pytest.approx(0.1)
    assert compare(scores, baseline, groups).difference == 0.5
    assert compare(scores, baseline, groups).low == 0.5


def test_the_interval_covers_the_truth() -> None:
    """Of 400 seeded studies of 60 questions, about 95% cover the true difference of 0.1."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        baseline, scores = rng.random((2, 60)) < np.array([[0.4], [0.5]])
        found = compare(scores, baseline, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_pairing_narrows_the_interval() -> None:
    """Questions differ much, the runs little: shuffling one run's rows widens the interval."""
    rng = np.random.default_rng(1)
    baseline = rng.random(200)
    scores = baseline + 0.05 + 0.01 * rng.standard_normal(200)
    paired, unpaired = compare(scores, baseline), compare(rng.permutation(scores), baseline)
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    assert (paired.verdict, unpaired.verdict) == ("gain", "no gain shown")


def test_verdicts() -> None:
    zero = np.zeros(100)
    for n_better, verdict in ((0, "no gain shown"), (2, "no gain shown"), (5, "no gain shown"), (8, "gain")):
        scores = np.r_[np.ones(n_better), np.zeros(100 - n_better)]
        assert compare(scores, zero).verdict == verdict
        assert compare(zero, scores).verdict == ("loss" if verdict == "gain" else verdict)
    assert compare(np.ones(3), np.zeros(3)).verdict == "no gain shown"  # three questions show nothing


def test_compare_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="same"):
        compare(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="n >= 1"):
        compare(np.zeros(0), np.zeros(0))
