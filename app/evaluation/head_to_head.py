"""Two results of the same questions, question by question."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from ...integrations.errors import InputError
from .paired import LEAST_CHANGED, compare, groups_of, interval_text
from .protocol import compare_protocols
from .questions import answer_key
from .readers.result import Answered, Result
from .significance import detectable, mcnemar

VERDICTS = {"gain": "B higher", "loss": "A higher", "no gain shown": "no difference shown"}
NOTE = (
    "Difference: B - A, over the questions that have a score in both. Interval: 95%, bootstrap over videos with all "
    "their questions, each paired with the same question of the other result. A "
    f"difference is shown where the interval leaves out 0 and {LEAST_CHANGED} or more videos changed, the questions of "
    "one taken together; of many rows, one in twenty intervals leaves out 0 by chance. Could show: the true difference "
    "that as many videos, with differences that spread as much, would show with a chance of 80%. McNemar: exact and "
    "two-sided, where all scores are 0 or 1; it takes questions as independent, so that its p is too small where "
    "several are about one video."
)
_NO_VIDEOS = (
    "neither result names the videos of the questions: each question counts as a video of its own, and where several "
    "are about one video the intervals are too narrow; --videos names them"
)
_OTHER_VIDEOS = "the results put the questions together into videos differently: those of A are taken"
_SCALES = "the scores of one result go above 1 and those of the other do not: are they on the same scale?"


class _Pair(NamedTuple):
    """Two results, question by question: n of them in the order of the first.

    Attributes:
        rows: of both.
        before, after: (n,) float64 scores; NaN where there is none.
        known: (n,) bool, those with both.
        videos, types: (n,) text.
        warnings: about the videos.
    """

    rows: list[tuple[Answered, Answered]]
    before: np.ndarray
    after: np.ndarray
    known: np.ndarray
    videos: np.ndarray
    types: np.ndarray
    warnings: list[str]


def changes(a: Result, b: Result) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What `head_to_head` has under "flipped" and "videos".

    Raises:
        InputError: see `head_to_head`.
    """
    found = _pair(a, b)
    return _flipped(found), _by_video(found)


def head_to_head(a: Result, b: Result) -> dict[str, Any]:
    """Compares b with a.

    Returns:
        for JSON: the two sides with their cards, what of their protocols differs ("flags", "others") or could not be
        compared ("unchecked"), "warnings", a "table" over all questions and types, "videos", the questions whose score
        differs ("flipped"), failures, unreadable replies, and a "conclusion" in a sentence.

    Raises:
        InputError: they are of different questions, or no question has a score in both.
    """
    found = _pair(a, b)
    protocol, known = compare_protocols(a, b), found.known
    both = np.concatenate([found.before[known], found.after[known]])
    percent = bool(((both >= 0) & (both <= 1)).all())
    scales = [_SCALES] if (found.before[known] > 1).any() != (found.after[known] > 1).any() else []
    table = []
    for name, group, within in groups_of(found.types, known):
        chosen = known & group
        columns = (found.before, found.after, found.videos, within)
        table.append({"type": name, **_row(*(column[chosen] for column in columns))})
    return {
        "conclusion": _conclusion(table[0], percent, [one["what"] for one in protocol.flags]),
        "a": _side(a, [before for before, _ in found.rows]),
        "b": _side(b, [after for _, after in found.rows]),
        **asdict(protocol),
        "warnings": found.warnings + scales + _unread(found),
        "n_questions": len(found.rows),
        "n_compared": int(known.sum()),
        "percent": percent,
        "table": table,
        "videos": _by_video(found),
        "flipped": _flipped(found),
        "failures": [
            {"id": row.id, "side": side, "error": row.error or "no score"}
            for pair in found.rows
            for side, row in zip("AB", pair, strict=True)
            if row.score is None
        ],
        "unreadable": [
            {"id": row.id, "side": side, "reply": row.reply}
            for pair in found.rows
            for side, row in zip("AB", pair, strict=True)
            if row.read == ""
        ],
        "note": NOTE,
    }


def _pair(a: Result, b: Result) -> _Pair:
    """
    Raises:
        InputError: see `head_to_head`.
    """
    _check_questions(a, b)
    rows = [(row, b.rows[name]) for name, row in a.rows.items()]
    videos, warnings = _videos(rows)
    before, after = (
        np.array([np.nan if one.score is None else one.score for one in side]) for side in zip(*rows, strict=True)
    )
    known = np.isfinite(before) & np.isfinite(after)
    if not known.any():
        raise InputError(f"no question has a score in both {a.source} and {b.source}: see their failures")
    types = np.array([one.type if one.type != "all" else other.type for one, other in rows])
    return _Pair(rows, before, after, known, videos, types, warnings)


def _check_questions(a: Result, b: Result) -> None:
    """
    Raises:
        InputError: the questions differ: by id, or in their text or answer where both results have it.
    """
    only_a, only_b = ([name for name in one.rows if name not in other.rows] for one, other in ((a, b), (b, a)))
    if only_a or only_b:
        raise InputError(
            f"the question sets differ: A has {len(only_a)} that B lacks and B has {len(only_b)} that A lacks, such as "
            f"the id {(only_a or only_b)[0]!r}: compare results of the same questions"
        )
    for name, row in a.rows.items():
        other = b.rows[name]
        one, two = _words(row.question), _words(other.question)
        differ = "" if one is None or two is None or one in two or two in one else "question"
        if not differ and (answers := _answers(row, other)) is not None:
            one, two = answers
            differ = "" if one == two else "answer"
        if differ:
            raise InputError(
                f"the question sets differ: the {differ} of the id {name!r} is {one!r} in A and {two!r} in B: compare "
                "results of the same questions"
            )


