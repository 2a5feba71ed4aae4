"""Result files of VLMEvalKit: the predictions of a model on a data set, or the same with scores."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....integrations.errors import InputError
from .plain import from_columns
from .result import OURS, SCORES, Answered, Result, by_id, first_of, scored, text_of
from .table_file import SUFFIXES, read_table

HARNESS = "VLMEvalKit"
_FAILED = "Failed to obtain answer"


def find_table(folder: Path) -> Path | None:
    """The one table of results in a folder: those with scores come before predictions alone.

    Raises:
        InputError: there are several.
    """
    found: dict[bool, list[Path]] = {True: [], False: []}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            try:
                table = read_table(path)
            except InputError:
                continue
            if table and table[0].keys() >= {"index", "prediction"}:
                found[_has_scores(table)].append(path)
    best = found[True] or found[False]
    if len(best) > 1:
        names = ", ".join(path.name for path in best[:5])
        raise InputError(f"{folder} holds {len(best)} tables of results ({names}): give the file of one")
    return best[0] if best else None


def _has_scores(table: list[dict[str, Any]]) -> bool:
    return any(first_of(row, SCORES) is not None for row in table)


def read_vlmevalkit(path: Path) -> Result:
    """
    Args:
        path: MODEL_DATASET.xlsx (or .tsv, .csv, .json), or a file with scores, such as MODEL_DATASET_score.xlsx.

    Raises:
        InputError: it is no such file, or predictions without scores cannot be scored.
    """
    table = read_table(path)
    if not table or not {"index", "prediction"} <= table[0].keys():
        raise InputError(f"{path}: no result of VLMEvalKit: expected the columns index and prediction")
    has_scores = _has_scores(table)
    rows = by_id((_answered(row, path, has_scores) for row in table), path)
    return Result(str(path), HARNESS, f"{HARNESS}'s" if has_scores else OURS, rows, _card(path))


def _answered(row: dict[str, Any], path: Path, has_scores: bool) -> Answered:
    name = text_of(row["index"])
    if name is None:
        raise InputError(f"{path}: a row has no index")
    row = {"options": _literal(row.get("candidates")), **row, "prompt": None}
    answered = from_columns(row, name)
    if _FAILED in (answered.reply or ""):
        return replace(answered, score=None, reply=None, error=answered.reply)
    if answered.score is not None and answered.score < 0:
        return replace(answered, score=None, error="the judge gave no score (-1)")
    if has_scores:
        return answered if answered.score is not None else replace(answered, error="the row has no score")
    try:
        return scored(answered)
    except ValueError as error:
        raise InputError(f"{path}, index {name}: {error}") from error


def _literal(text: Any) -> Any:
    """A list that was written as Python writes it."""
    try:
        value = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _card(path: Path) -> dict[str, Any]:
    """What the name of the file tells: the data set's settings end in _32frame or _1fps."""
    name = path.stem
    frames = {}
    if found := re.search(r"_(\d+)frame", name):
        frames = {"max_frames": int(found[1])}
    elif found := re.search(r"_(\d+(?:\.\d+)?)fps", name):
        frames = {"fps": float(found[1])}
    return {"run": name, **({"frames": frames} if frames else {})}
