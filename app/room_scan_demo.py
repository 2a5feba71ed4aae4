"""What `videoanchor demo` asks first: a room scan and the trained model that answers about such scans."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..anchor.config import UNGATED, VideoAnchorConfig
from ..anchor.timing import Progress
from . import pipeline
from .room_scans import CHECKPOINT, TEST_SEED, RoomScan, write_scans
from .video.reader import read_video

SEED = TEST_SEED + 12
"""A scan that allows every kind of question."""
_PUBLISHED = VideoAnchorConfig.preset("internvl2-8b", n_clusters=12, pca_rank=32)
GATES = {
    "no gate": UNGATED,
    "alpha_k 1": replace(_PUBLISHED, alpha_q=0.0, alpha_k=1.0, alpha_v=0.0),
    "published": _PUBLISHED,
}
"""Strengths that are shown beside each other; the published ones are those of InternVL2-8B."""


def ask_about_a_scan(folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Writes a scan, its questions and the checkpoint into `folder`, and asks with each of `GATES`.

    Returns:
        "video", "model": paths; "questions": for each its kind, text, the right answer and the "replies" by gate;
        "right": how many are, by gate.
    """
    scan = RoomScan(SEED)
    asked = scan.questions()
    write_scans(folder, [scan], [asked])
    shutil.copytree(CHECKPOINT, folder / "checkpoint", dirs_exist_ok=True)
    model, processor = pipeline.load(str(folder / "checkpoint"), "auto", "float32")
    clip = read_video(folder / "scan000.mp4", max_frames=len(scan.frames))
    questions: list[dict[str, Any]] = []
    for n, one in enumerate(asked):
        if progress is not None:
            progress("questions about a room scan", n, len(asked))
        replies = {
            name: pipeline.answer(model, processor, clip, one.text, config, max_new_tokens=4).text
            for name, config in GATES.items()
        }
        questions.append({"kind": one.kind, "question": one.text, "truth": one.answer, "replies": replies})
    right = {name: sum(one["replies"][name] == one["truth"] for one in questions) for name in GATES}
    paths = {"video": str(folder / "scan000.mp4"), "model": str(folder / "checkpoint")}
    return {**paths, "questions": questions, "right": right}


def lines(found: dict[str, Any]) -> list[str]:
    """What `ask_about_a_scan` returns, for people."""
    questions = found["questions"]
    width = max(len(one["question"]) for one in questions)
    rows = [("", "truth", *GATES)]
    for one in questions:
        replies = [text if text == one["truth"] else f"{text} (wrong)" for text in one["replies"].values()]
        rows.append((one["question"], one["truth"], *replies))
    rows.append(("right", "", *(f"{n} of {len(questions)}" for n in found["right"].values())))
    return [
        f"A made-up room scan, {found['video']}, and a trained model of 1.1 million parameters, {found['model']}:",
        *("  ".join([row[0].ljust(width), *(cell.ljust(15) for cell in row[1:])]).rstrip() for row in rows),
        "The published strengths (alpha_q 4, alpha_k 9.5, alpha_v 2.5) are those of InternVL2-8B. This model was",
        "trained without a gate and needs none: on a model of yours, `videoanchor tune` measures whether one helps.",
    ]
