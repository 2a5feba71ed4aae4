"""The questions of a batch: read from JSONL, CSV or a folder of videos, all of them before any work; and which
results are theirs."""

import csv
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp"}
)
_NAMED = 5
_END = 2**20
_IMAGE_END = 2**14
"""Bytes of each end of a file that a fingerprint reads; of an image in a folder fewer, as there may be many."""


@dataclass(frozen=True)
class BatchRow:
    """One question about one video.

    Args:
        number: its line in the input file, or its place among the rows of a folder, from 1.
        video: absolute path.
        question: not empty.
        columns: what else the input says about it ("id" and any others), carried through to the results.
        fingerprint: of the video's content, see `fingerprint`; None where it is not there.
    """

    number: int
    video: Path
    question: str
    columns: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    def key(self, settings_hash: str) -> str:
        """What tells a result apart: 32 hexadecimal digits of the video's path and content, the question and the
        settings."""
        parts = json.dumps([str(self.video), self.fingerprint, self.question, settings_hash])
        return hashlib.sha256(parts.encode()).hexdigest()[:32]


def read_rows(source: Path, questions: Sequence[str] = ()) -> list[BatchRow]:
    """The rows of a `.jsonl` or `.csv` file, or every video in a folder with every one of `questions`.

    Args:
        source: a file whose rows have the columns `video` and `question` (and any others), or a folder. Relative paths
            of videos start at the file's folder.
        questions: for a folder only.

    Raises:
        InputError: the source is missing or of another kind; rows of it cannot be read (their lines are named); it
            holds no row.
    """
    if source.is_dir():
        rows = list(_folder_rows(source, questions))
    else:
        if questions:
            raise InputError(f"--question is for a folder of videos; {source} has its own column `question`")
        if not source.is_file():
            raise InputError(f"no input at {source}: give a .jsonl file, a .csv file or a folder of videos")
        readers: dict[str, Callable[[Iterable[str]], Iterator[tuple[int, Any]]]] = {".jsonl": _jsonl, ".csv": _csv}
        if source.suffix.lower() not in readers:
            raise InputError(f"{source}: expected a .jsonl file, a .csv file or a folder of videos")
        rows = _file_rows(source, readers[source.suffix.lower()])
    if not rows:
        raise InputError(f"{source} holds no row: expected at least one video and question")
    return rows


def without_repeats(rows: Sequence[BatchRow]) -> tuple[list[BatchRow], list[tuple[int, int]]]:
    """The first row of each video and question; and for the others their number and that of the first."""
    first: dict[tuple[Path, str], BatchRow] = {}
    repeats = []
    for row in rows:
        kept = first.setdefault((row.video, row.question), row)
        if kept is not row:
            repeats.append((row.number, kept.number))
    return list(first.values()), repeats


def fingerprint(video: Path) -> str | None:
    """32 hexadecimal digits that differ where the size, the first or the last MiB of a file do; of a folder of views
    the names and sizes of its images, or the first or last 16 KiB of one. None for what is not there or cannot be read.

    Nothing else is read: a change in the middle of a file that keeps its size is not seen.
    """
    try:
        if video.is_dir():
            from ..video.views import images_of

            parts = [(image.name, *_size_and_ends(image, _IMAGE_END)) for image in images_of(video)[0]]
        elif video.is_file():
            parts = [_size_and_ends(video, _END)]
        else:
            return None
    except OSError:
        return None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _size_and_ends(path: Path, n_bytes: int) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(n_bytes))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - n_bytes, 0))
        digest.update(file.read(n_bytes))
    return size, digest.hexdigest()


def with_fingerprints(
    rows: Sequence[BatchRow], records: Mapping[str, dict[str, Any]], settings_hash: str
) -> tuple[list[BatchRow], dict[str, str]]:
    """The rows with the fingerprints of their videos, each read once; and what their results replace.

    A video that is not there (any more) gets the fingerprint of the result it has: that stays its result.

    Args:
        rows: without repeats.
        records: results by key.

    Returns:
        the rows; and of each result of one of them (by path, question and settings) that was made from other content
        its key, with the key of the row.
    """
    fingerprints = {video: fingerprint(video) for video in dict.fromkeys(row.video for row in rows)}
    results: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records.values():
        if record["settings"] == settings_hash:
            results[record["video"], record["question"]].append(record)
    current, replaced = [], {}
    for row in rows:
        earlier = results[str(row.video), row.question]
        content = fingerprints[row.video]
        if content is None and earlier:
            content = earlier[-1].get("fingerprint")
        current.append(replace(row, fingerprint=content))
        key = current[-1].key(settings_hash)
        replaced |= {record["key"]: key for record in earlier if record["key"] != key}
    return current, replaced


def by_video(rows: Iterable[BatchRow]) -> list[list[BatchRow]]:
    """The rows of each video, videos in the order in which they first come."""
    groups: dict[Path, list[BatchRow]] = {}
    for row in rows:
        groups.setdefault(row.video, []).append(row)
    return list(groups.values())


def _folder_rows(folder: Path, questions: Sequence[str]) -> Iterator[BatchRow]:
    if not questions or not all(question.strip() for question in questions):
        raise InputError(f"{folder} is a folder: give the question about its videos with --question")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not videos:
        raise InputError(f"{folder} holds no video: expected files such as clip{', clip'.join(sorted(VIDEO_SUFFIXES))}")
    pairs = [(video, question) for video in videos for question in questions]
    for number, (video, question) in enumerate(pairs, 1):
        yield BatchRow(number, video.absolute(), question, {"id": str(video.relative_to(folder))})


def _file_rows(source: Path, reader: Callable[[Iterable[str]], Iterator[tuple[int, Any]]]) -> list[BatchRow]:
    rows, problems = [], []
    with source.open("rb") as file:
        for number, content in reader(_lines(file)):
            try:
                rows.append(_row(number, content, source.absolute().parent))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise InputError(f"{source}: rows cannot be read: {'; '.join(problems[:_NAMED])}{more}")
    return rows


def _row(number: int, content: Any, folder: Path) -> BatchRow:
    if isinstance(content, ValueError):
        raise content
    if not isinstance(content, dict):
        raise ValueError(f"expected an object with video and question, got {type(content).__name__}")
    for name in ("video", "question"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise ValueError(f"{name}: expected text, got {content.get(name)!r}")
    if "\0" in content["video"]:
        raise ValueError(f"video: expected a path, got {content['video']!r}")
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # half of a character, or NaN
        raise ValueError(f"cannot be written as JSON: {error}") from error
    columns = {name: value for name, value in content.items() if name not in ("video", "question")}
    return BatchRow(number, folder / content["video"], content["question"], columns)


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} of the input is not UTF-8 ({error.reason}): save it as UTF-8") from error


def _jsonl(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                content = ValueError(f"not JSON ({error})")
            yield number, content


def _csv(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if not {"video", "question"} <= {*header} or len({*header}) < len(header):
            raise InputError(f"CSV: expected different columns, video and question among them, got {header}")
        for fields in reader:
            if not fields:
                continue
            if len(fields) == len(header):
                yield reader.line_num, dict(zip(header, fields, strict=True))
            else:
                yield reader.line_num, ValueError(f"expected {len(header)} fields, got {len(fields)}")
    except csv.Error as error:
        raise InputError(f"CSV line {reader.line_num}: {error}") from error
