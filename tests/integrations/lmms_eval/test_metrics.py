"""Scores of answers against values computed by hand."""

import pytest

from videoanchor_triton.integrations.lmms_eval.metrics import (
    choice_letter,
    exact_match,
    mean_relative_accuracy,
    number_in,
    score,
)

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
    assert score("A.", "B", "choice", COLOURS) == 0
    assert score("", "B", "choice", COLOURS) is None
    assert score("21", 20, "mra") == 0.9
    assert score("twenty or so", 20, "mra") == 1
    assert score("no idea", 20, "mra") is None
    assert score("yes", "Yes", "exact") == 1
    assert score("no", "Yes", "exact") == 0
    assert score("<think>yes", "Yes", "exact") is None
