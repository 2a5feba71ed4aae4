"""Which harness wrote a result, by what is there."""

import json
from dataclasses import replace
from pathlib import Path

from ....integrations.errors import InputError
from .lmms_eval import find_samples, is_sample, read_lmms_eval
from .own import is_own, read_own
from .plain import json_lines, read_plain
from .result import Result, text_of, video_of
from .table_file import SUFFIXES
from .vlmevalkit import find_table, read_vlmevalkit


def read_result(path: Path, setting: str | None = None, metric: str | None = None) -> Result:
    """A result of `videoanchor eval`, lmms-eval or VLMEvalKit, or a plain JSONL.

    Args:
        path: a folder, or a file of it.
        setting: of our own `eval`; None for "gate", or the only one with a gate.
        metric: of lmms-eval's samples; None where there is one.

    Raises:
        InputError: there is nothing to read, or it cannot be read; `setting` or `metric` does not go with it.
    """
    if not path.exists():
        raise InputError(f"no result at {path}: give a folder or a file of one")
    try:
        found = _read(path, setting, metric)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} is not as its harness writes it ({why}): give the files as they were written"
        ) from error
    if setting is not None and found.setting is None:
        raise InputError(f"{path} is of {found.harness}, which has no settings: leave {setting!r} out")
    return found


def _read(path: Path, setting: str | None, metric: str | None) -> Result:
    if path.is_dir():
        if (path / "eval.json").is_file():
            return read_own(path / "eval.json", setting)
        if samples := find_samples(path):
            return read_lmms_eval(samples, path, metric)
        if (table := find_table(path)) is not None:
            return read_vlmevalkit(table)
        raise InputError(
            f"{path} holds no result: expected eval.json, lmms-eval's *_samples_*.jsonl (--log_samples) or a result "
            "file of VLMEvalKit; a JSONL of scores is given as a file"
        )
    if path.suffix.lower() == ".jsonl":
        rows = json_lines(path)
        return read_lmms_eval([path], path, metric) if rows and is_sample(rows[0]) else read_plain(path)
    if path.suffix.lower() == ".json":
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}): give the file as it was written") from error
        if is_own(record):
            return read_own(path, setting)
        if isinstance(record, dict):
            raise InputError(
                f"{path}: no result of videoanchor eval; for lmms-eval give the folder, or *_samples_*.jsonl of it"
            )
    if path.suffix.lower() in SUFFIXES:
        return read_vlmevalkit(path)
    raise InputError(f"{path}: expected a folder, or a file .json, .jsonl, .xlsx, .tsv or .csv")


def with_videos(result: Result, file: Path) -> Result:
    """`result` with the videos that a JSONL of rows {id, video} names.

    Raises:
        InputError: it lacks a question.
    """
    videos = {text_of(row.get("id")): video_of(row) for row in json_lines(file)}
    if missing := [name for name in result.rows if videos.get(name) is None]:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InputError(f"--videos {file}: no video for the id {missing[0]!r}{others} of {result.source}")
    return replace(result, rows={name: replace(row, video=videos[name]) for name, row in result.rows.items()})
