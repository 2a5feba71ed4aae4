"""viz.html: a run as one page, that asks for nothing from anywhere."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from ...anchor.solver import SelfExpression
from ..pages.html import escape, folded, page, paragraph, section, table, text_cell
from ..token_grid import Grid, JoinedGrid
from ..video.names import each
from .attention_share import SharesRecord
from .finished_run import FinishedRun, Frames
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


def run_page(run: FinishedRun, frames: Frames, videos: Sequence[Path], found: FromModel | None = None) -> str:
    """
    Args:
        run: the run.
        frames: its own, each (H, W, 3) uint8.
        videos: where they were read.
        found: what the page shows beside scores and subspaces.

    Returns:
        HTML, of less than 15 MB.
    """
    found = found or FromModel()
    record, here = run.record, Path(__file__)
    data = {
        "grid": {"t": run.grid.t, "h": run.grid.h, "w": run.grid.w},
        "frames": _frames(run, frames),
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
            f"<header><h1>{escape(record['question'])}</h1>{_names(run)}{_answers(record, found)}</header>",
            here.with_name("viewer.html").read_text(encoding="utf-8"),
            _missing(found),
            "" if found.shares is None else _left_out(found.shares, maps),
            section("settings", "Settings", _settings(run, videos)),
            section("times", "Frames", _times(run)),
        ],
        style=here.with_name("viewer.css").read_text(encoding="utf-8"),
        script=here.with_name("viewer.js").read_text(encoding="utf-8"),
        data=data,
    )


def strongest_links(expression: SelfExpression, grid: Grid) -> dict[str, Any]:
    """For each place of the grid the places whose tokens express its token most strongly, and with which weights.

    Returns:
        "each", how many; "cells" int32 and "weights" float32, both (t * h * w, each) packed; -1 is no place.
    """
    values = expression.values.detach().cpu().float().numpy()
    token_at = grid.arrange(np.arange(grid.n_tokens)).ravel()
    most = min(LINKS_EACH, values.shape[1], max(1, _MOST_BYTES["links"] // (8 * len(token_at))))
    order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :most]
    by = np.take_along_axis(expression.indices.cpu().numpy(), order, 1)
    weights = np.take_along_axis(values, order, 1)
    cells = np.full(grid.n_tokens, -1)
    cells[token_at[::-1]] = np.arange(len(token_at))[::-1]  # of several places the first
    linked = np.where(weights != 0, cells[by], -1)
    packed = {"cells": _packed(linked[token_at], np.int32), "weights": _packed(weights[token_at], np.float32)}
    return {"each": most, **packed}


def _groups(run: FinishedRun) -> dict[str, str] | None:
    """The group at each place and its members in the whole video, both (t * h * w,) int32, packed."""
    if run.groups is None:
        return None
    maps = group_maps(run.groups, run.grid)
    return {"of": _packed(maps.groups, np.int32), "members": _packed(maps.counts, np.int32)}


def _attention(record: SharesRecord, grid: Grid, most: int) -> list[dict[str, Any]]:
    """By layer; only the means of the heads where the maps of all heads are more than `most` bytes, and of fewer layers
    where those are."""
    shown, n_places = record.layers, grid.t * grid.h * grid.w
    is_whole = sum(one.levels[:, :, 0].size for one in shown) * n_places <= most
    if not is_whole:
        fitting = min(len(shown), max(1, most // (2 * n_places)))
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


def _frames(run: FinishedRun, frames: Frames) -> list[dict[str, Any]]:
    pictures: list[bytes] = []
    for side, quality in _SIZES:
        pictures = [_webp(frame, side, quality) for frame in frames]
        if sum(map(len, pictures)) <= _MOST_BYTES["frames"]:
            break
    moments = run.moments(np.arange(len(pictures)))
    steps = run.grid.steps_of_frames(len(pictures)).tolist()
    grids = run.grid.grids if isinstance(run.grid, JoinedGrid) else [run.grid]
    return [
        {
            "image": f"data:image/webp;base64,{b64encode(picture).decode()}",
            "moment": moment,
            "step": step,
            "size": frame.shape[:2],
            "grid": (grids[of].h, grids[of].w),
        }
        for picture, moment, step, frame, of in zip(pictures, moments, steps, frames, run.video_of_frame, strict=True)
    ]


def _webp(frame: np.ndarray, side: int, quality: int) -> bytes:
    picture = Image.fromarray(frame)
    picture.thumbnail((side, side))
    content = BytesIO()
    picture.save(content, "webp", quality=quality)
    return content.getvalue()


def _packed(values: np.ndarray, dtype: Any) -> str:
    return b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _names(run: FinishedRun) -> str:
    """Of several videos, by the numbers that moments have."""
    return paragraph(run.video_name, "quiet") if len(run.n_frames) > 1 else ""


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


def _settings(run: FinishedRun, videos: Sequence[Path]) -> str:
    record = run.record
    pairs = zip(each(record["video"]), videos, strict=True)
    facts = [{"video": Path(name).name, "sha256 of the video": video_sha256(path)} for name, path in pairs]
    numbered = ((fact, f" {n}" * (len(facts) > 1)) for n, one in enumerate(facts, 1) for fact in one.items())
    about = {
        **{name + number: value for (name, value), number in numbered},
        "model": Path(record["model"]).name if Path(record["model"]).is_absolute() else record["model"],
        "system prompt": record.get("system") or "",
        "device": record.get("device", ""),
        "dtype": record.get("dtype", ""),
        **record.get("sampled", {}),
        "visual tokens": f"{run.grid.n_tokens}: {_sizes(run.grid)}",
        "most tokens of the answer": record.get("budget", {}).get("max_new_tokens", ""),
        "most pixels of a frame": record.get("max_pixels", ""),
        **(record.get("drawn") or {}),
        **record["config"],
        **record.get("versions", {}),
        "notes": "; ".join(record.get("notes", [])),
    }
    rows = ([name, text_cell(value)] for name, value in about.items() if value != "")
    return table("What was run", ("setting", "value"), rows)


def _sizes(grid: Grid) -> str:
    grids = grid.grids if isinstance(grid, JoinedGrid) else [grid]
    return "; ".join(f"{one.t} step{'s' * (one.t > 1)} of {one.h} rows and {one.w} columns" for one in grids)


def _times(run: FinishedRun) -> str:
    frames = enumerate(zip(run.video_of_frame.tolist(), run.timestamps.tolist(), run.indices.tolist(), strict=True), 1)
    rows = ([str(n), str(of + 1), text_cell(f"{at:.3f}"), text_cell(index)] for n, (of, at, index) in frames)
    titles = ("frame", "video", "seconds", "position in the video")
    return folded("Times of the frames", table("Sampled frames", titles, rows), False)


def video_sha256(path: Path) -> str:
    """Of a file; of a folder of views that of the names and hashes of its files."""
    if path.is_dir():
        lines = (f"{one.name} {video_sha256(one)}\n" for one in sorted(path.iterdir()) if one.is_file())
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
