"""Questions about several videos and images in `batch` and `eval`: a list as a row's "video"."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from several_videos import CONFIG, GATE, SIZE

import videoanchor_triton as va
from videoanchor_triton.app import cli
from videoanchor_triton.app.batch.rows import read_rows
from videoanchor_triton.app.evaluation.comparison_report import comparison_markdown, comparison_text
from videoanchor_triton.app.evaluation.head_to_head import head_to_head
from videoanchor_triton.app.evaluation.page import short_names
from videoanchor_triton.app.evaluation.questions import read_questions, videos_of
from videoanchor_triton.app.evaluation.readers.plain import read_plain
from videoanchor_triton.app.video.names import each, name_of, names_in
from videoanchor_triton.app.video.reader import read_video


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batch(source: Path, several: Path, out: Path, *options: Any) -> int:
    command = ("batch", source, "--model", several / "checkpoint", "--out", out, "--tables", "csv")
    return cli.main([*map(str, (*command, *GATE, *SIZE, *options))])


def test_batch(several: Path, loaded_several: tuple[Any, Any], tmp_path: Path) -> None:
    """Answers and shared prefill as of single prompts; a list of one is the video; the order counts; it resumes."""
    source = write(
        several / "rows.jsonl",
        {"video": ["b.mp4", "view.png"], "question": "Which?"},
        {"video": ["b.mp4", "view.png"], "question": "How many?"},
        {"video": ["view.png", "b.mp4"], "question": "Which?"},
        {"video": ["a.mp4"], "question": "Which?"},
        {"video": "a.mp4", "question": "Which?"},
        {"video": ["a.mp4", "gone.mp4"], "question": "Which?"},
    )
    assert batch(source, several, tmp_path) == 1
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = sorted(found, key=lambda one: one["line"])
    both = [str(several / "b.mp4"), str(several / "view.png")]
    assert [one["video"] for one in found[:3]] == [both, both, both[::-1]]
    assert [one["video"] for one in found[3:5]] == [str(several / "a.mp4")] * 2
    assert len({one["key"] for one in found}) == 6
    assert [one["copy"] for one in found] == [0, 0, 0, 0, 1, 0]
    assert found[5]["failure"] == "input"
    assert "gone.mp4" in found[5]["reason"]
    assert [one["fingerprint"] is None for one in found] == [False] * 5 + [True]
    model, _ = loaded_several
    clip, image = read_video(several / "b.mp4", max_frames=4), Image.open(several / "view.png")
    for one, media in zip(found, ([clip, image], [clip, image], [image, clip]), strict=False):
        alone = va.ask(model, media, one["question"], CONFIG, max_new_tokens=3)
        assert (one["answer"], one["tokens"]["prompt"]) == (alone.text, alone.n_prompt_tokens)
        assert one["frames"] == 5
    assert found[1]["ssc"]["cached"] is False or found[1]["seconds"]["vision"] == 0.0
    before = (tmp_path / "results.jsonl").read_bytes()
    assert batch(source, several, tmp_path) == 1
    assert (tmp_path / "results.jsonl").read_bytes() == before
    cells = (tmp_path / "results.csv").read_text()
    assert json.dumps(both).replace('"', '""') in cells
    assert len(each(read_rows(tmp_path / "results.csv")[0].video)) == 2, "tables are input again"


def test_a_change_in_any_of_them_is_asked_anew(several: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "view.png"):
        (tmp_path / name).write_bytes((several / name).read_bytes())
    source = write(tmp_path / "rows.jsonl", {"video": ["a.mp4", "view.png"], "question": "Which?"})
    out = tmp_path / "out"
    assert batch(source, several, out) == 0
    Image.new("RGB", (168, 112), "red").save(tmp_path / "view.png")
    assert batch(source, several, out) == 0
    (record,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert record["line"] == 1
    (tmp_path / "view.png").unlink()
    assert batch(source, several, out) == 0, "a missing part leaves the result as it is"


def test_csv_cells_hold_lists_as_json(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('video,question\n"[""a.mp4"", ""https://x.org/b.mp4""]",?\n[odd].mp4,?\n')
    first, second = read_rows(tmp_path / "q.csv")
    assert first.video == (tmp_path / "a.mp4", "https://x.org/b.mp4")
    assert second.video == tmp_path / "[odd].mp4"
    assert names_in(' [ "a.mp4",\n"b.mp4" ]') == ["a.mp4", "b.mp4"]
    assert names_in(first.video_name) == [str(tmp_path / "a.mp4"), "https://x.org/b.mp4"]
    assert name_of("x") == "x"
    for name in ("[1, 2]", '["a", 1]', '["a"', "[]", "[odd].mp4", "[" * 100_000):
        assert names_in(name) == [name]


def test_vllm_refuses_before_anything_is_loaded(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(several / "two.jsonl", {"video": ["a.mp4", "b.mp4"], "question": "?"})
    monkeypatch.setattr("videoanchor_triton.app.commands.batch.find_spec", lambda _: True)
    command = ["batch", source, "--model", several / "checkpoint", "--out", tmp_path, "--engine", "vllm", *GATE]
    assert cli.main([*map(str, command)]) == 2
    assert "line 1: several videos, not with --engine vllm" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_eval(several: Path, tmp_path: Path) -> None:
    """Each setting's reply is that of the prompt with all of them, under the names that questions link."""
    source = write(
        several / "questions.jsonl",
        {"id": "1", "video": ["a.mp4", "view.png"], "question": "Same?", "options": ["yes", "no"], "answer": "A"},
        {"id": "2", "video": "a.mp4", "question": "How many?", "answer": 4},
        {"id": "3", "video": "b.mp4", "question": "How many?", "answer": 4},
    )
    command = ("eval", source, "--model", several / "checkpoint", "--out", tmp_path, *GATE, *SIZE)
    assert cli.main([*map(str, command)]) == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    linked = name_of([str(several / "a.mp4"), str(several / "view.png")])
    assert [one["video"] for one in record["answered"]] == [linked, linked, str(several / "b.mp4")]
    assert record["n_videos"] == 2
    assert "a.mp4 + view.png" in (tmp_path / "eval.html").read_text()
    assert len([*(tmp_path / "frames").iterdir()]) == 3, "frames of each that is asked about, linked or not"
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert {name_of(one["video"]) for one in replies} == {linked, str(several / "a.mp4"), str(several / "b.mp4")}
    assert cli.main([*map(str, command)]) == 0
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == len(replies), "no reply is asked again"


