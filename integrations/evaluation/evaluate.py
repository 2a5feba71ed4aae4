"""Questions with known answers, asked with the gate in several settings and without it."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from ...anchor.config import VideoAnchorConfig
from ..batch.results import ResultsLog
from ..batch.rows import BatchRow, fingerprint, read_rows
from ..errors import InputError
from .metrics import Metric, exact_match, score

# The prompts of VSI-Bench (arXiv 2412.14171).
_OPENING = "These are frames of a video."
_CHOICE = "Answer with the option's letter from the given choices directly."
_SHORT = "Please answer the question using a single word or phrase."

Ask = Callable[["Question", "Setting"], str]
"""The reply to a question in a setting; raises InputError where there is none."""


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        id: how reports name it.
        video: absolute path.
        text: the question alone.
        answer: a letter for metric "choice", a number above 0 for "mra", else text.
        metric: see `metrics.score`.
        options: texts of the choices A, B, ..., without letters.
        type: the kind of question; results are given for each.
        fingerprint: of the video's content, see `batch.rows.fingerprint`.
    """

    id: str
    video: Path
    text: str
    answer: str | float
    metric: Metric
    options: tuple[str, ...]
    type: str
    fingerprint: str | None = None

    def prompt(self) -> str:
        """The question as VSI-Bench asks it."""
        if self.metric != "choice":
            return "\n".join([_OPENING, self.text, _SHORT])
        options = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, self.options, strict=False)]
        return "\n".join([_OPENING, self.text, "Options:", *options, _CHOICE])


