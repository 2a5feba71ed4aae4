"""A folder of questions, `videoanchor batch` on it, and what it wrote."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.app import cli, video_model
from videoanchor_triton.app.video.reader import write_video

GATE = ("--alpha-k", "2", "--alpha-v", "1", "--scorer", "kmeans", "--n-clusters", "3", "--pca-rank", "8")
SIZE = ("--max-frames", "4", "--max-new-tokens", "3")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


def count_questions(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda _: None) -> list[str]:
    asked: list[str] = []
    answer = video_model.VideoModel.answer

    def counted(self: Any, question: str) -> Any:
        asked.append(question)
        before(len(asked))
        return answer(self, question)

    monkeypatch.setattr(video_model.VideoModel, "answer", counted)
    return asked