def test_questions_that_share_a_video_stand_or_fall_together(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).touch()
    rows = [["a"], ["b", "c"], ["c", "d"], ["d"], ["e", "f"], ["f", "e"], ["a"]]
    source = write(
        tmp_path / "q.jsonl", *({"id": n, "video": one, "question": "?", "answer": 1} for n, one in enumerate(rows))
    )
    names = [[Path(path).name for path in names_in(name)] for name in videos_of(read_questions(source)).tolist()]
    assert names == [["a"], [*"bcd"], [*"bcd"], [*"bcd"], [*"ef"], [*"ef"], ["a"]]
    short = short_names([name_of(["/v/a", "/v/b"]), "/v/c", name_of(["/v/a", "/v/b", "/v/c", "/v/d", "/v/e"])])
    assert [*short.values()] == ["a + b", "c", "a + b + c and 2 more"]


def test_plain_results_name_several_alike(tmp_path: Path) -> None:
    source = write(
        tmp_path / "r.jsonl", {"id": 1, "video": ["a", "b"], "score": 1}, {"id": 2, "video": ["c"], "score": 0}
    )
    assert [row.video for row in read_plain(source).rows.values()] == ['["a", "b"]', "c"]


def test_a_comparison_names_several_shortly(tmp_path: Path) -> None:
    sides = [
        read_plain(write(tmp_path / f"{n}.jsonl", {"id": 1, "video": ["/v/a.mp4", "/v/b.mp4"], "score": n}))
        for n in range(2)
    ]
    record = head_to_head(*sides)
    for text in (comparison_text(record), comparison_markdown(record)):
        assert "a.mp4 + b.mp4" in text
        assert '["/v' not in text
