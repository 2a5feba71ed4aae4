"""The results of a batch on disk: one line of JSON a row, written as each finishes, and tables of them."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import InputError

Record = dict[str, Any]


class ResultsLog:
    """`results.jsonl`: a line a result, synced to the disk before `append` returns; at most one line a key.

    A line that a killed process left unfinished is dropped when the file is opened. One process at a time may hold a
    file open.

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
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self.records = self._read()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "ResultsLog":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._lock.release()

    def append(self, record: Record) -> bool:
        """Adds a result; False, and nothing is written, if its key is there.

        Raises:
            OSError: it could not be written, as on a full disk; the file is as it was.
        """
        if record["key"] in self.records:
            return False
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        size = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except BaseException:
            with contextlib.suppress(OSError):  # else the unfinished line is dropped when the file is opened
                os.ftruncate(self._file, size)
            raise
        self.records[record["key"]] = record
        return True

    def drop(self, keys: Collection[str]) -> None:
        """Removes the results of these keys: all of them, or on an error none."""
        kept = {key: record for key, record in self.records.items() if key not in keys}
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept.values())
        write_whole(self.path, lines.encode())
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self.records = kept

    def _read(self) -> dict[str, Record]:
        data = self.path.read_bytes()
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
                raise InputError(f"{self.path}: line {number} is no result ({error}): repair or remove it") from error
            size += len(line)
        if size < len(data):
            os.ftruncate(self._file, size)
            os.fsync(self._file)
        return records


def write_tables(records: Iterable[Record], folder: Path, formats: Collection[str]) -> list[Path]:
    """Writes `results.csv` and `results.parquet`, as far as `formats` names them, with the same columns.

    Entries of nested objects become columns of their own (`seconds.vision` as `seconds_vision`), lists become JSON.
    """
    rows = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    written = []
    for name, content in (("csv", _csv), ("parquet", _parquet)):
        if name in formats:
            written.append(folder / f"results.{name}")
            write_whole(written[-1], content(rows, columns))
    return written


def _flat(record: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}_"))
        else:
            flat[prefix + name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat


def _csv(rows: Sequence[Record], columns: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Sequence[Record], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = []
    for name in columns:
        values = [row.get(name) for row in rows]
        if len({type(value) for value in values} - {type(None), *([int] if float in map(type, values) else [])}) > 1:
            values = [None if value is None else str(value) for value in values]  # a column has one type
        try:
            arrays.append(pa.array(values))
        except (pa.ArrowInvalid, OverflowError):  # integers beyond 64 bits
            arrays.append(pa.array([None if value is None else str(value) for value in values]))
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays, names=list(columns)), buffer)
    return buffer.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, or on an error leaves the one that was there."""
    scratch = path.with_name(f".{path.name}.writing")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
