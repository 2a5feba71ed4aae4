"""Questions with known answers, asked with the gate in several settings and without it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...anchor.timing import Progress
from ...integrations.lmms_eval.metrics import ExactAnswers
from ..batch.results import ResultsLog
from ..batch.stopping import StopRule, failure_of
from ..batch.worker import reason_of
from ..video.names import name_of, shown
from .questions import Question
from .settings import Setting

Ask = Callable[[Question, Setting], str]
"""The reply to a question in a setting; raises where there is none."""


class Judged(NamedTuple):
    """Replies in some settings, by the answers that are right now.

    Attributes:
        scores: (settings, questions) float64 in [0, 1]; NaN where there is no reply.
        unreadable: (settings, questions) bool: there is a reply, and no letter or number can be read from it.
        foreign: (settings, questions) bool: the same, and replies in words that are the right answer of no question of
            this type.
    """

    scores: np.ndarray
    unreadable: np.ndarray
    foreign: np.ndarray


def evaluate(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    ask: Ask,
    log: ResultsLog,
    progress: Progress | None = None,
    again: set[str] | None = None,
) -> Judged:
    """Asks each question in each setting, those that `log` does not hold yet, video by video.

    Args:
        questions, settings: what to ask, and how.
        ask: called for replies that are missing. An exception of it is kept in the log as a failure.
        log: replies; each is written as it comes.
        progress: called with ("questions", done, all).
        again: keys of failures to ask again, after all others; see `refresh`. Those that were are taken out.

    Raises:
        StoppedError: further questions would fail as well, see `batch.stopping.StopRule`.
    """
    again = set() if again is None else again
    rule = StopRule(len({question.video for question in questions}))
    pairs = [(setting.key(question), question, setting) for question in questions for setting in settings]
    pairs.sort(key=lambda pair: (pair[0] in again, pair[1].video_name, pair[2].max_frames))  # each is decoded once
    for done, (key, question, setting) in enumerate(pairs, 1):
        if key not in log.records or key in again:
            record = {"key": key, **_record(question, setting, ask)}
            log.append(record, again=True)
            again.discard(key)
            if "error" in record:
                rule.failed(record["failure"], record["error"], question.video_name)
            else:
                rule.answered()
        if progress is not None:
            progress("questions", done, len(pairs))
    return judge(questions, settings, log)


def judge(questions: Sequence[Question], settings: Sequence[Setting], log: ResultsLog) -> Judged:
    """The replies that are in `log`."""
    scores = np.full((len(settings), len(questions)), np.nan)
    unreadable, foreign = np.zeros((2, *scores.shape), dtype=bool)
    exact = [question for question in questions if question.metric == "exact"]
    answers = {
        kind: ExactAnswers.of(str(question.answer) for question in exact if question.type == kind)
        for kind in {question.type for question in exact}
    }
    for s, q in np.ndindex(*scores.shape):
        reply = log.records.get(settings[s].key(questions[q]), {}).get("reply")
        if reply is not None:
            question, found = questions[q], questions[q].score(reply)
            scores[s, q], unreadable[s, q] = found or 0.0, found is None
            known = question.metric != "exact" or answers[question.type].has(reply)
            foreign[s, q] = found is None or not known
    return Judged(scores, unreadable, foreign)


def refresh(questions: Sequence[Question], log: ResultsLog) -> set[str]:
    """Gives the replies in `log`, of whatever setting, id, type, answer and score by the questions as they are now.

    Returns:
        keys of the questions without a reply.
    """
    asked = {(question.video_name, question.prompt(), question.system): question for question in questions}
    current = dict(log.records)
    for key, record in log.records.items():
        question = asked.get((name_of(record.get("video", "")), record.get("prompt", ""), record.get("system")))
        if question is not None:
            current[key] = {**record, **_about(question, record.get("reply"))}
    if current != log.records:
        log.replace(current)
    return {key for key, record in current.items() if "error" in record}


def _about(question: Question, reply: str | None) -> dict[str, Any]:
    about = {"id": question.id, "type": question.type, "answer": question.answer}
    return about if reply is None else {**about, "score": question.score(reply) or 0.0}


def _record(question: Question, setting: Setting, ask: Ask) -> dict[str, Any]:
    record = {
        "setting": setting.name,
        "settings": setting.columns(),
        "video": shown(question.video),
        "question": question.text,
        "prompt": question.prompt(),
        "system": question.system,
    }
    try:
        reply = ask(question, setting)
    except Exception as error:
        return {**record, **_about(question, None), "failure": failure_of(error), "error": reason_of(error)}
    return {**record, "reply": reply, **_about(question, reply)}
