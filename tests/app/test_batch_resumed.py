"""`videoanchor batch` again: after failures, interrupts, kills, a full disk, a lost device, and with other input."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from batch_runs import answers, arguments, count_questions, no_model, results, states, table

from videoanchor_triton.app import cli, pipeline
from videoanchor_triton.app.batch import results as batch_results
from videoanchor_triton.app.batch.matching import fingerprint


def test_retry_failed(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(n: int) -> None:
        if n == 2:
            raise RuntimeError("something odd")

    with monkeypatch.context() as patch:
        asked = count_questions(patch, broken)
        assert cli.main(arguments(job, tmp_path)) == 1
    assert {
        record["input"]["id"]: record["reason"] for record in results(tmp_path) if record["status"] == "failed"
    } == {
        "4": "RuntimeError: something odd",
        "3": f"no video file at {job / 'clips' / 'gone.mp4'}: check the path",
    }
    asked = count_questions(monkeypatch)
    assert cli.main(arguments(job, tmp_path, "--retry-failed")) == 1
    assert asked == ["word8 word9 word10"]
    records = results(tmp_path)
    assert Counter(record["input"]["id"] for record in records) == Counter("12345"), "a line a row"
    assert [record["input"]["id"] for record in records if record["status"] == "failed"] == ["3"]


def test_a_video_that_changes(
    job: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing one appears, one is replaced, then taken away, at last all of them: a line a row, of what was there."""
    moved, out = Path(shutil.copytree(job, tmp_path / "job")), tmp_path / "out"
    clips = moved / "clips"

    def run(status: int) -> list[str]:
        with monkeypatch.context() as patch:
            asked = count_questions(patch)
            assert cli.main(arguments(moved, out)) == status
        assert Counter(record["input"]["id"] for record in results(out)) == Counter("12345")
        assert {row["input_id"]: row["answer"] or None for row in table(out)} == answers(out)
        return asked

    run(1)
    assert answers(out) == answers(finished)
    capsys.readouterr()
    shutil.copy(clips / "b.mp4", clips / "gone.mp4")
    assert run(0) == ["word7"]
    assert "1 results are of videos that have changed: answered anew" in capsys.readouterr().err
    assert answers(out)["3"] == answers(out)["2"]
    shutil.copy(clips / "b.mp4", clips / "a.mp4")
    assert run(0) == ["word5 word6", "word8 word9 word10", "word7"]
    assert answers(out)["5"] == answers(out)["2"]
    first = next(record for record in results(out) if record["input"]["id"] == "1")
    assert first["fingerprint"] == fingerprint(clips / "a.mp4")
    shutil.rmtree(clips)
    assert run(0) == []


