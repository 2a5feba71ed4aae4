"""Questions with known answers, as a file gives them."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from ...integrations.errors import InputError
from ...integrations.lmms_eval.metrics import Metric, choice_letter, exact_match, number_in, score
from ..batch.matching import with_fingerprints
from ..batch.rows import BatchRow, read_rows
from ..text import asked
from ..video.names import Video, Videos, each, name_of, shown
from ..video.reader import refuse_url
from ..video.remote import is_url, shown_url
from .wording import PLAIN, VSI_BENCH_TYPES, filled, templates_of


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        id: how reports name it.
        video: absolute path, or a URL, or several of these.
        text: the question alone.
        answer, metric, options: see `metrics.score`.
        type: the kind of question; results are given for each.
        fingerprint: of the content, see `batch.matching.fingerprint`.
        template: how it is put to a model, see `wording.templates_of`.
        system: the system prompt, None for that of the chat template.
    """

    id: str
    video: Videos
    text: str
    answer: str | float
    metric: Metric
    options: tuple[str, ...]
    type: str
    fingerprint: str | None = None
    template: str = PLAIN["short"]
    system: str | None = None

    @property
    def video_name(self) -> str:
        """What tells its video from others, see `names.name_of`."""
        return name_of(shown(self.video))

    def prompt(self) -> str:
        """What a model is asked."""
        options = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, self.options, strict=False)]
        return filled(self.template, self.text, "\n".join(options))

    def messages(self) -> str | list[dict[str, Any]]:
        """The same after the system prompt, see `text.asked`."""
        return asked(self.prompt(), self.system)

    def score(self, reply: str) -> float | None:
        """See `metrics.score`."""
        return score(reply, self.answer, self.metric, self.options)

    def read(self, reply: str) -> str:
        """See `read_answer`."""
        return read_answer(reply, self.answer, self.metric, self.options)


def read_questions(source: Path, prompt: str = "auto", system: str | None = None) -> list[Question]:
    """Reads a JSONL file of rows {video, question, answer} and, as wanted, options, type, id and metric.

    With `options` (a list, with or without leading letters) the question is multiple choice and `answer` is a letter or
    the text of an option. Without, a number as `answer` is scored by mean relative accuracy, text and 0 by exact match;
    "metric": "exact" asks for the latter, also for other numbers.

    A video that is missing is no error here, unless all are.

    Args:
        source: the file.
        prompt: see `wording.templates_of`.
        system: see `read_rows`.

    Raises:
        InputError: a row cannot be read (its line is named) or repeats another; no video is there; see `templates_of`.
    """
    templates = templates_of(prompt)
    if source.suffix.lower() != ".jsonl":
        raise InputError(f"{source}: expected a .jsonl file of questions with answers")
    questions: dict[str, Question] = {}
    for row in with_fingerprints(read_rows(source, system=system)):
        try:
            question = _question(row, templates)
        except ValueError as error:
            raise InputError(f"{source}, line {row.number}: {error}") from error
        if questions.setdefault(question.id, question) is not question:
            raise InputError(f"{source}, line {row.number}: repeats the id or the content of {question.id!r}")
    videos = {video for question in questions.values() for video in each(question.video)}
    if not any(may_be_there(video) for video in videos):
        first = min(map(str, videos))
        refuse_url(Path(first))
        raise InputError(f"{source}: no video at {first}, nor at any other path: they start at the file's folder")
    return list(questions.values())


def may_be_there(video: Video) -> bool:
    """Whether a path exists; of a URL that shows when it is fetched."""
    return is_url(video) or Path(video).exists()


def _question(row: BatchRow, templates: tuple[Mapping[str, str], Mapping[str, str]]) -> Question:
    columns = row.columns
    options = parse_options(columns.get("options"))
    metric, answer = answer_key(columns.get("answer"), options, columns.get("metric"))
    kind = columns.get("type", columns.get("question_type", "all"))
    if not isinstance(kind, str) or not kind.strip():
        raise ValueError(f"type: expected text, got {kind!r}")
    own = () if row.system is None else (row.system,)
    name = str(columns.get("id", digest(row.video_name, row.question, options, *own)[:12]))
    kind, text = kind.strip(), row.question.strip()
    template = templates[kind not in VSI_BENCH_TYPES].get("choice" if options else "short")
    if template is None:
        raise ValueError("the question has options, and the text of --prompt no line {options} for them")
    return Question(name, row.video, text, answer, metric, options, kind, row.fingerprint, template, row.system)


