"""viz.html: a run as one page, that asks for nothing from anywhere."""

import hashlib
import json
from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from ...anchor.solver import SelfExpression
from ..pages.html import escape, folded, page, paragraph, section, table, text_cell
from ..token_grid import TokenGrid
from ..video.reader import VideoClip
from .attention_share import SharesRecord
from .finished_run import FinishedRun
from .groups import group_maps
from .palette import COLOURS, OTHER, SCORE_MAP, by_size

LINKS_EACH = 5
_MOST_CHARACTERS = 14_500_000
"""Of the data on the page, which stays below 15 MB: maps of attention get what the rest leaves."""
_MOST_BYTES = {"frames": 4_500_000, "links": 3_000_000}
"""Before base64, which makes a third more of them."""
_SIZES = ((768, 80), (640, 75), (512, 70), (384, 65), (256, 60), (160, 50), (96, 40))
"""Longest side and quality of the frames, from the best: the first at which all frames fit is taken."""


@dataclass(frozen=True, eq=False)
class FromModel:
    """What only the model of a run can tell.

    Args:
        expression: the self-expression of the visual tokens.
        shares: of attention.
        ungated: the answer without the gate.
    """

    expression: SelfExpression | None = None
    shares: SharesRecord | None = None
    ungated: str | None = None