def test_an_old_result_stays_until_the_new_one_is_there(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the second of three questions about a replaced video."""

    def interrupt(n: int) -> None:
        if n == 2:
            raise KeyboardInterrupt

    moved, out = Path(shutil.copytree(job, tmp_path / "job")), tmp_path / "out"
    assert cli.main(arguments(moved, out)) == 1
    old = answers(out)
    shutil.copy(moved / "clips" / "b.mp4", moved / "clips" / "a.mp4")
    with monkeypatch.context() as patch:
        count_questions(patch, interrupt)
        assert cli.main(arguments(moved, out)) == 130
    new = {record["input"]["id"]: record["fingerprint"] for record in results(out)}
    assert Counter(record["input"]["id"] for record in results(out)) == Counter("12345")
    assert new["1"] == new["2"] != new["4"] == new["5"]
    assert {**answers(out), "1": old["1"]} == old
    assert states(out) == {"1": "done", "2": "done", "3": "failed", "4": "unasked", "5": "unasked"}


def test_ctrl_c(
    job: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(n: int) -> None:
        if n == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_questions(patch, interrupt)
        assert cli.main(arguments(job, tmp_path)) == 130
    assert "2 more rows are done; the same command goes on" in capsys.readouterr().err
    assert list(answers(tmp_path)) == ["1", "4"]
    assert states(tmp_path) == {"1": "done", "2": "unasked", "3": "unasked", "4": "done", "5": "unasked"}
    asked = count_questions(monkeypatch)
    assert cli.main(arguments(job, tmp_path)) == 1
    assert asked == ["word7", "word7"]
    assert answers(tmp_path) == answers(finished)


@pytest.mark.parametrize("at", ["load", "tables"])
def test_ctrl_c_before_and_after_all_rows(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    """While the model is loaded there is nothing for a table yet; while the tables are written it stops, again too."""

    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    target = (pipeline, "load") if at == "load" else (batch_results, "_csv")
    monkeypatch.setattr(*target, interrupt)
    for _ in range(2):
        assert cli.main(arguments(job, tmp_path)) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "videoanchor batch: interrupted"
    assert len(results(tmp_path)) == (0 if at == "load" else 5)
    assert not list(tmp_path.glob("results.csv"))


def test_a_second_ctrl_c_stops_at_once(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one comes at the second question, the second while the tables are written."""

    def interrupt(n: object) -> Any:
        if n != 1:
            raise KeyboardInterrupt

    count_questions(monkeypatch, interrupt)
    monkeypatch.setattr(batch_results, "_parquet", lambda *_: interrupt(2))
    assert cli.main(arguments(job, tmp_path)) == 130
    assert list(answers(tmp_path)) == ["1"]
    assert {path.name for path in tmp_path.glob("*results*")} == {"results.jsonl", "results.lock", "results.csv"}


def test_a_full_disk(
    job: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, n = os.write, 0

    def full(file: int, data: Any) -> int:
        nonlocal n
        n += bytes(data[:6]) == b'{"key"'
        if n <= 2:
            return write(file, data)
        if len(data) > 100:
            return write(file, data[: len(data) - 100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert cli.main(arguments(job, tmp_path)) == 1
    assert f"No space left on device: '{tmp_path / 'results.jsonl'}'" in capsys.readouterr().err.splitlines()[-1]
    assert list(answers(tmp_path)) == ["1", "4"]
    assert cli.main(arguments(job, tmp_path)) == 1
    assert answers(tmp_path) == answers(finished)


def test_no_permission(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(path: Any, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(pipeline, "load", no_model)
    assert cli.main(arguments(job, tmp_path / "out")) == 1
    assert "Permission denied" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from videoanchor_triton.app.batch import results
from videoanchor_triton.app import cli
write, lines = os.write, 0
def torn(file, data):
    global lines
    lines += bytes(data[:6]) == b'{"key"'
    if lines < 3:
        return write(file, data)
    write(file, data[:50])
    os.kill(os.getpid(), signal.SIGKILL)
results.os.write = torn
cli.main(sys.argv[1:])
"""


def test_kill_9(job: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", KILLED, *arguments(job, tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "results.jsonl").read_bytes().count(b"\n") == 2
    asked = count_questions(monkeypatch)
    assert cli.main(arguments(job, tmp_path)) == 1
    assert asked == ["word7", "word7"]
    assert answers(tmp_path) == answers(finished)
    assert Counter(record["input"]["id"] for record in results(tmp_path)) == Counter("12345")


def test_an_edited_input(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, answers, order and rows have changed: tables and results are those of the file as it is now; a row that is
    there twice is asked once and has two results."""
    moved, out = Path(shutil.copytree(job, tmp_path / "job")), tmp_path / "out"
    assert cli.main(arguments(moved, out)) == 1
    old = answers(out)
    assert cli.main(arguments(moved, out, "--alpha-k", "8")) == 1
    rows = [
        {"id": "new", "video": "clips/b.mp4", "question": "word20"},
        {"id": "B", "video": "./clips/../clips/b.mp4", "question": "word7", "answer": "other"},
        {"id": "A", "video": "clips/a.mp4", "question": "word5 word6", "split": "=val"},
        {"id": "A again", "video": "clips/a.mp4", "question": "word5 word6", "split": "test"},
        {"id": "new again", "video": "clips/b.mp4", "question": "word20"},
    ]
    (moved / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = count_questions(monkeypatch)
    assert cli.main(arguments(moved, out)) == 0
    assert asked == ["word20"]
    lines = [(row["line"], row["input_id"], row["input_answer"], row["input_split"]) for row in table(out)]
    assert lines[:5] == [
        ("1", "new", "", ""), ("2", "B", "other", ""), ("3", "A", "", "'=val"), ("4", "A again", "", "test"),
        ("5", "new again", "", ""),
    ]  # fmt: skip
    assert lines[5:] == lines[1:3], "of the other strength"
    now = {row["input_id"]: row["answer"] for row in table(out)[:5]}
    assert [now[name] for name in ("B", "A", "A again", "new again")] == [old["2"], old["1"], old["1"], now["new"]]
    current = [record for record in results(out) if record["line"] is not None and record["alpha_k"] == 2]
    assert sorted((record["line"], record["input"]["id"]) for record in current) == [
        (n, row["id"]) for n, row in enumerate(rows, 1)
    ]
    assert Counter(record["input"]["id"] for record in results(out) if record["line"] is None) == Counter("334455")
    shutil.copy(job / "questions.jsonl", moved / "questions.jsonl")
    assert cli.main(arguments(moved, out)) == 1
    assert len(asked) == 1, "nothing was lost"
    assert [(row["line"], row["input_id"]) for row in table(out)[:5]] == [(str(n), str(n)) for n in range(1, 6)]


CUDA_ERROR = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"


def test_a_device_that_is_lost(
    job: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row at which it happens fails, those after it are not asked; the same command goes on with them."""

    def lost(n: int) -> None:
        if n >= 2:
            raise RuntimeError(CUDA_ERROR)

    with monkeypatch.context() as patch:
        asked = count_questions(patch, lost)
        assert cli.main(arguments(job, tmp_path, "--json")) == 1
    assert len(asked) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "the device failed" in shown.err
    assert "CUDA error: device-side assert triggered" in shown.err
    assert "3 rows were not asked, the same command goes on" in shown.err
    summary = json.loads(shown.out)
    assert (summary["done"], summary["failed"], summary["unasked"]) == (1, 1, 3)
    assert states(tmp_path) == {"1": "done", "2": "unasked", "3": "unasked", "4": "failed", "5": "unasked"}
    assert [record["failure"] for record in results(tmp_path)] == [None, "accelerator"]
    asked = count_questions(monkeypatch)
    assert cli.main(arguments(job, tmp_path)) == 1
    assert len(asked) == 2
    assert cli.main(arguments(job, tmp_path, "--retry-failed")) == 1
    assert answers(tmp_path) == answers(finished)


def test_a_retry_that_is_killed(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures stay in results and tables until their replacement is there."""

    def broken(n: int) -> None:
        if n != 1:
            raise RuntimeError(f"something odd {'x' * n}")

    def killed(n: int) -> None:
        if n == 2:
            (tmp_path / "copy").mkdir()
            for path in (tmp_path / "out").glob("results*"):
                shutil.copy(path, tmp_path / "copy")

    with monkeypatch.context() as patch:
        count_questions(patch, broken)
        assert cli.main(arguments(job, tmp_path / "out")) == 1
    before = results(tmp_path / "out")
    with monkeypatch.context() as patch:
        count_questions(patch, killed)
        assert cli.main(arguments(job, tmp_path / "out", "--retry-failed")) == 1
    assert results(tmp_path / "copy") == before
    assert len(states(tmp_path / "copy")) == 5
    assert "unasked" not in states(tmp_path / "copy").values()
    asked = count_questions(monkeypatch)
    assert cli.main(arguments(job, tmp_path / "copy")) == 1
    assert asked == []
    assert Counter(states(tmp_path / "copy").values()) == {"done": 2, "failed": 3}
    assert len(results(tmp_path / "copy")) == 5


def test_tables_after_a_kill_say_what_is_missing(job: Path, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    more = json.dumps({"id": "6", "video": "clips/a.mp4", "question": "word20"})
    questions = Path(shutil.copytree(job, tmp_path / "job")) / "questions.jsonl"
    questions.write_text(questions.read_text() + more)
    command = [sys.executable, "-c", KILLED.replace("lines < 3", "lines < 1"), *arguments(tmp_path / "job", out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert states(out)["6"] == "unasked"
