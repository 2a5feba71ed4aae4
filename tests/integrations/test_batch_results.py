"""The results file: every finished row stays, whatever happens, and none comes twice."""

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from videoanchor_triton.integrations.batch.results import ResultsLog, write_tables
from videoanchor_triton.integrations.errors import InputError


def record(key: str, **more: Any) -> dict[str, Any]:
    return {"key": key, "status": "done", "answer": f"ähm\n{key}", **more}


def test_results_are_there_again(tmp_path: Path) -> None:
    with ResultsLog(tmp_path / "out" / "results.jsonl") as log:
        assert log.append(record("a"))
        assert log.append(record("b"))
        assert not log.append(record("a", answer="another"))
    with ResultsLog(tmp_path / "out" / "results.jsonl") as log:
        assert list(log.records.values()) == [record("a"), record("b")]
        assert not log.append(record("b"))
    assert len((tmp_path / "out" / "results.jsonl").read_bytes().splitlines()) == 2


def test_every_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, last = (json.dumps(record(key)).encode() + b"\n" for key in ("a", "b"))
    for cut in range(len(last)):
        path.write_bytes(first + last[:cut])
        with ResultsLog(path) as log:
            assert list(log.records) == ["a"]
            log.append(record("c"))
        assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["a", "c"]


def test_a_last_line_of_zeros_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(json.dumps(record("a")).encode() + b"\n" + b"\0" * 50 + b"\n")
    with ResultsLog(path) as log:
        assert list(log.records) == ["a"]


@pytest.mark.parametrize("line", [b"{", b"[]", b"3", b'{"status": "done"}', b""])
def test_a_broken_line_in_between_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    content = line + b"\n" + json.dumps(record("a")).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 1 is no result"):
        ResultsLog(path)
    assert path.read_bytes() == content


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with ResultsLog(tmp_path / "results.jsonl"), pytest.raises(InputError, match="another run is writing"):
        ResultsLog(tmp_path / "results.jsonl")
    with ResultsLog(tmp_path / "results.jsonl"):
        pass


@pytest.mark.parametrize("truncate", [True, False], ids=["truncated", "left-torn"])
def test_a_full_disk_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncate: bool) -> None:
    write = os.write

    def full(file: int, data: Any) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    def no_truncate(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    path = tmp_path / "results.jsonl"
    with ResultsLog(path) as log:
        log.append(record("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            if not truncate:
                patch.setattr(os, "ftruncate", no_truncate)
            with pytest.raises(OSError, match="No space left"):
                log.append(record("b"))
        assert list(log.records) == ["a"]
        assert (len(path.read_bytes().splitlines()) == 1) is truncate
        if truncate:
            log.append(record("c"))
    with ResultsLog(path) as log:
        assert list(log.records) == (["a", "c"] if truncate else ["a"])
        assert log.append(record("b"))


KILLED = """
import os, signal, sys
from pathlib import Path
from videoanchor_triton.integrations.batch import results
write, log, lines = os.write, results.ResultsLog(Path(sys.argv[1])), 0
def torn(file, data):
    global lines
    lines += 1
    if lines < 4:
        return write(file, data)
    write(file, data[:30])
    os.kill(os.getpid(), signal.SIGKILL)
results.os.write = torn
for key in "abcdef":
    log.append({"key": key, "status": "done", "answer": "x" * 100})
"""


def test_kill_9_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not path.read_bytes().endswith(b"\n")
    with ResultsLog(path) as log:
        assert list(log.records) == ["a", "b", "c"]
        log.append(record("d"))
    with ResultsLog(path) as log:
        assert list(log.records) == ["a", "b", "c", "d"]


def test_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsLog(path) as log:
        for key in "abc":
            log.append(record(key))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(OSError, match="full"):
                log.drop({"a"})
        assert path.read_bytes() == before
        assert [one.name for one in tmp_path.iterdir() if "writing" in one.name] == []
        log.drop({"b"})
        assert list(log.records) == ["a", "c"]
        log.append(record("b"))
    with ResultsLog(path) as log:
        assert list(log.records) == ["a", "c", "b"]


def test_tables_hold_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        record("a", seconds={"vision": 1.5}, input={"answer": "left, or\nright", "n": 1}, notes=["x"], count=3),
        record("b", seconds={"vision": 2}, input={"answer": 7, "n": None}, count=2**70, flag=True),
        {"key": "c", "status": "failed", "reason": "é\u2028", "input": {"answer": None}},
    ]
    paths = write_tables(records, tmp_path, ["parquet", "csv"])
    assert paths == [tmp_path / "results.csv", tmp_path / "results.parquet"]
    rows = parquet.read_table(paths[1]).to_pylist()
    columns = ["key", "status", "answer", "seconds_vision", "input_answer", "input_n", "notes", "count"]
    assert list(rows[0]) == [*columns, "flag", "reason"]
    assert [row["seconds_vision"] for row in rows] == [1.5, 2.0, None]
    assert [row["input_answer"] for row in rows] == ["left, or\nright", "7", None]
    assert [row["count"] for row in rows] == ["3", str(2**70), None]
    assert [row["input_n"] for row in rows] == [1, None, None]
    assert rows[0]["notes"] == '["x"]'
    assert rows[2]["reason"] == "é\u2028"
    with paths[0].open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for ours, theirs in zip(table, rows, strict=True):
        for name, value in theirs.items():
            expected = "" if value is None else str(value)
            assert ours[name] == expected or float(ours[name]) == float(expected)


def test_only_the_tables_asked_for(tmp_path: Path) -> None:
    assert write_tables([record("a")], tmp_path, ["csv"]) == [tmp_path / "results.csv"]
    assert write_tables([], tmp_path, []) == []
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