@dataclass(frozen=True)
class Setting:
    """One way of answering.

    Args:
        name: how reports name it.
        config: the gate; alphas of 0 for none.
        max_frames: of each video.
        run: whatever else replies depend on: checkpoint, precision, sampling, length of the answer.
    """

    name: str
    config: VideoAnchorConfig
    max_frames: int
    run: tuple[tuple[str, Any], ...] = ()

    @property
    def gated(self) -> bool:
        return bool(self.config.alpha_k or self.config.alpha_v)

    def key(self, question: Question) -> str:
        """32 hexadecimal digits that differ where the reply may."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "memory_budget"}
        video = [str(question.video), question.fingerprint]
        return digest(video, question.prompt(), config, self.max_frames, self.run, version("videoanchor-triton"))

    def baseline(self) -> "Setting":
        """The same frames and checkpoint with all alphas 0. Scores are uniform: without a gate nobody looks at them."""
        config = VideoAnchorConfig(alpha_k=0.0, alpha_v=0.0, scorer="uniform", n_clusters=1)
        return replace(self, name=f"baseline, {self.max_frames} frames", config=config)


def read_questions(source: Path) -> list[Question]:
    """Reads a JSONL file of rows {video, question, answer} and, as wanted, options, type, id and metric.

    With `options` (a list, with or without leading letters) the question is multiple choice and `answer` is a letter or
    the text of an option. Without, a number as `answer` is scored by mean relative accuracy, and text by exact match;
    "metric": "exact" asks for the latter, also for numbers.

    Raises:
        InputError: a row cannot be read (its line is named), repeats another, or its video is missing.
    """
    if source.suffix.lower() not in (".jsonl", ".json"):
        raise InputError(f"{source}: expected a .jsonl file of questions with answers")
    questions: dict[str, Question] = {}
    for row in read_rows(source):
        try:
            question = _question(row)
        except ValueError as error:
            raise InputError(f"{source}, line {row.number}: {error}") from error
        if questions.setdefault(question.id, question) is not question:
            raise InputError(f"{source}, line {row.number}: repeats the id or the content of {question.id!r}")
    missing = sorted({str(question.video) for question in questions.values() if not question.video.exists()})
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{source}: no video at {', '.join(missing[:3])}{more}: paths start at the folder of the file")
    prints = {video: fingerprint(video) for video in {question.video for question in questions.values()}}
    return [replace(question, fingerprint=prints[question.video]) for question in questions.values()]


def _question(row: BatchRow) -> Question:
    columns = row.columns
    if "answer" not in columns:
        raise ValueError("answer: expected a letter, a number or text, got none")
    options = _options(columns.get("options"))
    given = columns["answer"]
    if isinstance(given, bool) or not isinstance(given, str | int | float) or not str(given).strip():
        raise ValueError(f"answer: expected a letter, a number or text, got {given!r}")
    metric = columns.get("metric")
    answer: str | float
    if options:
        if metric not in (None, "choice"):
            raise ValueError(f'metric: expected "choice" for a question with options, got {metric!r}')
        metric, answer = "choice", _letter(str(given), options)
    elif metric not in (None, "mra", "exact"):
        raise ValueError(f'metric: expected "mra" or "exact" for a question without options, got {metric!r}')
    elif metric == "exact" or (metric is None and not _is_number(given)):
        metric, answer = "exact", str(given).strip()
    else:
        metric, answer = "mra", _positive(given)
    kind = columns.get("type", columns.get("question_type", "all"))
    if not isinstance(kind, str) or not kind.strip():
        raise ValueError(f"type: expected text, got {kind!r}")
    content = digest(str(row.video), row.question, options)
    return Question(
        id=str(columns.get("id", content[:12])),
        video=row.video,
        text=row.question.strip(),
        answer=answer,
        metric=metric,
        options=options,
        type=kind.strip(),
    )


def _options(given: Any) -> tuple[str, ...]:
    if given is None or given == []:
        return ()
    if not isinstance(given, list) or not all(isinstance(option, str | int | float) for option in given):
        raise ValueError(f"options: expected a list of texts, got {given!r}")
    options = [str(option).strip() for option in given]
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"options: expected 2 to {len(ascii_uppercase)}, got {len(options)}")
    for form in ("{}.", "{})", "{}:", "({})"):
        labels = [form.format(letter) for letter in ascii_uppercase]
        if all(option.startswith(label) for option, label in zip(options, labels, strict=False)):
            options = [option[len(label) :].strip() for option, label in zip(options, labels, strict=False)]
    if not all(options) or len({option.casefold() for option in options}) < len(options):
        raise ValueError(f"options: expected different texts, got {given!r}")
    return tuple(options)


def _letter(answer: str, options: Sequence[str]) -> str:
    letters = ascii_uppercase[: len(options)]
    bare = answer.strip().strip("().:")
    chosen = {letter for letter, option in zip(letters, options, strict=True) if exact_match(answer, option)}
    chosen |= {bare.upper()} & {*letters}
    chosen |= {
        letter for letter, option in zip(letters, options, strict=True) if answer.strip() == f"{letter}. {option}"
    }
    if len(chosen) != 1:
        raise ValueError(
            f"answer: expected a letter from A to {letters[-1]} or the text of one option, got {answer!r} for {options}"
        )
    return chosen.pop()


def _is_number(answer: str | float) -> bool:
    try:
        return math.isfinite(float(answer))
    except ValueError:
        return False


def _positive(answer: str | float) -> float:
    if not (_is_number(answer) and float(answer) > 0):
        raise ValueError(
            f"answer: expected a number above 0, as relative accuracy divides by it, got {answer!r}: give the row "
            '"metric": "exact"'
        )
    return float(answer)


def digest(*parts: Any) -> str:
    """32 hexadecimal digits that differ where the parts do."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def evaluate(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    ask: Ask,
    log: ResultsLog,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Asks each question in each setting, those that `log` does not hold yet, video by video.

    Args:
        questions, settings: what to ask, and how.
        ask: called for replies that are missing. An `InputError` of it is kept in the log as a failure, see
            `forget_failures`.
        log: replies; each is written as it comes.
        progress: called with ("questions", done, all).

    Returns:
        (settings, questions) float64 scores in [0, 1], NaN for failures.
    """
    keys = [[setting.key(question) for question in questions] for setting in settings]
    scores = np.full((len(settings), len(questions)), np.nan)
    order = sorted(np.ndindex(scores.shape), key=lambda pair: _place(questions, settings, *pair))
    for done, (s, q) in enumerate(order, 1):
        question, setting, key = questions[q], settings[s], keys[s][q]
        if key not in log.records:
            log.append({"key": key, **_record(question, setting, ask)})
        reply = log.records[key].get("reply")
        if reply is not None:
            scores[s, q] = score(reply, question.answer, question.metric, question.options)
        if progress is not None:
            progress("questions", done, scores.size)
    return scores


def videos_of(questions: Sequence[Question]) -> np.ndarray:
    """(N,) the video of each question, by its real path: one name for one video however rows spell it."""
    real = {video: str(video.resolve()) for video in {question.video for question in questions}}
    return np.array([real[question.video] for question in questions])


def forget_failures(log: ResultsLog) -> None:
    """Has the questions without a reply asked again."""
    log.drop([key for key, record in log.records.items() if "error" in record])


def _place(questions: Sequence[Question], settings: Sequence[Setting], s: int, q: int) -> tuple[str, int, int, int]:
    """Video by video, so that each is decoded once."""
    return str(questions[q].video), settings[s].max_frames, q, s


def _record(question: Question, setting: Setting, ask: Ask) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": question.id,
        "type": question.type,
        "setting": setting.name,
        "video": str(question.video),
        "question": question.text,
        "answer": question.answer,
    }
    try:
        reply = ask(question, setting)
    except InputError as error:
        return {**record, "error": str(error)}
    return {**record, "reply": reply, "score": score(reply, question.answer, question.metric, question.options)}


def ablations(setting: Setting, wanted: Iterable[str]) -> list[Setting]:
    """`setting` with one thing changed at a time, as in the ablations of the paper (arXiv 2509.25151).

    Args:
        setting: what is varied.
        wanted: texts NAME=VALUE,VALUE,... or NAME alone for its usual values; see `ABLATIONS`.

    Returns:
        `setting` first, then the others; no two alike.

    Raises:
        InputError: a name or a value is unknown, or the setting has nothing of that kind to vary.
    """
    found = {(setting.config, setting.max_frames): setting}
    for text in wanted:
        name, _, values = text.partition("=")
        if name not in ABLATIONS:
            raise InputError(f"--ablate {text}: expected one of {', '.join(ABLATIONS)}, got {name!r}")
        usual, vary = ABLATIONS[name]
        for value in (values or usual).split(","):
            try:
                varied = replace(vary(setting, value.strip()), name=f"{name} {value.strip()}")
            except (ValueError, TypeError) as error:
                raise InputError(f"--ablate {text}: {value.strip()}: {error}") from error
            found.setdefault((varied.config, varied.max_frames), varied)
    return list(found.values())


def _with_config(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, config=replace(setting.config, **changes))


def _with_terms(setting: Setting, letters: str) -> Setting:
    if not letters or not {*letters.upper()} <= {*"QKV"}:
        raise ValueError("expected letters of Q, K and V")
    config = setting.config
    off = {f"alpha_{term}": 0.0 for term in "qkv" if term.upper() not in letters.upper()}
    if not any(getattr(config, f"alpha_{term.lower()}") for term in letters):
        raise ValueError(f"the strength of {letters} is 0 in the setting that is varied")
    return replace(setting, config=replace(config, **off))


def _with_frames(setting: Setting, count: str) -> Setting:
    if int(count) < 1:
        raise ValueError("expected 1 or more")
    return replace(setting, max_frames=int(count))


def _with_scorer(setting: Setting, scorer: str) -> Setting:
    return _with_config(setting, scorer=scorer, score=setting.config.score if scorer == "ssc" else "published")


ABLATIONS: dict[str, tuple[str, Callable[[Setting, str], Setting]]] = {
    "scorer": ("ssc,kmeans,uniform", _with_scorer),
    "score": ("published,size,row_sum", lambda setting, value: _with_config(setting, scorer="ssc", score=value)),
    "clusters": (
        "8,16,24,32",
        lambda setting, value: _with_config(setting, n_clusters=value if value == "auto" else int(value)),
    ),
    "terms": ("K,V,KV", _with_terms),
    "frames": ("8,16,32", _with_frames),
}
"""What can be varied: its usual values, and how."""
