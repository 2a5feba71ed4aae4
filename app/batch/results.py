"""What a batch writes: `results.jsonl`, a line a row, as each finishes, and from it the tables `results.csv` and
`results.parquet`. results.schema.json beside this file declares their columns, whatever the data."""

import contextlib
import io
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...integrations.errors import InputError
from ..atomic_write import naming, write_whole
from ..csv_text import csv_text
from ..text import json_text

Record = dict[str, Any]
SCHEMA = Path(__file__).with_name("results.schema.json")
VERSION = "3"
"""Of `SCHEMA`: it changes when a column goes, or changes its type or what it means."""
VERSION_KEY = b"videoanchor.results"
"""Of the metadata of a Parquet file."""


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


def write_tables(records: Iterable[Record], folder: Path, formats: Collection[str]) -> list[Path]:
    """Writes `results.csv` and `results.parquet`, as far as `formats` names them, with the same columns: those of
    `SCHEMA` (the entry `vision` of `seconds` as `seconds_vision`; lists and objects as text of JSON), and text for each
    column of the input, `input_NAME`.

    Text of the CSV that a spreadsheet would run has a quote before it, see `csv_cell`.
    """
    records = list(records)
    inputs = dict.fromkeys(f"input_{name}" for record in records for name in record.get("input", {}))
    types = columns() | dict.fromkeys(inputs, "string")
    rows = [_row(record, types) for record in records]
    written = []
    for name, content in (("csv", _csv), ("parquet", _parquet)):
        if name in formats:
            written.append(folder / f"results.{name}")
            write_whole(written[-1], content(rows, types))
    return written


@cache
def columns() -> dict[str, str]:
    """The columns of tables, each with its type: string, integer, number or boolean. Any may be null."""
    properties: dict[str, Any] = json.loads(SCHEMA.read_bytes())["$defs"]["row"]["properties"]
    types = {name: about.get("type", "string") for name, about in properties.items()}
    return {name: kind if isinstance(kind, str) else kind[0] for name, kind in types.items()}


def _row(record: Record, types: Mapping[str, str]) -> Record:
    parts = {
        f"{name}_{part}": one
        for name, value in record.items()
        if isinstance(value, dict)
        for part, one in value.items()
    }
    flat = {**parts, **record}
    return {name: _text(flat.get(name)) if kind == "string" else flat.get(name) for name, kind in types.items()}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _csv(rows: Sequence[Record], types: Mapping[str, str]) -> bytes:
    return csv_text([*types], rows).encode()


def _parquet(rows: Sequence[Record], types: Mapping[str, str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(), "string": pa.string()}
    schema = pa.schema({name: kinds[kind] for name, kind in types.items()}, metadata={VERSION_KEY: VERSION})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer := io.BytesIO())
    return buffer.getvalue()