def _words(text: str | None) -> str | None:
    return None if text is None else " ".join(text.casefold().split())


def _answers(row: Answered, other: Answered) -> tuple[Any, Any] | None:
    """The right answer according to both; None where one lacks it, or has the letter and the other a text."""
    (kind, answer), (another, right) = _answer(row), _answer(other)
    return None if "none" in (kind, another) or {kind, another} == {"letter", "text"} else (answer, right)


def _answer(row: Answered) -> tuple[str, str | float | None]:
    if row.answer is None:
        return "none", None
    try:
        metric, answer = answer_key(row.answer, row.options, row.metric)
    except ValueError:
        metric, answer = "exact", row.answer
    if metric == "mra":
        return "number", float(answer)
    bare = str(answer).strip().strip("().:")
    return ("letter", bare.upper()) if len(bare) == 1 and bare.isalpha() else ("text", _words(str(answer)))


def _videos(pairs: Iterable[tuple[Answered, Answered]]) -> tuple[np.ndarray, list[str]]:
    """(n,) what names the video of each question, and what is to be said about that."""
    sides = [[row.video for row in side] for side in zip(*pairs, strict=True)]
    named = [side for side in sides if all(video is not None for video in side)]
    if not named:
        return np.array([f"question {n}" for n in range(1, len(sides[0]) + 1)]), [_NO_VIDEOS]
    together = [defaultdict(set) for _ in named]
    for groups, side in zip(together, named, strict=True):
        for n, video in enumerate(side):
            groups[video].add(n)
    parts = [{frozenset(group) for group in groups.values()} for groups in together]
    if len(parts) == 2 and parts[0] != parts[1]:
        return np.array(named[0]), [_OTHER_VIDEOS]
    return np.array(named[0]), []


def _unread(found: _Pair) -> list[str]:
    """Sides of which no reply could be read: their scores say nothing about the model."""
    sides = zip("AB", zip(*found.rows, strict=True), strict=True)
    return [
        f"no answer could be read from any reply of {name}: its scores say nothing"
        for name, rows in sides
        if all(row.read == "" for row in rows if row.score is not None)
    ]


def _row(before: np.ndarray, after: np.ndarray, videos: np.ndarray, within: np.ndarray) -> dict[str, Any]:
    found = compare(after, before, videos, within)
    exact = mcnemar(before, after) if len(np.unique(within)) == 1 else None  # of questions, not of means of types
    return {
        "n": found.n,
        "n_videos": found.n_videos,
        "a": found.baseline,
        "b": found.mean,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "n_changed": found.n_changed,
        "n_videos_changed": found.n_videos_changed,
        "detectable": detectable(after - before, videos, within),
        "mcnemar": None if exact is None else exact._asdict(),
        "verdict": VERDICTS[found.verdict],
    }


def _side(result: Result, rows: list[Answered]) -> dict[str, Any]:
    return {
        "source": result.source,
        "harness": result.harness,
        "setting": result.setting,
        "scoring": result.scoring,
        "n_failed": sum(row.score is None for row in rows),
        "n_unreadable": sum(row.read == "" for row in rows),
        "card": dict(result.card),
    }


def _by_video(found: _Pair) -> list[dict[str, Any]]:
    """Those that changed most first."""
    names, video = np.unique(found.videos[found.known], return_inverse=True)
    n = np.bincount(video)
    a, b = (np.bincount(video, one) / n for one in (found.before[found.known], found.after[found.known]))
    rows = [{"video": str(name), "n": int(n[v]), "a": float(a[v]), "b": float(b[v])} for v, name in enumerate(names)]
    rows = [{**row, "difference": row["b"] - row["a"]} for row in rows]
    return sorted(rows, key=lambda row: -abs(row["difference"]))


def _flipped(found: _Pair) -> list[dict[str, Any]]:
    places = np.flatnonzero(found.known & (found.before != found.after))
    return [_flip(*found.rows[n], str(found.types[n]), str(found.videos[n])) for n in places]


def _flip(before: Answered, after: Answered, kind: str, video: str) -> dict[str, Any]:
    return {
        "id": before.id,
        "video": video,
        "type": kind,
        "question": before.question or after.question or before.prompt or after.prompt,
        "options": list(before.options or after.options),
        "answer": before.answer if before.answer is not None else after.answer,
        "frames": before.frames or after.frames,
        "a": {"score": before.score, "reply": before.reply, "read": before.read},
        "b": {"score": after.score, "reply": after.reply, "read": after.read},
    }


def _conclusion(row: dict[str, Any], percent: bool, flags: list[str]) -> str:
    def number(value: float) -> str:
        return f"{round(100 * value, 2) + 0.0:+.2f}" if percent else f"{value:+.4g}"

    interval = interval_text(number(row["low"]), number(row["high"]), row["n_videos"])
    numbers = (
        f"B - A = {number(row['difference'])}{' points' if percent else ''}, 95% interval {interval}, on {row['n']} "
        f"questions about {row['n_videos']} videos, {row['n_videos_changed']} of which changed"
    )
    found = f"{row['verdict'].capitalize() if row['verdict'].startswith('no') else row['verdict']}: {numbers}."
    return f"{found} The protocols differ ({', '.join(flags)}): the difference may be due to that." if flags else found