def answer_key(answer: Any, options: Sequence[str], metric: Any = None) -> tuple[Metric, str | float]:
    """How replies to a question are scored, and the right answer in that form.

    Args:
        answer: a letter or the text of an option, a number, or text.
        options: see `parse_options`; none for a question without.
        metric: "exact" for exact match of a number; None for what goes with the answer: exact match for 0, as relative
            accuracy divides by it.

    Raises:
        ValueError: the answer is no such thing, or the metric does not go with it.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"answer: expected a letter, a number or text, got {answer!r}")
    number, allowed = _number(answer), ("choice",) if options else ("mra", "exact")
    if metric not in (None, *allowed):
        which = f"{' or '.join(map(json.dumps, allowed))} for a question {'with' if options else 'without'} options"
        raise ValueError(f"metric: expected {which}, got {metric!r}")
    if options:
        return "choice", _letter(str(answer).strip(), options)
    if metric == "exact" or (metric is None and (number == 0 or not math.isfinite(number))):
        return "exact", str(answer).strip()
    if not 0 < number < math.inf:
        raise ValueError(
            f"answer: expected a number above 0, as relative accuracy divides by it, got {answer!r}: give the row "
            '"metric": "exact"'
        )
    return "mra", number


def read_answer(reply: str, answer: str | float, metric: Metric, options: Sequence[str]) -> str:
    """The letter, number or text that a reply is scored by; "" where none can be read from it."""
    match metric:
        case "choice":
            return choice_letter(reply, options) or ""
        case "mra":
            number = number_in(reply)
            return "" if number is None else f"{number:g}"
        case _:
            return "" if score(reply, answer, metric) is None else " ".join(reply.split())


def parse_options(given: Any) -> tuple[str, ...]:
    """The texts of a list of options, without their letters ("A. sofa", "(A) sofa"); none for None.

    Raises:
        ValueError: it is no list of 2 to 26 different texts.
    """
    if given is None or given == []:
        return ()
    if not isinstance(given, list) or not all(isinstance(option, str | int | float) for option in given):
        raise ValueError(f"options: expected a list of texts, got {given!r}")
    options = [str(option).strip() for option in given]
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"options: expected 2 to {len(ascii_uppercase)}, got {len(options)}")
    for form in ("{}.", "{})", "{}:", "({})"):
        labelled = [(option, form.format(letter)) for option, letter in zip(options, ascii_uppercase, strict=False)]
        if all(option.startswith(label) for option, label in labelled):
            options = [option.removeprefix(label).strip() for option, label in labelled]
    if not all(options) or len({option.casefold() for option in options}) < len(options):
        raise ValueError(f"options: expected different texts, got {given!r}")
    return tuple(options)


def _letter(answer: str, options: Sequence[str]) -> str:
    bare = answer.strip("().:").upper()
    chosen = [
        letter
        for letter, option in zip(ascii_uppercase, options, strict=False)
        if letter == bare or answer == f"{letter}. {option}" or exact_match(answer, option)
    ]
    if len(chosen) != 1:
        raise ValueError(
            f"answer: expected a letter from A to {ascii_uppercase[len(options) - 1]} or the text of one option, got "
            f"{answer!r} for {options}"
        )
    return chosen[0]


def _number(answer: str | float) -> float:
    """NaN where it is none."""
    try:
        return float(answer)
    except (ValueError, OverflowError):
        return math.nan


def videos_of(questions: Sequence[Question]) -> np.ndarray:
    """(N,) the video of each question, by its real path: one name for one video however rows spell it. Questions that
    share one of several videos stand or fall together: they have the name of all that are linked so."""
    real = {
        video: shown_url(video) if is_url(video) else str(Path(video).resolve())
        for video in {video for question in questions for video in each(question.video)}
    }
    linked = {name: {name} for name in real.values()}
    for question in questions:
        together = set[str]().union(*(linked[real[video]] for video in each(question.video)))
        linked |= dict.fromkeys(together, together)
    groups = [sorted(linked[real[each(question.video)[0]]]) for question in questions]
    return np.array([name_of(group[0] if len(group) == 1 else group) for group in groups])


def digest(*parts: Any) -> str:
    """32 hexadecimal digits that differ where the parts do."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
