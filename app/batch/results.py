"""The results of a batch on disk: one line of JSON a row, written as each finishes."""

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...integrations.errors import InputError
from ..atomic_write import naming, write_whole
from ..text import json_text

Record = dict[str, Any]


class ResultsLog:
    """`results.jsonl`: a line a result, synced to the disk before `append` returns; at most one line a key.

    Results that replace others are kept in a file beside it (`results.retried.jsonl`) until the log is closed, or
    opened again after a kill: none is gone before the other is there. A line that a killed process left unfinished is
    dropped when the file is opened. One process at a time may hold a file open.

    Attributes:
        records: the results by key, in the order in which they finished.

    Raises:
        InputError: another process holds the file, or a line of it is no result.
        OSError: the file cannot be made, read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_suffix(".lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InputError(f"another run is writing {path}: wait for it, or give another --out") from error
        self._retried_path = path.with_suffix(f".retried{path.suffix}")
        self._retried: int | None = None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            self.records = _read(path, self._file)
            if self._retried_path.exists():
                self._retried = self._open_retried()
                self.records |= _read(self._retried_path, self._retried)
                self._settle()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "ResultsLog":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            os.close(self._file)
            self._lock.release()

    def append(self, record: Record, *, again: bool = False) -> bool:
        """Adds a result; False, and nothing is written, if its key is there.

        Args:
            again: it replaces the result of its key.

        Raises:
            OSError: it could not be written, as on a full disk; the file is as it was.
        """
        if record["key"] not in self.records:
            _append(self._file, record, self.path)
        elif again:
            if self._retried is None:
                self._retried = self._open_retried()
            _append(self._retried, record, self._retried_path)
        else:
            return False
        self.records[record["key"]] = record
        return True

    def drop(self, keys: Collection[str]) -> None:
        """Removes the results of these keys: all of them, or on an error none."""
        self.replace({key: record for key, record in self.records.items() if key not in keys})

    def replace(self, records: Mapping[str, Record]) -> None:
        """Has these results in place of all: whole, or on an error not at all."""
        lines = "".join(json_text(record, None) + "\n" for record in records.values())
        write_whole(self.path, lines.encode())
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
        self.records = dict(records)
        if self._retried is not None:
            os.close(self._retried)
            self._retried = None
            self._retried_path.unlink()

    def _open_retried(self) -> int:
        return os.open(self._retried_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)

    def _settle(self) -> None:
        """Results that replace others take their places."""
        if self._retried is not None:
            self.replace(self.records)


def _append(file: int, record: Record, path: Path) -> None:
    line = memoryview((json_text(record, None) + "\n").encode())
    size = os.fstat(file).st_size
    try:
        with naming(path):
            while line:
                line = line[os.write(file, line) :]
            os.fsync(file)
    except BaseException:
        with contextlib.suppress(OSError):  # else the unfinished line is dropped when the file is opened
            os.ftruncate(file, size)
        raise


def _read(path: Path, file: int) -> dict[str, Record]:
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    records: dict[str, Record] = {}
    size = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n"):
                raise ValueError("unfinished")
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is no result ({error}): repair or remove it") from error
        size += len(line)
    if size < len(data):
        os.ftruncate(file, size)
        os.fsync(file)
    return records
