"""A result of an evaluation, whoever made it: a score for each question, and how it came about."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from ....integrations.errors import InputError
from ....integrations.lmms_eval.metrics import score
from ...video.names import name_of
from ..questions import answer_key, parse_options, read_answer

SCORES = ("score", "hit", "accuracy", "acc", "correct", "exact_match", "MRA:.5:.95:.05", "mra")
REPLIES = ("prediction", "reply", "response", "pred", "filtered_resps")
ANSWERS = ("answer", "ground_truth", "target", "gt_answer")
VIDEOS = ("video", "videoID", "video_id", "video_path", "video_name", "scene_name", "scene")
TYPES = ("type", "question_type", "task_type", "task_category", "category", "task")
"""Names under which harnesses and benchmarks keep the same thing; the first that has a value counts."""
OURS = "videoanchor"
"""The rule of `metrics.score`, as `Result.scoring` names it."""


@dataclass(frozen=True)
class Answered:
    """What a result says about a question; None for what it does not.

    Attributes:
        id: the question's, within the result.
        score: None where there is no reply.
        video: what tells its video from others.
        type: the kind of question.
        question, options, metric, answer: see `evaluation.questions`.
        prompt: the whole text that the model was asked.
        reply: the generated text.
        read: what was read from it as the answer; "" where nothing could be.
        error: why there is no reply.
        frames: path of a picture of some of the frames that the model saw.
    """

    id: str
    score: float | None = None
    video: str | None = None
    type: str = "all"
    question: str | None = None
    options: tuple[str, ...] = ()
    metric: str | None = None
    answer: str | None = None
    prompt: str | None = None
    reply: str | None = None
    read: str | None = None
    error: str | None = None
    frames: str | None = None


@dataclass(frozen=True)
class Result:
    """One side of a comparison.

    Attributes:
        source: the file or folder that it is from.
        harness: what wrote it.
        scoring: the rule of its scores.
        rows: by id.
        card: the protocol, as far as it is known: sections as in `protocol`.
        setting: which of several settings in the source.
    """

    source: str
    harness: str
    scoring: str
    rows: Mapping[str, Answered]
    card: Mapping[str, Any] = field(default_factory=dict)
    setting: str | None = None


def by_id(rows: Iterable[Answered], source: object) -> dict[str, Answered]:
    """
    Raises:
        InputError: there is no row, or an id comes twice.
    """
    found: dict[str, Answered] = {}
    for row in rows:
        if found.setdefault(row.id, row) is not row:
            raise InputError(f"{source}: the id {row.id!r} comes twice: each question needs an id of its own")
    if not found:
        raise InputError(f"{source} holds no question: expected at least one")
    return found


def first_of(columns: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value that is there; None where none is."""
    return next((columns[name] for name in names if not is_missing(columns.get(name))), None)


def is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def video_of(row: Mapping[str, Any]) -> str | None:
    """What names the video of a row, or of several all."""
    found = first_of(row, VIDEOS)
    if not isinstance(found, list):
        return text_of(found)
    return name_of([str(one) for one in found] if len(found) > 1 else str(found[0]))


def text_of(value: Any) -> str | None:
    """Numbers without a fraction, as spreadsheets give ids, without one."""
    if is_missing(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def number_of(value: Any) -> float | None:
    """A finite number; None for anything else. True is 1, and "0.5" is 0.5."""
    if not isinstance(value, bool | int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def scored(row: Answered) -> Answered:
    """`row` with the score that `metrics.score` gives to its reply. An answer of one capital letter is that of a
    multiple choice, with or without options (then from A to D, or as far as the letter); a number that is not above 0,
    of which there is no relative accuracy, is scored by exact match.

    Raises:
        ValueError: it has no answer, or one that does not go with its metric.
    """
    if row.reply is None:
        return replace(row, score=None)
    number = number_of(row.answer)
    if row.metric in (None, "choice") and row.answer is not None and re.fullmatch("[A-Z]", row.answer):
        n = max(ascii_uppercase.index(row.answer) + 1, len(row.options) or 4)
        unknown = tuple(f"\0{letter}" for letter in ascii_uppercase[len(row.options) : n])  # texts that no reply has
        metric, answer, options = "choice", row.answer, row.options + unknown
    else:
        exact = row.metric is None and not row.options and number is not None and number <= 0
        (metric, answer), options = answer_key(row.answer, row.options, "exact" if exact else row.metric), row.options
    found = score(row.reply, answer, metric, options)
    return replace(row, score=found or 0.0, read=read_answer(row.reply, answer, metric, options))


def rescored(result: Result) -> Result:
    """`result` by the rule of `metrics.score`, from its replies and answers.

    Raises:
        InputError: a question has a score and no reply, or no answer.
    """
    rows = {}
    for name, row in result.rows.items():
        if row.reply is None and row.score is not None:
            raise InputError(f"{result.source}: {name!r} has no reply to score again: leave --rescore out")
        try:
            rows[name] = scored(row)
        except ValueError as error:
            raise InputError(f"{result.source}: {name!r} cannot be scored: {error}") from error
    return replace(result, rows=rows, scoring=OURS)


def options_of(columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the column `options`, or of columns A, B, C, ... up to the first that is empty; none where they cannot be
    read."""
    given = columns.get("options")
    if is_missing(given):
        letters = itertools.takewhile(lambda letter: not is_missing(columns.get(letter)), ascii_uppercase)
        given = [text_of(columns[letter]) for letter in letters]
    try:
        return parse_options(given)
    except ValueError:
        return ()
