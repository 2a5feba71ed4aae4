"""`videoanchor batch` as a user runs it: what it writes, and the options and input that it refuses."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from batch_runs import GATE, SIZE, answers, arguments, no_model, results, table

from videoanchor_triton.app import cli, pipeline
from videoanchor_triton.app.commands import batch as batch_command
from videoanchor_triton.app.video.limits import MAX_PIXELS


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


def test_eigengaps_are_columns(job: Path, tmp_path: Path) -> None:
    """Of scores from the disk, too."""
    rows = [{"id": name, "video": "clips/a.mp4", "question": name} for name in ("word5", "word6")]
    (job / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("--scorer", "knn", "--score", "projector", "--assign-labels", "kmeans")
    for out in (tmp_path / "out", tmp_path / "again"):
        if out.name == "again":
            shutil.copytree(tmp_path / "out" / "scores", out / "scores")
        command = ["batch", str(job / "two.jsonl"), *arguments(job, out, *settings)[2:]]
        assert cli.main(command) == 0
    first, again = results(tmp_path / "out"), results(tmp_path / "again")
    assert [record["ssc"]["cached"] for record in again] == [True, False], "the second shares the prompt of the first"
    found = {(record["ssc"]["eigengap"], record["ssc"]["in_gap"]) for record in first + again}
    assert len(found) == 1, "one video"
    ((eigengap, in_gap),) = found
    assert eigengap > 0
    assert in_gap in (True, False)
    row = table(tmp_path / "again")[0]
    assert (float(row["ssc_eigengap"]), row["ssc_in_gap"]) == (eigengap, str(in_gap))
    assert (row["scorer"], row["score"], row["assign_labels"]) == ("knn", "projector", "kmeans")


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
