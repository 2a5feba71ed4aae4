"""What a batch reads: JSONL, CSV, folders; what it refuses, with the line; and which results are a row's."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from videoanchor_triton.app.batch import matching
from videoanchor_triton.app.batch.matching import fingerprint, matched, refreshed, with_fingerprints
from videoanchor_triton.app.batch.rows import BatchRow, by_video, read_rows
from videoanchor_triton.integrations.errors import InputError


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "questions.JSONL"
    lines = [
        '\ufeff{"video": "a.mp4", "question": "Où?", "id": 7, "choices": ["x", "y"]}',
        "",
        '{"video": "/else/b.mp4", "question": "Why?\\nTell."}',
    ]
    source.write_text("\r\n".join(lines), encoding="utf-8")
    assert read_rows(source) == [
        BatchRow(1, tmp_path / "in" / "a.mp4", "Où?", {"id": 7, "choices": ["x", "y"]}),
        BatchRow(3, Path("/else/b.mp4"), "Why?\nTell.", {}),
    ]


def test_csv(tmp_path: Path) -> None:
    source = tmp_path / "q.csv"
    source.write_text('\ufeffid,question,video\n1,"What, where?\nSay.",a.mp4\n\n2,"Say ""no""",sub/b.mp4\n', "utf-8")
    assert read_rows(source) == [
        BatchRow(3, tmp_path / "a.mp4", "What, where?\nSay.", {"id": "1"}),
        BatchRow(5, tmp_path / "sub" / "b.mp4", 'Say "no"', {"id": "2"}),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_of_csv(tmp_path: Path, delimiter: str) -> None:
    fields = [("id", "question", "video"), ("1", "a,b;c\td", "a.mp4"), ("'=x", "=1", "b.mp4")]
    text = "".join(delimiter.join(f'"{one}"' for one in some) + "\n" for some in fields)
    (tmp_path / "q.csv").write_text("\ufeff" + text, encoding="utf-8")
    assert [(row.question, row.columns) for row in read_rows(tmp_path / "q.csv")] == [
        ("a,b;c\td", {"id": "1"}),
        ("=1", {"id": "'=x"}),
    ]


def test_a_path_has_one_name(tmp_path: Path) -> None:
    """Where `..` follows a link it leads out of the folder that the link names."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    names = ("clips/a.mp4", "./clips/../clips/a.mp4", "clips//a.mp4", "gone/../clips/./a.mp4", "link/../a.mp4")
    rows = [json.dumps({"video": name, "question": "?"}) for name in (*names, f"../{tmp_path.name}/clips/a.mp4")]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    found = [row.video for row in read_rows(tmp_path / "clips" / ".." / "q.jsonl")]
    one = tmp_path / "clips" / "a.mp4"
    assert found == [one, one, one, one, tmp_path / "link" / ".." / "a.mp4", one]


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.MKV", "a.mp4", "sub/c.webm", "notes.txt"):
        (tmp_path / name).touch()
    rows = read_rows(tmp_path, ["One?", "Two?"])
    assert [(row.number, Path(row.video_name).name, row.question) for row in rows] == [
        (1, "a.mp4", "One?"),
        (2, "a.mp4", "Two?"),
        (3, "b.MKV", "One?"),
        (4, "b.MKV", "Two?"),
        (5, "c.webm", "One?"),
        (6, "c.webm", "Two?"),
    ]
    assert rows[4].columns == {"id": "sub/c.webm"}


GOOD = b'{"video": "a.mp4", "question": "?"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("q.jsonl", GOOD + b'{"video": "a.mp4", "ques', "line 2: not JSON", id="torn"),
        pytest.param("q.jsonl", GOOD + b"\n[1]\n", "line 3: expected an object", id="list"),
        pytest.param("q.jsonl", b'{"question": "?"}\n', "text, or a list of texts, got None", id="no-video"),
        pytest.param("q.jsonl", GOOD + b'{"video": "a", "question": " "}', "line 2: question", id="empty-question"),
        pytest.param("q.jsonl", b'{"video": 3, "question": "?"}', "line 1: video: expected text, or a", id="number"),
        pytest.param("q.jsonl", b'{"video": [], "question": "?"}', "line 1: video: expected", id="no-videos"),
        pytest.param("q.jsonl", b'{"video": ["a", ""], "question": "?"}', "line 1: video: expected", id="one-empty"),
        pytest.param("q.jsonl", b'{"video": [["a"]], "question": "?"}', "line 1: video: expected", id="nested"),
        pytest.param("q.jsonl", b'{"video": "a\\u0000", "question": "?"}', "line 1: video", id="nul"),
        pytest.param("q.jsonl", b'{"video": "a", "question": "\\ud800"}', "line 1: cannot be written", id="surrogate"),
        pytest.param("q.jsonl", b'{"video": "a", "question": "?", "x": NaN}', "line 1: cannot be written", id="nan"),
        pytest.param("q.jsonl", b"[" * 100_000, "line 1: not JSON", id="deep"),
        pytest.param("q.jsonl", GOOD + b'{"video": "\xff"}', "line 2 of the input is not UTF-8", id="latin-1"),
        pytest.param("q.jsonl", b"x\n" * 7, "line 5: not JSON .*; and 2 more", id="many"),
        pytest.param("q.jsonl", b"\n", "holds no row", id="blank"),
        pytest.param("q.csv", b"", "CSV: expected different columns", id="csv-empty"),
        pytest.param("q.csv", b"video,question\n", "holds no row", id="csv-header-only"),
        pytest.param("q.csv", b"video,prompt\na,b\n", "video and question among them", id="csv-columns"),
        pytest.param("q.csv", b"video,question,video\na,b,c\n", "different columns", id="csv-same-columns"),
        pytest.param("q.csv", b"video,question\na,b\na\n", "line 3: expected 2 fields, got 1", id="csv-short"),
        pytest.param("q.csv", b'video,question\na,"b\n', "CSV line 2", id="csv-open-quote"),
        pytest.param("q.txt", GOOD, "expected a .jsonl file, a .csv file or a folder", id="suffix"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no input at"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="holds no video"):
        read_rows(tmp_path, ["?"])
    with pytest.raises(InputError, match="--question"):
        read_rows(tmp_path)
    (tmp_path / "q.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match="its own column"):
        read_rows(tmp_path / "q.jsonl", ["?"])


def test_repeats_and_groups(tmp_path: Path) -> None:
    pairs = [("a", "1"), ("b", "1"), ("a", "2"), ("a", "1"), ("b", "1")]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"video": v, "question": q}) for v, q in pairs))
    rows = read_rows(tmp_path / "q.jsonl")
    assert [row.copy for row in rows] == [0, 0, 0, 1, 1]
    assert len({row.key("h") for row in rows}) == 5
    assert [[row.number for row in group] for group in by_video(rows)] == [[1, 3, 4], [2, 5]]


def test_a_fingerprint_is_of_size_and_ends(tmp_path: Path) -> None:
    """Of a file of 3 MiB the MiB in the middle is not read."""
    content = bytearray(np.random.default_rng(0).bytes(3 * 2**20))
    path, seen = tmp_path / "a.mp4", set()
    for place in (None, 0, 2**20 - 1, 2**21, -1):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        seen.add(fingerprint(path))
    for other in (content[:-1], content[: 2**20] + content[2**21 :], b""):
        path.write_bytes(other)
        seen.add(fingerprint(path))
    assert len(seen) == 8
    assert all(one is not None and len(one) == 32 for one in seen)
    for place in (2**20, 2**21 - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "b.mp4").write_bytes(changed)
        assert fingerprint(tmp_path / "b.mp4") in seen, "the time and the name of a file do not matter"


def test_a_fingerprint_of_a_folder_is_of_its_images(tmp_path: Path) -> None:
    folder = tmp_path / "views"
    folder.mkdir()
    seen = {fingerprint(folder)}
    (folder / "1.png").write_bytes(b"a" * 2**16)
    seen.add(fingerprint(folder))
    (folder / "2.png").write_bytes(b"b")
    both = fingerprint(folder)
    (folder / "2.png").rename(folder / "3.png")
    seen |= {both, fingerprint(folder)}
    (folder / "3.png").write_bytes(b"c")
    seen.add(fingerprint(folder))
    (folder / "1.png").write_bytes(b"a" * (2**16 - 1) + b"b")
    seen.add(fingerprint(folder))
    assert len(seen) == 6
    (folder / "1.png").write_bytes(b"a" * 2**16)
    (folder / "3.png").rename(folder / "2.png")
    (folder / "2.png").write_bytes(b"b")
    (folder / "notes.txt").write_text("no view")
    (folder / ".hidden.png").write_text("nor this")
    assert fingerprint(folder) == both


def test_no_fingerprint_of_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for a writer
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name in ("gone.mp4", "pipe.mp4", "loop.mp4", "x" * 300):
        assert fingerprint(tmp_path / name) is None

    def denied(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(Path, "open", denied)
    assert fingerprint(tmp_path / "a.mp4") is None


def results_of(rows: list[BatchRow]) -> dict[str, dict[str, str | None]]:
    return {
        row.key("h"): {
            "key": row.key("h"), "video": str(row.video), "question": row.question, "settings": "h",
            "fingerprint": row.fingerprint,
        }
        for row in rows
    }  # fmt: skip


def test_results_of_other_content_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two questions about each of three videos: one stays, one is replaced, one is taken away."""
    read: list[str] = []
    real = matching.fingerprint

    def counted(video: Path) -> str | None:
        read.append(video.name)
        return real(video)

    monkeypatch.setattr(matching, "fingerprint", counted)
    asked = [BatchRow(0, tmp_path / name, question) for question in ("1", "2") for name in ("a", "b", "c")]
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    before, replaced = matched(with_fingerprints(asked), {}, "h")
    assert read == ["a", "b", "c"], "each is read once"
    assert replaced == {}
    assert len({row.fingerprint for row in before}) == 3
    results = results_of(before)
    (tmp_path / "b").write_text("another")
    (tmp_path / "c").unlink()
    now, replaced = matched(with_fingerprints(asked), results, "h")
    assert [row == other for row, other in zip(now, before, strict=True)] == [True, False, True] * 2
    assert replaced == {before[n].key("h"): now[n].key("h") for n in (1, 4)}
    assert matched(with_fingerprints(asked), results, "other settings")[1] == {}
    results |= results_of(now)
    assert matched(with_fingerprints(asked), results, "h") == (now, replaced), "a run that was killed left both"
    (tmp_path / "b").unlink()
    gone, replaced = matched(with_fingerprints(asked), results, "h")
    assert gone == now, "the last result stays"
    assert set(replaced) == {before[n].key("h") for n in (1, 4)}


def test_a_missing_video_that_appears_is_another_row(tmp_path: Path) -> None:
    asked = [BatchRow(0, tmp_path / "a", "1")]
    missing = with_fingerprints(asked)
    assert missing == asked
    results = results_of(missing)
    assert matched(with_fingerprints(asked), results, "h") == (asked, {})
    (tmp_path / "a").touch()
    now, replaced = matched(with_fingerprints(asked), results, "h")
    assert replaced == {missing[0].key("h"): now[0].key("h")}


def test_results_follow_the_rows_of_the_input(tmp_path: Path) -> None:
    """Another line, other columns, a row gone, a video replaced; also for results of other settings."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    asked = [BatchRow(n, tmp_path / name, "1", {"id": name}) for n, name in enumerate("abc", 1)]
    results = {
        row.key(one): {
            "key": row.key(one), "video": str(row.video), "question": "1", "settings": one, "line": row.number,
            "fingerprint": row.fingerprint, "input": row.columns,
        }
        for row in with_fingerprints(asked)
        for one in ("h", "i")
    }  # fmt: skip
    (tmp_path / "b").write_text("another")
    edited = [BatchRow(1, tmp_path / "b", "1", {"id": "B"}), BatchRow(2, tmp_path / "a", "1", {"id": "A", "new": 1})]
    found = refreshed(with_fingerprints(edited), results, {"i": {"alpha_k": 3.0}})
    assert found.keys() == results.keys()
    about = [(one["settings"], one.get("alpha_k"), one["line"], one["input"]) for one in found.values()]
    assert about == [
        (settings, alpha, line, columns)
        for line, columns in ((2, {"id": "A", "new": 1}), (None, {"id": "b"}), (None, {"id": "c"}))
        for settings, alpha in (("h", None), ("i", 3.0))
    ]
    assert refreshed(with_fingerprints(edited), found, {}) == found


def test_a_key_is_video_question_and_settings() -> None:
    row = BatchRow(1, Path("/v/a"), "b")
    assert row.key("h") == BatchRow(9, Path("/v/a"), "b", {"id": 1}).key("h")
    others = [BatchRow(1, Path("/v/b"), "b").key("h"), BatchRow(1, Path("/v/a"), "c").key("h"), row.key("i")]
    others.append(BatchRow(1, Path("/v/a"), "b", fingerprint="c").key("h"))
    others.append(BatchRow(1, Path("/v/a"), "b", copy=1).key("h"))
    assert len({row.key("h"), *others}) == 6
    assert BatchRow(1, Path("/v"), '", "x').key("h") != BatchRow(1, Path('/v", "'), "x").key("h")
