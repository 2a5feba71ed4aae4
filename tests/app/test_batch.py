"""`videoanchor batch` as a user runs it: resumed, interrupted, killed, with failures."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.app import cli, pipeline, video_model
from videoanchor_triton.app.batch import results as batch_results
from videoanchor_triton.app.batch.matching import fingerprint
from videoanchor_triton.app.commands import batch as batch_command
from videoanchor_triton.app.video.limits import MAX_PIXELS
from videoanchor_triton.app.video.reader import write_video

GATE = ("--alpha-k", "2", "--alpha-v", "1", "--scorer", "kmeans", "--n-clusters", "3", "--pca-rank", "8")
SIZE = ("--max-frames", "4", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, two clips and five questions, one of them about a file that is missing."""
    folder = tmp_path_factory.mktemp("job")
    save_checkpoint("internvl", folder / "checkpoint")
    generator = np.random.default_rng(0)
    (folder / "clips").mkdir()
    for name in ("a", "b"):
        frames = generator.integers(0, 255, (8, 32, 48, 3), dtype=np.uint8)
        write_video(folder / "clips" / f"{name}.mp4", frames, fps=4)
    rows = [
        {"id": "1", "video": "clips/a.mp4", "question": "word5 word6", "answer": "left"},
        {"id": "2", "video": "clips/b.mp4", "question": "word7", "answer": 3},
        {"id": "3", "video": "clips/gone.mp4", "question": "word7", "answer": None},
        {"id": "4", "video": "clips/a.mp4", "question": "word8 word9 word10"},
        {"id": "5", "video": "clips/a.mp4", "question": "word7"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(job: Path, out: Path, *options: object) -> list[str]:
    command = ("batch", job / "questions.jsonl", "--model", job / "checkpoint", "--out", out)
    return [*map(str, (*command, *GATE, *SIZE, *options))]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert cli.main(arguments(job, out)) == 1
    return out


def answers(out: Path) -> dict[str, str]:
    return {record["input"]["id"]: record["answer"] for record in results(out)}


def table(out: Path) -> list[dict[str, str]]:
    """The rows of the CSV, which are those of the Parquet file."""
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parquet = pytest.importorskip("pyarrow.parquet")
    other = parquet.read_table(out / "results.parquet").to_pylist()
    for name in ("key", "status", "input_id"):
        assert [row[name] for row in other] == [row[name] for row in rows]
    return rows


def states(out: Path) -> dict[str, str]:
    return {row["input_id"]: row["status"] for row in table(out)}


def no_model(*_: object) -> Any:
    raise AssertionError("the model is loaded")


def test_a_row_each(job: Path, finished: Path) -> None:
    records = results(finished)
    assert [record["input"]["id"] for record in records] == ["1", "4", "5", "2", "3"], "by video"
    assert [record["status"] for record in records] == ["done"] * 4 + ["failed"]
    assert len({record["key"] for record in records}) == 5
    first, failure = records[0], records[-1]
    assert first["video"] == str(job / "clips" / "a.mp4")
    assert first["input"] == {"id": "1", "answer": "left"}
    assert first["tokens"]["generated"] == 3
    assert first["tokens"]["visual"] == 16
    for stage in ("decode_video", "vision", "ssc", "prefill", "decode"):
        assert first["seconds"][stage] > 0
    assert records[1]["seconds"]["decode_video"] == records[1]["seconds"]["vision"] == 0
    assert "no video file at" in failure["reason"]
    assert failure["answer"] is None
    settings = json.loads((finished / f"settings-{first['settings']}.json").read_text())["settings"]
    assert settings["config"]["alpha_k"] == 2
    assert settings["video"] == {"fps": None, "max_frames": 4, "sampling": "uniform"}, "results of older versions stay"
    assert (first["max_pixels"], first["strict"]) == (MAX_PIXELS, False)
    assert {path.name for path in finished.iterdir()} == {
        "results.jsonl",
        "results.lock",
        "results.csv",
        "results.parquet",
        "scores",
        f"settings-{first['settings']}.json",
    }
    assert len(list((finished / "scores").iterdir())) == 2, "an entry a video"


def test_tables(finished: Path) -> None:
    rows = table(finished)
    assert [row["input_id"] for row in rows] == ["1", "2", "3", "4", "5"], "as in the input"
    assert {row["input_id"]: row["answer"] or None for row in rows} == answers(finished)
    assert float(rows[0]["seconds_prefill"]) > 0
    settings = [rows[0][name] for name in ("alpha_k", "alpha_v", "scorer", "n_clusters", "max_frames", "dtype")]
    assert settings == ["2.0", "1.0", "kmeans", "3", "4", "auto"]
    assert rows[2]["failure"] == "input"


def test_answers_are_those_of_run(
    job: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (job / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["id"] == "3":
            continue
        question = ("--video", job / row["video"], "--question", row["question"], "--out", tmp_path / row["id"])
        run = ("run", "--model", job / "checkpoint", *question, *GATE, *SIZE, "--json")
        assert cli.main([*map(str, run)]) == 0
        assert json.loads(capsys.readouterr().out)["answer"] == answers(finished)[row["id"]]


def test_a_second_run_has_nothing_to_do(
    job: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.jsonl").read_bytes()
    monkeypatch.setattr(pipeline, "load", no_model)
    assert cli.main(arguments(job, finished, "--json")) == 1
    assert (finished / "results.jsonl").read_bytes() == before
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["rows"], summary["done"], summary["failed"]) == (5, 4, 1)
    assert summary["answered_by_this_run"] == 0
    assert err == ""


def count_questions(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda _: None) -> list[str]:
    asked: list[str] = []
    answer = video_model.VideoModel.answer

    def counted(self: Any, question: str) -> Any:
        asked.append(question)
        before(len(asked))
        return answer(self, question)

    monkeypatch.setattr(video_model.VideoModel, "answer", counted)
    return asked


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


def test_no_older_table_is_left_behind(job: Path, finished: Path, tmp_path: Path) -> None:
    """Also where the run is to write another kind; results without the columns of their settings get them."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    lines = [{name: value for name, value in one.items() if name not in ("model", "alpha_k")} for one in results(out)]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = (job / "questions.jsonl").read_text().replace('"id": "4"', '"id": "four"').replace("clips/", f"{job}/clips/")
    (tmp_path / "questions.jsonl").write_text(rows)
    command = ["batch", str(tmp_path / "questions.jsonl"), *arguments(job, out, "--tables", "csv")[2:]]
    assert cli.main(command) == 1
    assert [row["input_id"] for row in table(out)] == ["1", "2", "3", "four", "5"]
    assert {(row["model"], row["alpha_k"]) for row in table(out)} == {(str(job / "checkpoint"), "2.0")}


def test_other_settings_are_other_rows(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They share the scores of the videos."""
    options = ("--question", "word5", "--tables", "csv")
    folder = ("batch", job / "clips", "--model", job / "checkpoint", "--out", tmp_path, *GATE, *SIZE, *options)
    assert cli.main([*map(str, folder)]) == 0
    assert cli.main([*map(str, folder), "--alpha-k", "8", "--json"]) == 0
    first, _, second = capsys.readouterr().out.partition("{")
    assert "kept" not in first
    assert json.loads("{" + second)["rows"] == 2
    assert cli.main([*map(str, folder), "--alpha-k", "8"]) == 0
    assert "kept      2 rows of other settings" in capsys.readouterr().out
    records = results(tmp_path)
    assert [record["ssc"]["cached"] for record in records] == [False, False, True, True]
    assert len({record["settings"] for record in records}) == 2
    assert [record["input"]["id"] for record in records] == ["a.mp4", "b.mp4"] * 2
    assert not (tmp_path / "results.parquet").exists()
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["alpha_k"] for row in csv.DictReader(file)] == ["8.0", "8.0", "2.0", "2.0"]


def test_fit(job: Path, tmp_path: Path) -> None:
    """A question that leaves no room for all frames fails alone; with --fit its video gets fewer frames."""
    rows = [{"video": "clips/a.mp4", "question": question} for question in ("word5", "word5 " * 1005)]
    (job / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["batch", str(job / "long.jsonl"), *arguments(job, tmp_path)[2:], "--tables"]
    assert cli.main(command) == 1
    short, long = results(tmp_path)
    assert short["frames"] == 4
    assert "the model's context holds" in long["reason"]
    n_frames = int(long["reason"].rsplit("--max-frames ", 1)[1])
    assert 1 <= n_frames < 4
    assert cli.main([*command, "--fit"]) == 0
    assert [record["frames"] for record in results(tmp_path)[2:]] == [n_frames] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("--max-new-tokens", "0"), "--max-new-tokens", id="no-new-tokens"),
        pytest.param(("--cache-size", "-1"), "--cache-size", id="cache-size"),
        pytest.param(("--cache-size", "nan"), "--cache-size", id="cache-size-nan"),
        pytest.param(("--actors", "2"), "--engine ray", id="actors-without-ray"),
        pytest.param(("--engine", "ray", "--actors", "0"), "--actors", id="no-actors"),
        pytest.param(("--question", "?"), "its own column", id="question-twice"),
        pytest.param(("--alpha-k", "-1"), "alpha_k", id="alpha"),
        pytest.param(("--model", "no/where/at/all"), "model no/where/at/all", id="model"),
    ],
)
def test_wrong_input(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.main(arguments(job, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        ("pyarrow", (), "missing pyarrow: pip install 'videoanchor-triton[batch]', or leave Parquet out: --tables csv"),
        ("ray", ("--engine", "ray"), "missing ray: pip install 'videoanchor-triton[ray]'"),
    ],
)
def test_missing_extras_are_named_before_any_work(
    job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(batch_command, "find_spec", lambda name: None if name == package else name)
    assert cli.main(arguments(job, tmp_path / "out", *options)) == 2
    assert capsys.readouterr().err == f"videoanchor batch: {message}\n"
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["batch", "--help"])
    assert stop.value.code == 0
    assert "questions.jsonl" in capsys.readouterr().out
