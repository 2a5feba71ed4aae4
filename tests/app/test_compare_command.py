"""`videoanchor compare` as a user runs it."""

import json
from pathlib import Path

import pytest
from compare_files import write_lines, write_lmms, write_scores

from videoanchor_triton.app import cli

SCORES = {str(n): n % 2 for n in range(30)}


def test_compare_as_a_user_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_scores(tmp_path / "a.jsonl", SCORES, {"frames": {"max_frames": 32}})
    b = write_scores(tmp_path / "b.jsonl", {**SCORES, "0": 1}, {"frames": {"max_frames": 8}})
    assert cli.main(["compare", str(a), str(b), "--out", str(tmp_path / "new" / "out")]) == 0
    shown = capsys.readouterr().out
    for line in (
        "THE PROTOCOLS DIFFER",
        "frames.max_frames: 32 in A, 8 in B",
        "resolution: neither card says it",
        "questions that are right in A only: 0, in B only: 1",
        "0  0.mp4: A 0",
        "No difference shown: B - A = +3.33 points, 95% interval +0.00 to +10.00",
    ):
        assert line in shown
    for name in ("json", "md"):
        assert f"wrote     {tmp_path / 'new' / 'out' / f'compare.{name}'}" in shown
    assert cli.main(["compare", str(a), str(b), "--json"]) == 0
    record, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "new/out/compare.json").read_text())
    assert record | {"date": ""} == written | {"date": ""}
    assert record["flags"] == [{"what": "frames.max_frames", "a": 32, "b": 8}]
    text = (tmp_path / "new/out/compare.md").read_text()
    assert "| 0 | 0.mp4 |" in text
    assert "- frames.max_frames: 32 in A, 8 in B" in text


def test_names_from_outside_stay_in_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, reply = "a|b\x1b[31m", "y\n| <b> z |"
    rows = [{"id": name, "video": "v\nfaked", "type": "t\n", "score": n, "prediction": reply} for n in (0, 1)]
    a, b = (write_lines(tmp_path / f"{n}.jsonl", row) for n, row in enumerate(rows))
    assert cli.main(["compare", str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("faked")]
    lines = (tmp_path / "out" / "compare.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(r"| a\|b")]
    assert row.replace(r"\|", "").count("|") == 9
    assert "v faked" in row
    assert "<" not in row


def test_scoring_again_and_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"doc_id": n, "target": "A", "filtered_resps": "AB"[n % 2], "exact": 1.0} for n in range(6)]
    write_lmms(tmp_path / "a", "one", rows)
    b = write_lines(tmp_path / "b.jsonl", *({"id": n, "prediction": "A", "answer": "A"} for n in range(6)))
    videos = write_lines(tmp_path / "videos.jsonl", *({"id": n, "video": n // 3} for n in range(6)))
    both = ["compare", str(tmp_path / "a"), str(b), "--json"]
    assert cli.main(both) == 0
    record = json.loads(capsys.readouterr().out)
    assert [flag["what"] for flag in record["flags"]] == ["scoring"]
    assert (record["table"][0]["a"], record["table"][0]["n_videos"]) == (1.0, 6)
    assert cli.main([*both, "--rescore", "--videos", str(videos)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["flags"], record["warnings"]) == ([], [])
    assert (record["table"][0]["a"], record["table"][0]["n_videos"]) == (0.5, 2)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_scores(tmp_path / "a.jsonl", SCORES), write_scores(tmp_path / "b.jsonl", {"other": 1})
    for arguments, message in (
        ((a, b), "the question sets differ: A has 30 that B lacks and B has 1 that A lacks, such as the id '0'"),
        ((a, tmp_path / "gone"), "no result at"),
        ((a, a, "--out", a), "is a file; give a folder"),
        ((a, a, "--setting-b", "gate"), "which has no settings"),
    ):
        assert cli.main(["compare", *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1), "one sentence"
        assert message in shown.err