def run_page(run: FinishedRun, clip: VideoClip, video: Path, found: FromModel | None = None) -> str:
    """
    Args:
        run: the run.
        clip: its frames.
        video: where they were read.
        found: what the page shows beside scores and subspaces.

    Returns:
        HTML, of less than 15 MB.
    """
    found = found or FromModel()
    record, here = run.record, Path(__file__)
    data = {
        "grid": {"t": run.grid.t, "h": run.grid.h, "w": run.grid.w},
        "framesPerStep": run.grid.frames_per_step(len(run.indices)),
        "size": clip.frames.shape[1:3],
        "frames": _frames(run, clip),
        "scores": _packed(run.grid.arrange(run.scores), np.float32),
        "ramp": [to_hex(SCORE_MAP(level)) for level in range(256)],
        "links": None if found.expression is None else strongest_links(found.expression, run.grid),
        "groups": _groups(run),
        **_subspaces(run),
    }
    room = _MOST_CHARACTERS - len(json.dumps(data))
    maps = [] if found.shares is None else _attention(found.shares, run.grid, room * 3 // 4)
    data["attention"] = maps or None
    title = f"{record['question']} ({run.video_name})"
    return page(
        title,
        [
            f"<header><h1>{escape(record['question'])}</h1>{_answers(record, found)}</header>",
            here.with_name("viewer.html").read_text(encoding="utf-8"),
            _missing(found),
            "" if found.shares is None else _left_out(found.shares, maps),
            section("settings", "Settings", _settings(run, video)),
            section("times", "Frames", _times(run)),
        ],
        style=here.with_name("viewer.css").read_text(encoding="utf-8"),
        script=here.with_name("viewer.js").read_text(encoding="utf-8"),
        data=data,
    )


def strongest_links(expression: SelfExpression, grid: TokenGrid) -> dict[str, Any]:
    """For each place of the grid the places whose tokens express its token most strongly, and with which weights.

    Returns:
        "each", how many; "cells" int32 and "weights" float32, both (t * h * w, each) packed; -1 is no place.
    """
    values = expression.values.detach().cpu().float().numpy()
    each = min(LINKS_EACH, values.shape[1], max(1, _MOST_BYTES["links"] // (8 * grid.n_tokens)))
    order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :each]
    by = np.take_along_axis(expression.indices.cpu().numpy(), order, 1)
    weights = np.take_along_axis(values, order, 1)
    step, row, column = grid.places().T
    cells = np.where(column >= 0, (step * grid.h + row) * grid.w + column, -1)
    placed = cells >= 0
    linked = np.where(weights != 0, cells[by], -1)
    return {"each": each, "cells": _packed(linked[placed], np.int32), "weights": _packed(weights[placed], np.float32)}


def _groups(run: FinishedRun) -> dict[str, str] | None:
    """The group at each place and its members in the whole video, both (t * h * w,) int32, packed."""
    if run.groups is None:
        return None
    maps = group_maps(run.groups, run.grid)
    return {"of": _packed(maps.groups, np.int32), "members": _packed(maps.counts, np.int32)}


def _attention(record: SharesRecord, grid: TokenGrid, most: int) -> list[dict[str, Any]]:
    """By layer; only the means of the heads where the maps of all heads are more than `most` bytes, and of fewer layers
    where those are."""
    shown = record.layers
    is_whole = sum(one.levels.size for one in shown) <= most
    if not is_whole:
        fitting = min(len(shown), max(1, most // (2 * record.n_visual)))
        shown = [shown[n] for n in np.linspace(0, len(shown) - 1, fitting).round().astype(int)]
    layers = []
    for one in shown:
        n_heads = 1 + len(one.ungated) if is_whole else 1
        before, after = (np.stack([grid.arrange(level) for level in which[:n_heads]]) for which in one.levels)
        shares = [[float(share.mean()), *share.tolist()] for share in (one.ungated, one.gated)]
        layers.append(
            {
                "layer": one.layer,
                "heads": ["mean of all", *map(str, range(n_heads - 1))],
                "before": _packed(before, np.uint8),
                "after": _packed(after, np.uint8),
                "top": one.top[:n_heads].tolist(),
                "shares": [share[:n_heads] for share in shares],
            }
        )
    return layers


def _subspaces(run: FinishedRun) -> dict[str, Any]:
    """The subspaces, the largest first, and the place of each token's subspace among them."""
    ranks, sizes = by_size(run.labels)
    colours = (*COLOURS, *[OTHER] * len(sizes))
    return {
        "ranks": _packed(run.grid.arrange(ranks), np.uint16),
        "subspaces": [
            {"name": str(n + 1), "size": size, "share": size / len(run.labels), "colour": colours[n]}
            for n, size in enumerate(sizes.tolist())
        ],
    }


def _frames(run: FinishedRun, clip: VideoClip) -> list[dict[str, Any]]:
    pictures: list[bytes] = []
    for side, quality in _SIZES:
        pictures = [_webp(frame, side, quality) for frame in clip.frames]
        if sum(map(len, pictures)) <= _MOST_BYTES["frames"]:
            break
    return [
        {"image": f"data:image/webp;base64,{b64encode(picture).decode()}", "seconds": seconds}
        for picture, seconds in zip(pictures, run.timestamps.tolist(), strict=True)
    ]


def _webp(frame: np.ndarray, side: int, quality: int) -> bytes:
    picture = Image.fromarray(frame)
    picture.thumbnail((side, side))
    content = BytesIO()
    picture.save(content, "webp", quality=quality)
    return content.getvalue()


def _packed(values: np.ndarray, dtype: Any) -> str:
    return b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _answers(record: dict[str, Any], found: FromModel) -> str:
    answers = [("with the gate", record["answer"])]
    if found.ungated is not None:
        answers.append(("without the gate", found.ungated))
    return '<div class="replies">' + "".join(
        f'<div class="reply"><strong>{name}</strong><pre>{escape(text or "(empty)")}</pre></div>'
        for name, text in answers
    ) + "</div>"  # fmt: skip


def _missing(found: FromModel) -> str:
    names = (
        ("the links between tokens", found.expression, "affinity"),
        ("attention and the answer without the gate", found.shares, "attention"),
    )
    missing = [(what, part) for what, value, part in names if value is None]
    parts = ",".join(("page", *(part for _, part in missing)))
    said = f"Not on this page: {', '.join(what for what, _ in missing)}. videoanchor viz RUN --what {parts} adds them."
    return paragraph(said, "quiet") if missing else ""


def _left_out(record: SharesRecord, shown: list[dict[str, Any]]) -> str:
    """What of the maps of attention is not on the page, which would be too large."""
    said = []
    if len(shown) < len(record.layers):
        numbers = ", ".join(str(one["layer"]) for one in shown)
        said.append(f"maps of {len(record.layers) - len(shown)} of {len(record.layers)} layers (there are {numbers})")
    if len(shown[0]["heads"]) <= len(record.layers[0].ungated):
        said.append("maps of single heads (there are the means of all)")
    return paragraph(f"Left out, for the size of the page: {'; '.join(said)}.", "quiet") if said else ""


def _settings(run: FinishedRun, video: Path) -> str:
    record = run.record
    about = {
        "video": Path(record["video"]).name,
        "sha256 of the video": video_sha256(video),
        "model": Path(record["model"]).name if Path(record["model"]).is_absolute() else record["model"],
        "system prompt": record.get("system") or "",
        "device": record.get("device", ""),
        "visual tokens": f"{run.grid.n_tokens}: {run.grid.t} steps of {run.grid.h} rows and {run.grid.w} columns",
        **record["config"],
        **record.get("versions", {}),
        "notes": "; ".join(record.get("notes", [])),
    }
    rows = ([name, text_cell(value)] for name, value in about.items() if value != "")
    return table("What was run", ("setting", "value"), rows)


def _times(run: FinishedRun) -> str:
    frames = enumerate(zip(run.timestamps.tolist(), run.indices.tolist(), strict=True), 1)
    rows = ([str(n), text_cell(f"{seconds:.3f}"), text_cell(position)] for n, (seconds, position) in frames)
    return folded(
        "Times of the frames", table("Sampled frames", ("frame", "seconds", "position in the video"), rows), False
    )


def video_sha256(path: Path) -> str:
    """Of a file; of a folder of views that of the names and hashes of its files."""
    if path.is_dir():
        lines = (f"{one.name} {video_sha256(one)}\n" for one in sorted(path.iterdir()) if one.is_file())
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
