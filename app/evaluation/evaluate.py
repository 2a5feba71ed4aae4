"""Questions with known answers, asked with the gate in several settings and without it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from ...anchor.config import VideoAnchorConfig
from ..batch.results import Record, ResultsLog
from ..batch.stopping import StopRule, failure_of
from ..batch.worker import VIDEO_COLUMNS, reason_of, setting_columns
from .metrics import readable, score
from .questions import Question, digest

Ask = Callable[[Question, "Setting"], str]
"""The reply to a question in a setting; raises where there is none."""


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

    def columns(self) -> dict[str, Any]:
        """What tells it from others in a table, as in the results of a batch."""
        run = {name: value for name, value in self.run if value != "None"}
        video = {**{name: run.get(name) for name in VIDEO_COLUMNS}, "max_frames": self.max_frames}
        about = {name: run.get(name) for name in ("model", "dtype", "fit", "max_new_tokens")}
        return setting_columns({**about, "config": self.config.to_dict(), "video": video})

    def baseline(self) -> "Setting":
        """The same frames and checkpoint with all alphas 0. Scores are uniform: without a gate nobody looks at them."""
        config = VideoAnchorConfig(alpha_k=0.0, alpha_v=0.0, scorer="uniform", n_clusters=1)
        return replace(self, name=f"baseline, {self.max_frames} frames", config=config)


def evaluate(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    ask: Ask,
    log: ResultsLog,
    progress: Callable[[str, int, int], None] | None = None,
    again: set[str] | None = None,
) -> np.ndarray:
    """Asks each question in each setting, those that `log` does not hold yet, video by video.

    Args:
        questions, settings: what to ask, and how.
        ask: called for replies that are missing. An exception of it is kept in the log as a failure.
        log: replies; each is written as it comes.
        progress: called with ("questions", done, all).
        again: keys of failures to ask again, after all others; see `failures`. Those that were are taken out.

    Returns:
        see `scores_of`.

    Raises:
        StoppedError: further questions would fail as well, see `batch.stopping.StopRule`.
    """
    again = set() if again is None else again
    keys = [[setting.key(question) for question in questions] for setting in settings]
    pairs = np.ndindex(len(settings), len(questions))
    order = sorted(pairs, key=lambda pair: (keys[pair[0]][pair[1]] in again, _place(questions, settings, *pair)))
    rule = StopRule(len({question.video for question in questions}))
    for done, (s, q) in enumerate(order, 1):
        key = keys[s][q]
        if key not in log.records or key in again:
            record = {"key": key, **_record(questions[q], settings[s], ask)}
            log.append(record, again=True)
            again.discard(key)
            if "error" in record:
                rule.failed(record["failure"], record["error"], record["video"])
            else:
                rule.answered()
        if progress is not None:
            progress("questions", done, len(order))
    return scores_of(questions, settings, log)


def scores_of(questions: Sequence[Question], settings: Sequence[Setting], log: ResultsLog) -> np.ndarray:
    """(settings, questions) float64 scores in [0, 1] of the replies in `log`, by the answers that are right now; NaN
    where there is none."""
    scores = np.full((len(settings), len(questions)), np.nan)
    for s, q in np.ndindex(*scores.shape):
        reply = log.records.get(settings[s].key(questions[q]), {}).get("reply")
        if reply is not None:
            scores[s, q] = score(reply, questions[q].answer, questions[q].metric, questions[q].options)
    return scores


def unreadable(questions: Sequence[Question], setting: Setting, log: ResultsLog) -> np.ndarray:
    """(questions,) bool: there is a reply, and no letter or number can be read from it."""
    replies = [log.records.get(setting.key(question), {}).get("reply") for question in questions]
    return np.array(
        [
            reply is not None and not readable(reply, question.metric, question.options)
            for reply, question in zip(replies, questions, strict=True)
        ]
    )


def failures(log: ResultsLog) -> set[str]:
    """Keys of the questions without a reply."""
    return {key for key, record in log.records.items() if "error" in record}


def refreshed(questions: Sequence[Question], records: Mapping[str, Record]) -> dict[str, Record]:
    """The replies, in whatever setting, with id, type, answer and score by the questions as they are now."""
    asked = {(str(question.video), question.prompt()): question for question in questions}
    found = {}
    for key, record in records.items():
        question = asked.get((record.get("video", ""), record.get("prompt", "")))
        found[key] = record if question is None else {**record, **_judged(question, record.get("reply"))}
    return found


def _judged(question: Question, reply: str | None) -> dict[str, Any]:
    about = {"id": question.id, "type": question.type, "answer": question.answer}
    if reply is not None:
        about["score"] = score(reply, question.answer, question.metric, question.options)
    return about


def _place(questions: Sequence[Question], settings: Sequence[Setting], s: int, q: int) -> tuple[str, int, int, int]:
    """Video by video, so that each is decoded once."""
    return str(questions[q].video), settings[s].max_frames, q, s


def _record(question: Question, setting: Setting, ask: Ask) -> dict[str, Any]:
    record = {
        "setting": setting.name,
        "settings": setting.columns(),
        "video": str(question.video),
        "question": question.text,
        "prompt": question.prompt(),
    }
    try:
        reply = ask(question, setting)
    except Exception as error:
        return {**record, **_judged(question, None), "failure": failure_of(error), "error": reason_of(error)}
    return {**record, "reply": reply, **_judged(question, reply)}
