"""`videoanchor eval` as a user runs it."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from eval_runs import NUMBER, OPTIONS, STRENGTHS, lose_the_device_after, run, write_rows

from videoanchor_triton.app import cli, pipeline
from videoanchor_triton.app.batch.results import ResultsLog
from videoanchor_triton.app.evaluation.paired import ALL, MEAN_OF_TYPES
from videoanchor_triton.app.evaluation.pictures import draw_eval
from videoanchor_triton.app.evaluation.questions import read_questions
from videoanchor_triton.app.evaluation.report import COLUMNS
from videoanchor_triton.app.video.reader import read_video
from videoanchor_triton.integrations.errors import InputError


def test_eval_as_a_user_runs_it(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], n_scored: list[int]
) -> None:
    out = tmp_path / "out"
    assert run("eval", clips, out, *STRENGTHS, "--ablate", "terms=K", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "eval.json").read_text())
    assert n_scored == [12, 2]  # four questions in three settings; each clip scored once
    assert {name: setting["alpha_k"] for name, setting in record["settings"].items()} == {
        "gate": 400,
        "baseline, 2 frames": 0,
        "terms K": 400,
    }
    first = read_csv(out / "eval.csv")
    table = first
    assert record["n_videos"] == 2
    assert [(row["setting"], row["type"], row["n"], row["n_videos"]) for row in table] == [
        (setting, kind, n, "2")
        for setting in ("gate", "terms K")
        for kind, n in ((ALL, "4"), (MEAN_OF_TYPES, "4"), ("count", "2"), ("left", "2"))
    ]
    replies = [json.loads(line) for line in (out / "replies.jsonl").read_text().splitlines()]
    by_setting = {name: [r["reply"] for r in replies if r["setting"] == name] for name in record["settings"]}
    assert by_setting["gate"] != by_setting["baseline, 2 frames"]
    assert (out / "eval.png").stat().st_size > 10_000

    assert run("eval", clips, out, *STRENGTHS, "--ablate", "terms=K,V") == 0
    assert n_scored == [16, 2]  # four questions in one new setting, scores from the disk
    shown = capsys.readouterr().out
    assert "| terms V | all questions | 4 | 2 |" in shown
    assert str(out / "eval.png") in shown


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames or ()) == COLUMNS["eval"]
        return list(table)


def test_a_report_can_be_cited_and_no_other_run_replaces_it(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in (clips / "questions.jsonl").read_text().splitlines()]
    rows = [{**row, "video": str(clips / row["video"]), "type": f"={row['type']}"} for row in rows]
    questions.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("eval", questions, "--model", clips / "checkpoint", "--out", tmp_path / "out", *OPTIONS)
    arguments = (*arguments, "--scorer", "kmeans")
    reports = []
    for strength in ("40", "400"):
        assert cli.main([*map(str, arguments), "--alpha-k", strength, "--alpha-v", "1"]) == 0
        shown = capsys.readouterr()
        record = json.loads((tmp_path / "out" / "eval.json").read_text())
        reports.append(tmp_path / "out" / f"eval-{record['tag']}.md")
        assert shown.err.count("tokens") <= 2, "memory of the first clip alone"
        text = (tmp_path / "out" / "eval.md").read_text()
        sha256 = hashlib.sha256(questions.read_bytes()).hexdigest()
        for fact in (
            str(clips / "checkpoint"),
            f"alpha_k {strength}",
            "max_frames 2",
            "scorer kmeans",
            sha256,
            "cpu",
            "torch",
        ):
            assert fact in text
        assert record["date"] in text
        for row in read_csv(tmp_path / "out" / "eval.csv"):
            assert (row["alpha_k"], row["alpha_v"], row["max_frames"]) == (f"{strength}.0", "1.0", "2")
            assert (row["questions_sha256"], row["date"], row["n_failed"]) == (sha256, record["date"], "0")
            assert row["type"] in (ALL, MEAN_OF_TYPES, "'=left", "'=count")
        assert reports[-1].read_text() == text
    assert f"kept      {reports[0]}" in shown.out
    assert "alpha_k 40;" in reports[0].read_text()
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    strengths = sorted(reply["settings"]["alpha_k"] for reply in replies)
    assert strengths == [0.0] * 4 + [40.0] * 4 + [400.0] * 4


def test_a_report_without_a_reply(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise InputError("no such frame")

    monkeypatch.setattr(pipeline, "answer", fail)
    assert run("eval", clips, tmp_path, *STRENGTHS) == 1
    assert "**Nothing could be judged**: no question has a reply with the gate and without." in capsys.readouterr().out
    assert read_csv(tmp_path / "eval.csv") == []
    assert (tmp_path / "eval.png").read_bytes() == draw_eval([])


def test_eval_stops_where_the_device_is_lost(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "answer", lose_the_device_after(3, pipeline.answer))
        assert run("eval", clips, tmp_path, *STRENGTHS, "--json") == 1
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert (record["n_failed"], record["n_unasked"]) == (1, 4)
    assert "the device failed" in record["stopped"]
    assert shown.err.splitlines()[-1].startswith("videoanchor eval: stopped, as the device failed")
    assert run("eval", clips, tmp_path, *STRENGTHS, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["n_failed"], record["n_unasked"], record["stopped"]) == (0, 0, None)


def test_the_baseline_is_the_model_without_a_gate(clips: Path, tmp_path: Path) -> None:
    assert run("eval", clips, tmp_path, *STRENGTHS, "--max-new-tokens", "6", "--json") == 0
    with ResultsLog(tmp_path / "replies.jsonl") as log:
        replies = {
            (reply["prompt"], reply["video"], reply["setting"]): reply["reply"] for reply in log.records.values()
        }
    model, processor = pipeline.load(str(clips / "checkpoint"), "cpu")
    model.set_attn_implementation({"text_config": "sdpa"})
    for asked in read_questions(clips / "questions.jsonl"):
        inputs, _ = pipeline.prepare(model, processor, read_video(asked.video, max_frames=2), asked.prompt())
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # pyright: ignore[reportCallIssue]
        (expected,) = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert replies[asked.prompt(), str(asked.video), "baseline, 2 frames"] == expected.strip()


def test_a_broken_video_leaves_the_others(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [json.loads(line) for line in (clips / "questions.jsonl").read_text().splitlines()][:2]
    rows = [{**row, "video": str(clips / row["video"])} for row in rows] + [
        {**NUMBER, "id": "broken", "video": "broken.mp4"},
        {**NUMBER, "id": "gone", "video": "gone.mp4"},
    ]
    questions = write_rows(tmp_path, *rows)
    arguments = ("eval", questions, "--model", clips / "checkpoint", "--out", tmp_path / "out", *STRENGTHS, *OPTIONS)
    assert cli.main([*map(str, arguments), "--json"]) == 1
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert (record["n_failed"], record["results"][0]["n"], record["results"][0]["n_failed"]) == (4, 2, 2)
    assert "4 replies failed" in shown.err
    assert "1 of 3 videos are missing, their questions fail: " in shown.err
    assert {failure["id"] for failure in record["failures"]} == {"broken", "gone"}
    assert any("no video file at" in failure["error"] for failure in record["failures"])
    for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines():
        assert ("error" in (reply := json.loads(line))) == (reply.get("failure") == "input")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--alpha-k and --alpha-v"),
        (("--alpha-k", "0", "--alpha-v", "0"), "is the baseline itself"),
        ((*STRENGTHS, "--ablate", "size"), "--ablate size"),
        ((*STRENGTHS, "--max-new-tokens", "0"), "--max-new-tokens"),
    ],
)
def test_wrong_options(
    clips: Path, tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", clips, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "eval.json").exists()
