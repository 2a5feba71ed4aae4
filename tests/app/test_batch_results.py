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

from videoanchor_triton.app.batch.results import SCHEMA, VERSION, VERSION_KEY, ResultsLog, columns, write_tables
from videoanchor_triton.app.batch.rows import read_rows
from videoanchor_triton.app.csv_text import text_of_cell
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
from videoanchor_triton.app.batch import results
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


def test_a_result_that_replaces_another(tmp_path: Path) -> None:
    """The old one stays until the log is closed, each key on one line; after a kill the new one is found."""
    path = tmp_path / "results.jsonl"
    with ResultsLog(path) as log:
        for key in "abc":
            log.append(record(key))
        before = path.read_bytes()
        assert log.append(record("b", answer="new"), again=True)
        assert log.append(record("d"), again=True)
        assert path.read_bytes()[: len(before)] == before
        assert (tmp_path / "results.retried.jsonl").read_bytes().count(b"\n") == 1
        killed = {one.name: one.read_bytes() for one in tmp_path.glob("*.jsonl")}
    after = path.read_bytes()
    assert [json.loads(line)["key"] for line in after.splitlines()] == ["a", "b", "c", "d"]
    for torn in (b"", b'{"key": "a", "answer": "torn'):
        for name, content in killed.items():
            (tmp_path / name).write_bytes(content + torn)
        with ResultsLog(path) as log:
            assert log.records["b"]["answer"] == "new"
        assert path.read_bytes() == after
        assert [one.name for one in tmp_path.glob("*.jsonl")] == ["results.jsonl"]


def line(key: str, **more: Any) -> dict[str, Any]:
    return {"key": key, "status": "done", "video": "/a.mp4", "question": "?", "settings": "h", "line": 1, **more}


REPORT = {"eigengap": 0.25, "in_gap": False, "n_iter": 7, "residual": 1e-4, "converged": True, "cached": False}
ROWS = [
    line(
        "a",
        answer="left, or\nright",
        seconds={"vision": 1.5},
        input={"answer": "=1+1", "n": 1},
        ssc=REPORT,
        notes=["x"],
    ),
    line("b", answer="-3", seconds={"vision": 2}, input={"answer": 7, "n": None, "big": 2**70}, n_clusters=24),
    {**line("c", status="failed", reason="é\u2028", failure="input"), "input": {"answer": None}},
    line("d", status="unasked", input={"list": [1, "@"], "answer": "\t=2"}, n_clusters="auto"),
]


def test_tables_hold_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = write_tables(ROWS, tmp_path, ["parquet", "csv"])
    assert paths == [tmp_path / "results.csv", tmp_path / "results.parquet"]
    rows = parquet.read_table(paths[1]).to_pylist()
    inputs = ["input_answer", "input_n", "input_big", "input_list"]
    assert list(rows[0]) == [*columns(), *inputs]
    assert [row["seconds_vision"] for row in rows] == [1.5, 2.0, None, None]
    assert [row["input_answer"] for row in rows] == ["=1+1", "7", None, "\t=2"]
    assert [row["input_n"] for row in rows] == ["1", None, None, None]
    assert [row["input_big"] for row in rows] == [None, str(2**70), None, None]
    assert [row["n_clusters"] for row in rows] == [None, "24", None, "auto"]
    assert {name: rows[0][f"ssc_{name}"] for name in REPORT} == REPORT
    assert (rows[1]["ssc_eigengap"], rows[1]["ssc_in_gap"]) == (None, None)
    assert json.loads(rows[3]["input"]) == ROWS[3]["input"]
    assert rows[0]["notes"] == '["x"]'
    assert rows[2]["reason"] == "é\u2028"
    with paths[0].open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["input_answer"] for row in table] == ["'=1+1", "7", "", "'\t=2"], "no formula"
    assert table[1]["answer"] == "-3", "a number"
    for ours, theirs in zip(table, rows, strict=True):
        for name, value in theirs.items():
            expected = "" if value is None else str(value)
            assert text_of_cell(ours[name]) == expected or float(ours[name]) == float(expected)
    again = [row.question for row in read_rows(paths[0])]
    assert again == ["?"] * 4, "a table of ours is an input as well"


def test_a_question_that_looks_like_a_formula_comes_back_from_our_table(tmp_path: Path) -> None:
    questions = ["=1+1", "'=1+1", "-5", "'-5", "''@x", "plain", "+49 30"]
    write_tables([line(str(n), question=text) for n, text in enumerate(questions)], tmp_path, ["csv"])
    assert [row.question for row in read_rows(tmp_path / "results.csv")] == questions


@pytest.mark.parametrize("some", [ROWS, ROWS[2:3], ROWS[:1], []], ids=["mixed", "failed", "done", "none"])
def test_the_schema_does_not_depend_on_the_data(tmp_path: Path, some: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    dataset = pytest.importorskip("pyarrow.dataset")
    for name, rows in (("some", some), ("base", ROWS)):
        (tmp_path / name).mkdir()
        write_tables(rows, tmp_path / name, ["parquet"])
    tables = [tmp_path / name / "results.parquet" for name in ("some", "base")]
    schemas = [pa.parquet.read_schema(path) for path in tables]
    assert schemas[0].names[: len(columns())] == [*columns()]
    assert not any(pa.types.is_null(schema.field(name).type) for schema in schemas for name in schema.names)
    assert {schema.metadata[VERSION_KEY] for schema in schemas} == {VERSION.encode()}
    for order in (tables, tables[::-1]):
        assert dataset.dataset([dataset.dataset(path) for path in order]).count_rows() == len(some) + 4
        assert dataset.dataset([str(path) for path in order]).to_table().num_rows == len(some) + 4


def test_the_schema_is_that_of_lines_and_rows(tmp_path: Path) -> None:
    """A row has the columns of a line, in their order."""
    published = json.loads((Path(__file__).parents[2] / "docs" / "results.schema.json").read_text(encoding="utf-8"))
    assert published == json.loads(SCHEMA.read_bytes())
    assert published["title"].endswith(f"version {VERSION}")
    flat: dict[str, Any] = {}
    for name, about in published["$defs"]["line"]["properties"].items():
        flat |= {f"{name}_{part}": one for part, one in about.get("properties", {}).items()} or {name: about}
    row = published["$defs"]["row"]
    assert [*flat] == [*row["properties"]] == row["required"] == [*columns()]
    assert [one["description"] for one in flat.values()] == [one["description"] for one in row["properties"].values()]
    jsonschema = pytest.importorskip("jsonschema")
    parquet = pytest.importorskip("pyarrow.parquet")
    jsonschema.Draft202012Validator.check_schema(published)
    validate = jsonschema.Draft202012Validator(published).validate
    for one in ROWS[:3]:
        validate(one)
    write_tables(ROWS, tmp_path, ["parquet"])
    for row in parquet.read_table(tmp_path / "results.parquet").to_pylist():
        validate(row)
    for wrong in ({**ROWS[0], "line": "1"}, {**ROWS[0], "new": 1}, {**ROWS[3]}):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


def test_only_the_tables_asked_for(tmp_path: Path) -> None:
    assert write_tables([record("a")], tmp_path, ["csv"]) == [tmp_path / "results.csv"]
    assert write_tables([], tmp_path, []) == []
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
