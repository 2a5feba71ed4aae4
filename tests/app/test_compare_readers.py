"""Results of other harnesses, read."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from compare_files import vsi_sample, write_lines, write_lmms, write_scores, write_xlsx

from videoanchor_triton.app.evaluation.readers.reading import read_result, with_videos
from videoanchor_triton.app.evaluation.readers.result import OURS, Answered, rescored, scored
from videoanchor_triton.app.evaluation.readers.table_file import read_table
from videoanchor_triton.integrations.errors import InputError


def test_plain_scores(tmp_path: Path) -> None:
    found = read_result(write_scores(tmp_path / "a.jsonl", {"x": 1, "y": 0.5, "z": None}, {"frames": {"fps": 1}}))
    assert [(row.id, row.score, row.video) for row in found.rows.values()] == [
        ("x", 1.0, "x.mp4"),
        ("y", 0.5, "y.mp4"),
        ("z", None, "z.mp4"),
    ]
    assert found.rows["z"].error == "the row has no score"
    assert (found.card, found.scoring) == ({"frames": {"fps": 1}}, "the file's own")


@pytest.mark.parametrize(
    ("row", "score", "read"),
    [
        ({"prediction": "(B) lamp", "answer": "B", "options": ["sofa", "lamp"]}, 1, "B"),
        ({"prediction": "the lamp", "answer": "B", "options": ["A. sofa", "B. lamp"]}, 1, "B"),
        ({"prediction": "lamp", "answer": "lamp", "options": ["sofa", "lamp"]}, 1, "B"),
        ({"prediction": "B.", "answer": "B"}, 1, "B"),
        ({"prediction": "A", "answer": "F"}, 0, "A"),
        ({"prediction": "", "answer": "B"}, 0, ""),
        ({"prediction": "C", "answer": "C", "options": ["Two", "One"]}, 1, "C"),
        ({"prediction": "about 4.4 m", "answer": 4}, 0.8, "4.4"),
        ({"prediction": "0", "answer": 0}, 1, "0"),
        ({"prediction": "-1.6", "answer": "-1.6"}, 1, "-1.6"),
        ({"prediction": "4.4", "answer": 4, "metric": "exact"}, 0, "4.4"),
        ({"prediction": "Kitchen.", "answer": "kitchen"}, 1, "Kitchen."),
    ],
)
def test_plain_replies_are_scored(row: dict[str, Any], score: float, read: str, tmp_path: Path) -> None:
    found = read_result(write_lines(tmp_path / "a.jsonl", {"id": 1, **row}))
    assert (found.rows["1"].score, found.rows["1"].read, found.scoring) == (score, read, OURS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no question"),
        ([{"card": {}}], "holds no question"),
        ([{"card": 3}], "the card in line 1 is no object"),
        ([{"video": "a", "score": 1}], "row 1: no id"),
        ([{"id": 1, "score": 1}, {"id": "1", "score": 1}], "'1' comes twice"),
        ([{"id": 1, "score": "good"}], "expected a number as score"),
        ([{"id": 1, "score": float("nan")}, {"id": 2, "score": 1}], "expected a number as score"),
        ([{"id": 1, "score": 1}, {"id": 2, "prediction": "A", "answer": "A"}], "row 2: expected a number as score"),
        ([{"id": 1, "video": "a"}], "row 1: expected a number as score"),
        ([{"id": 1, "prediction": "A"}], "answer: expected"),
        ([[1]], "line 1: no row of results"),
    ],
)
def test_plain_files_that_are_refused(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_result(write_lines(tmp_path / "a.jsonl", *lines))


def test_lmms_eval_of_a_task_that_keeps_its_documents(tmp_path: Path) -> None:
    counted = {"question_type": "object_counting", "accuracy": None, "MRA:.5:.95:.05": 0.4, "ground_truth": "4"}
    rows = [vsi_sample(0, "A", 1.0), vsi_sample(1, "B", 0.0), vsi_sample(2, "7", 0, **counted, options=None)]
    write_lmms(tmp_path / "Qwen", "vsibench", rows)
    found = read_result(tmp_path)
    assert [(row.id, row.score, row.video, row.type) for row in found.rows.values()] == [
        ("0", 1.0, "scene0000_00", "object_rel_distance"),
        ("1", 0.0, "scene0000_00", "object_rel_distance"),
        ("2", 0.4, "scene0001_00", "object_counting"),
    ]
    first = found.rows["0"]
    assert (first.question, first.options, first.answer) == ("Which is nearest, 0?", ("sofa", "lamp"), "A")
    assert (first.reply, first.prompt) == ("A", "These are frames of a video.\nWhich is nearest, 0?")
    assert found.card["frames"] == {"max_frames": 32}
    assert found.card["resolution"] == {"max_pixels": 12544}
    assert found.card["seeds"] == {"random_seed": 0, "numpy_seed": 1234}
    assert found.card["generation"] == {"max_new_tokens": 16}
    assert found.card["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert rescored(found).rows["2"].score == 0.0
    alone = read_result(next((tmp_path / "Qwen").glob("*.jsonl")))
    assert (alone.rows, alone.card) == (found.rows, found.card)


def test_lmms_eval_of_other_tasks(tmp_path: Path) -> None:
    """A number a metric; an object with the answer that was read and no score; a list of replies; no results file."""
    sample = {"doc_id": 0, "target": "A", "filtered_resps": ["a", "b"], "input": "?"}
    one = write_lines(tmp_path / "1_samples_clips.jsonl", {**sample, "accuracy": 1.0, "resps": [["x"]]})
    found = read_result(one)
    assert (found.rows["0"].score, found.rows["0"].video, found.rows["0"].reply) == (1.0, None, "a")
    assert found.card == {}
    told = {"question_id": "001-1", "videoID": "v", "task_category": "Counting", "pred_answer": "a", "answer": "A"}
    found = read_result(write_lines(tmp_path / "2_samples_videomme.jsonl", {**sample, "perception": told}))
    assert (found.rows["0"].score, found.rows["0"].video, found.rows["0"].type) == (1.0, "v", "Counting")


def test_lmms_eval_with_several_metrics_tasks_and_runs(tmp_path: Path) -> None:
    sample = {"doc_id": 0, "target": "A", "filtered_resps": "a", "exact": 1.0, "f1": 0.5}
    write_lmms(tmp_path, "one", [sample])
    with pytest.raises(InputError, match="expected one score, got exact, f1: give --metric NAME"):
        read_result(tmp_path)
    assert read_result(tmp_path, metric="f1").rows["0"].score == 0.5
    with pytest.raises(InputError, match="expected one score 'bleu', got none"):
        read_result(tmp_path, metric="bleu")
    write_lmms(tmp_path, "two", [sample])
    both = read_result(tmp_path, metric="f1")
    assert [(row.id, row.type) for row in both.rows.values()] == [("one/0", "one"), ("two/0", "two")]
    write_lmms(tmp_path, "two", [sample], date="20260202_120000")
    with pytest.raises(InputError, match="holds 2 runs of two: give the samples file of one"):
        read_result(tmp_path)


ROWS = [
    {
        "index": 0,
        "video": "v",
        "question": "Where?",
        "A": "x",
        "B": "y",
        "answer": "B",
        "prediction": "(B) y",
        "hit": 1,
    },
    {"index": 1, "video": "v", "question": "Who <&>?", "A": "x", "B": None, "answer": "A", "prediction": "B", "hit": 0},
    {"index": 2, "video": "w", "question": "When?", "A": "x", "B": "y", "answer": "A", "prediction": "", "hit": 0},
    {
        **{"index": 3, "video": "w", "question": "Why?", "A": "x", "B": "y", "answer": "A"},
        **{"prediction": "Failed to obtain answer via API.", "hit": 0},
    },
    {"index": 4, "video": "w", "question": "What?", "A": "x", "B": "y", "answer": "A", "prediction": "A", "hit": -1},
]


@pytest.mark.parametrize("suffix", ["xlsx", "inline.xlsx", "json", "tsv", "csv"])
def test_vlmevalkit(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"Qwen_VSI-Bench_32frame_openai_result.{suffix}"
    if suffix.endswith("xlsx"):
        write_xlsx(path, ROWS, shared=suffix == "xlsx")
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*ROWS[0]], delimiter="\t" if suffix == "tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(ROWS)
    found = read_result(path)
    assert [(row.id, row.score, row.video) for row in found.rows.values()] == [
        *(("0", 1.0, "v"), ("1", 0.0, "v"), ("2", 0.0, "w"), ("3", None, "w"), ("4", None, "w")),
    ]
    assert found.rows["0"].options == ("x", "y")
    assert found.rows["1"].question == "Who <&>?"
    assert (found.rows["3"].error or "").startswith("Failed to obtain answer")
    assert found.card == {"run": path.stem, "frames": {"max_frames": 32}}
    assert read_result(tmp_path).rows == found.rows, "the only table of the folder"


def test_vlmevalkit_without_scores_and_folders(tmp_path: Path) -> None:
    plain = [{name: value for name, value in row.items() if name != "hit"} for row in ROWS]
    write_xlsx(tmp_path / "m_d.xlsx", plain)
    found = read_result(tmp_path)
    assert [row.score for row in found.rows.values()] == [1.0, 0.0, 0.0, None, 1.0]
    assert found.scoring == OURS
    write_xlsx(tmp_path / "m_d_score.xlsx", ROWS)
    assert read_result(tmp_path).scoring == "VLMEvalKit's", "scores come before predictions alone"
    (tmp_path / "m_d_acc.csv").write_text("overall\n0.5\n")
    (tmp_path / "torn.xlsx").write_bytes(b"PK")
    assert read_result(tmp_path).scoring == "VLMEvalKit's"
    write_xlsx(tmp_path / "n_d_score.xlsx", ROWS)
    with pytest.raises(InputError, match=r"2 tables of results \(m_d_score.xlsx, n_d_score.xlsx\)"):
        read_result(tmp_path)


def test_workbooks_that_are_none(tmp_path: Path) -> None:
    path = write_xlsx(tmp_path / "a.xlsx", ROWS)
    with zipfile.ZipFile(path, "a") as book, pytest.warns(UserWarning, match="Duplicate"):
        book.writestr("xl/workbook.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')
    for content, message in (
        (path.read_bytes(), "declares a document type"),
        (b"", "not a zip"),
        (b"a,b", "not a zip"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"cannot be read as a table .*{message}"):
            read_table(path)


def test_what_is_no_result(tmp_path: Path) -> None:
    for name, content, message in (
        ("gone.jsonl", None, "no result at"),
        ("a.json", "{}", "no result of videoanchor eval"),
        ("b.json", "{", "cannot be read"),
        ("c.json", "[1]", "cannot be read as a table"),
        ("d.json", "[]", "expected the columns index and prediction"),
        ("e.txt", "", "expected a folder, or a file"),
        ("f.csv", "a,b\n1,2\n", "expected the columns index and prediction"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_result(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no result: expected"):
        read_result(tmp_path / "empty")
    with pytest.raises(InputError, match="is of JSONL, which has no settings"):
        read_result(write_scores(tmp_path / "g.jsonl", {"1": 1}), "gate")


def test_videos_from_a_file(tmp_path: Path) -> None:
    result = read_result(write_lmms(tmp_path, "one", [{"doc_id": 5, "target": "A", "accuracy": 1}]))
    videos = write_lines(tmp_path / "videos.jsonl", {"id": 5, "video": "a.mp4"}, {"id": 6, "video": "b.mp4"})
    assert with_videos(result, videos).rows["5"].video == "a.mp4"
    with pytest.raises(InputError, match="no video for the id '5'"):
        with_videos(result, write_lines(tmp_path / "videos.jsonl", {"id": 4, "video": "a.mp4"}))


def test_scoring_again(tmp_path: Path) -> None:
    rows = [{"id": 1, "score": 1, "prediction": "A", "answer": "B"}, {"id": 2, "score": None, "error": "no frame"}]
    found = rescored(read_result(write_lines(tmp_path / "a.jsonl", *rows)))
    assert ([row.score for row in found.rows.values()], found.scoring) == ([0.0, None], OURS)
    with pytest.raises(InputError, match="'1' has no reply to score again"):
        rescored(read_result(write_scores(tmp_path / "b.jsonl", {"1": 1})))
    with pytest.raises(InputError, match="'1' cannot be scored"):
        rescored(read_result(write_lines(tmp_path / "c.jsonl", {"id": 1, "score": 1, "prediction": "A"})))
    assert scored(Answered("1", answer="A")).score is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("eval.json", {"settings": {"gate": {}}, "results": [], "card": {}, "answered": [{"id": 1}]}),
        ("eval.json", {"settings": {"gate": {}}, "results": [], "card": [], "answered": [3]}),
        ("m_d.json", [{"index": 1, "prediction": "A", "answer": "A"}, {"prediction": "A"}]),
        ("20260101_120000_results.json", {"config": 3}),
    ],
)
def test_files_of_another_form(name: str, content: Any, tmp_path: Path) -> None:
    if "results" in name:
        write_lmms(tmp_path, "one", [{"doc_id": 1, "target": "A", "accuracy": 1.0}])
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not as its harness writes it"):
        read_result(tmp_path if name != "m_d.json" else tmp_path / name)
