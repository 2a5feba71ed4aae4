"""The questions of a batch: read from JSONL, CSV or a folder of videos, all of them before any work."""

import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...integrations.errors import InputError
from ..csv_text import text_of_cell
from ..text import asked
from ..video.names import Video, Videos, name_of, names_in, shown
from ..video.remote import is_url

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp"}
)
_NAMED = 5
_DELIMITERS = ",;\t"
OWN_COLUMNS = frozenset({"key", "settings", "status", "fingerprint"})
"""They tell a table of results, whose cells are those of `csv_cell`, from other CSV files."""


@dataclass(frozen=True)
class BatchRow:
    """One question about one video, or several videos and images.

    Args:
        number: its line in the input file, or its place among the rows of a folder, from 1.
        video: absolute path, or a URL, or several of these.
        question: not empty.
        columns: what else the input says about it ("id" and any others), carried through to the results.
        fingerprint: of the content, see `matching.fingerprint`; None where it is not there.
        copy: how many rows before it have the same video, question and system prompt; they share an answer.
        system: the system prompt, None for that of the chat template.
    """

    number: int
    video: Videos
    question: str
    columns: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    copy: int = 0
    system: str | None = None

    @property
    def asked(self) -> tuple[str, str, str | None]:
        """What rows share that share an answer: video, question and system prompt."""
        return self.video_name, self.question, self.system

    @property
    def video_name(self) -> str:
        """What tells its video from others, see `names.name_of`."""
        return name_of(shown(self.video))

    def messages(self) -> str | list[dict[str, Any]]:
        """See `text.asked`."""
        return asked(self.question, self.system)

    def key(self, settings_hash: str) -> str:
        """What tells a result apart: 32 hexadecimal digits of the video's path and content, the question, the system
        prompt, the settings and which copy it is."""
        parts = [self.video_name, self.fingerprint, self.question, settings_hash, *([self.copy] if self.copy else [])]
        parts += [] if self.system is None else [{"system": self.system}]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def read_rows(source: Path, questions: Sequence[str] = (), system: str | None = None) -> list[BatchRow]:
    """The rows of a `.jsonl` or `.csv` file, or every video in a folder with every one of `questions`.

    Args:
        source: a file whose rows have the columns `video` (a path or URL, or a list of several; in a CSV as JSON) and
            `question` (and any others), or a folder. Relative paths of videos start at the file's folder. A CSV may
            have commas, semicolons or tabs between its columns.
        questions: for a folder only.
        system: the system prompt of rows that have none of their own in the column `system`.

    Raises:
        InputError: the source is missing or of another kind; the system prompt is empty; rows of it cannot be read
            (their lines are named); it holds no row.
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
    asked("?", system)
    seen = Counter[tuple[str, str, str | None]]()
    for n, row in enumerate(rows):
        row = replace(row, system=system if row.system is None else row.system)
        rows[n] = replace(row, copy=seen[row.asked])
        seen[row.asked] += 1
    return rows


def without_dots(path: Path) -> Path:
    """`path` without `..`, so that a file has one name; `..` after a symbolic link stays, as it leads elsewhere."""
    found = Path()
    for part in path.parts:
        leaves = part == ".." and found.name not in ("", "..") and not found.is_symlink()
        found = found.parent if leaves else found / part
    return found


def by_video(rows: Iterable[BatchRow]) -> list[list[BatchRow]]:
    """The rows of each video, videos in the order in which they first come."""
    groups: dict[Videos, list[BatchRow]] = {}
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
        yield BatchRow(number, without_dots(video.absolute()), question, {"id": str(video.relative_to(folder))})


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
    if not isinstance(content.get("question"), str) or not content["question"].strip():
        raise ValueError(f"question: expected text, got {content.get('question')!r}")
    videos = _videos(content.get("video"), folder)
    system = content.get("system")
    if not isinstance(system, str | None):
        raise ValueError(f"system: expected text, got {system!r}")
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # half of a character, or NaN
        raise ValueError(f"cannot be written as JSON: {error}") from error
    columns = {name: value for name, value in content.items() if name not in ("video", "question", "system")}
    return BatchRow(number, videos, content["question"], columns, system=system if system and system.strip() else None)


def _videos(given: Any, folder: Path) -> Videos:
    names = names_in(given) if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(one, str) and one.strip() for one in names):
        raise ValueError(f"video: expected text, or a list of texts, got {given!r}")
    found: list[Video] = []
    for name in names:
        if "\0" in name:
            raise ValueError(f"video: expected a path, got {name!r}")
        found.append(name.strip() if is_url(name.strip()) else without_dots(folder / name))
    return found[0] if len(found) == 1 else tuple(found)


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
    lines = iter(lines)
    first = next(lines, "")
    delimiter = max(_DELIMITERS, key=lambda one: {"video", "question"} <= {*_header(first, one)})
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if not {"video", "question"} <= {*header} or len({*header}) < len(header):
            raise InputError(
                "CSV: expected different columns, video and question among them, with commas, semicolons or tabs "
                f"between them, got {header}"
            )
        ours = {*header} >= OWN_COLUMNS
        for fields in reader:
            if not fields:
                continue
            if len(fields) == len(header):
                yield reader.line_num, dict(zip(header, map(text_of_cell, fields) if ours else fields, strict=True))
            else:
                yield reader.line_num, ValueError(f"expected {len(header)} fields, got {len(fields)}")
    except csv.Error as error:
        raise InputError(f"CSV line {reader.line_num}: {error}") from error


def _header(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])
