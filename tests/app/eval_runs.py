"""Rows of questions, clips to ask them about, `videoanchor eval` on them, and what it calls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from videoanchor_triton.anchor.scores import anchor_scores
from videoanchor_triton.app import cli, demo, pipeline, score_cache
from videoanchor_triton.app.video.reader import write_video

ROW = {"video": "a.mp4", "question": "Which is nearer?", "options": ["sofa", "lamp", "bed"], "answer": "B"}
NUMBER = {"video": "a.mp4", "question": "How many?", "answer": 4}
OPTIONS = ("--max-frames", "2", "--max-new-tokens", "1", "--n-clusters", "3", "--pca-rank", "8")
STRENGTHS = ("--alpha-k", "400", "--alpha-v", "40")


def write_rows(folder: Path, *rows: Any) -> Path:
    (folder / "a.mp4").touch()
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, four questions and the tiny random checkpoint."""
    folder = tmp_path_factory.mktemp("eval")
    demo.make_checkpoint(folder / "checkpoint")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in range(2):
        frames = rng.integers(0, 255, (6, 7, 9, 3), dtype=np.uint8).repeat(10, 1).repeat(10, 2)
        write_video(folder / f"{n}.mp4", frames, fps=4)
        rows += [
            {"video": f"{n}.mp4", "question": "Left?", "options": ["yes", "no"], "answer": "AB"[n % 2], "type": "left"},
            {"video": f"{n}.mp4", "question": "How many?", "answer": n + 1, "type": "count"},
        ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def run(command: str, folder: Path, out: Path, *options: str) -> int:
    arguments = (command, folder / "questions.jsonl", "--model", folder / "checkpoint", "--out", out)
    return cli.main([*map(str, arguments), *OPTIONS, *options])


@pytest.fixture
def n_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts of calls: of the model, of the scorer."""
    counts = [0, 0]

    def counted(place: int, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[place] += 1
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(pipeline, "answer", counted(0, pipeline.answer))
    monkeypatch.setattr(score_cache, "anchor_scores", counted(1, anchor_scores))
    return counts


def lose_the_device_after(n: int, answer: Any) -> Any:
    """`answer`, which fails from the n-th call on."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= n:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return answer(*args, **kwargs)

    return call
