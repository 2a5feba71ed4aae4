"""Scores or replies as JSONL, from whatever made them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....integrations.errors import InputError
from .result import (
    ANSWERS,
    OURS,
    REPLIES,
    SCORES,
    TYPES,
    Answered,
    Result,
    by_id,
    first_of,
    number_of,
    options_of,
    scored,
    text_of,
    video_of,
)

_IDS = ("id", "question_id", "index")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        InputError: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: no row of results ({error})") from error
            rows.append(row)
    return rows


def read_plain(path: Path) -> Result:
    """Rows {id, video, score} or {id, video, prediction, answer}; as wanted type, question, options, metric and prompt,
    and {"card": {...}} as the first line.

    Raises:
        InputError: a row lacks what it needs, or a score is no number.
    """
    rows = json_lines(path)
    card = rows.pop(0)["card"] if rows and rows[0].keys() == {"card"} else {}
    if not isinstance(card, dict):
        raise InputError(f"{path}: the card in line 1 is no object: give sections such as frames and prompt")
    has_scores = any(first_of(row, SCORES) is not None for row in rows)
    answered = [_answered(row, f"{path}, row {number}", has_scores) for number, row in enumerate(rows, 1)]
    return Result(str(path), "JSONL", "the file's own" if has_scores else OURS, by_id(answered, path), card)


def _answered(row: dict[str, Any], where: str, has_scores: bool) -> Answered:
    name = text_of(first_of(row, _IDS))
    if name is None:
        raise InputError(f"{where}: no id: expected id, video and score, or id, video, prediction and answer")
    answered = from_columns(row, name)
    if answered.error is not None or answered.score is not None:
        return answered
    if has_scores and "score" in row and row["score"] is None:
        return replace(answered, error="the row has no score")
    if has_scores or answered.reply is None:
        raise InputError(
            f"{where}: expected a number as score (null where there is none), or in all rows a prediction and no score"
        )
    try:
        return scored(answered)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def from_columns(row: dict[str, Any], name: str) -> Answered:
    """What a row says, under the names that harnesses give it; its score where it has one."""
    kind, reply = text_of(first_of(row, TYPES)), text_of(first_of(row, REPLIES))
    return Answered(
        id=name,
        score=number_of(first_of(row, SCORES)),
        video=video_of(row),
        type="all" if kind is None else kind,
        question=text_of(row.get("question")),
        options=options_of(row),
        metric=text_of(row.get("metric")),
        answer=text_of(first_of(row, ANSWERS)),
        prompt=text_of(row.get("prompt")),
        reply=row["prediction"] if row.get("prediction") == "" else reply,
        error=text_of(row.get("error")),
    )
