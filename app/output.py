"""What a run leaves in its folder: its results first, and a picture of them."""

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..anchor.config import VideoAnchorConfig
from ..integrations.errors import InputError
from .atomic_write import replacing
from .machine import versions
from .text import json_text
from .token_grid import TokenGrid
from .video.reader import VideoClip

if TYPE_CHECKING:  # these import transformers, and the folder is checked before that
    from ..anchor.scores import AnchorResult
    from .answer import Answer


PICTURES = ("anchors.png", "viz.html")


def check_folder(path: Path) -> None:
    """Refuses an output folder that could not be written at the end.

    Raises:
        InputError: when `path` is a file or its nearest existing parent cannot be written.
    """
    existing = path
    while not existing.exists():
        if existing.is_symlink():
            raise InputError(f"--out {path}: {existing} is a link to nothing; give a folder")
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"--out {path}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: no permission to write in {existing}; give another folder")


def _tensors(result: "AnchorResult", grid: TokenGrid, clip: VideoClip) -> dict[str, Tensor]:
    """What `anchors.safetensors` holds: scores (N,) fp32, labels (N,) int64, grid (3,) int64 as t, h, w, timestamps
    (T,) fp64 seconds and frame_indices (T,) int64 of the sampled frames; where tokens were merged, groups (N,) int64,
    -1 of those that were dropped.
    """
    groups = {} if result.groups is None else {"groups": result.groups.long().cpu().contiguous()}
    return {
        "scores": result.scores.float().cpu().contiguous(),
        "labels": result.labels.long().cpu().contiguous(),
        "grid": torch.tensor([grid.t, grid.h, grid.w]),
        "timestamps": torch.from_numpy(clip.timestamps.copy()),
        "frame_indices": torch.from_numpy(clip.indices.copy()),
        **groups,
    }


def write_run(
    folder: Path, result: "Answer", clip: VideoClip, config: VideoAnchorConfig, about: dict[str, Any]
) -> dict[str, Any]:
    """Writes `result.json` and `anchors.safetensors` into `folder`, both or none; `draw_run` makes the pictures.

    Pictures of an earlier run are removed: they are not of this one.

    Args:
        folder: made if missing.
        about: further entries of `result.json`: model, video, question, seconds before the model ran.

    Returns:
        what `result.json` holds.
    """
    anchor = result.anchor
    record = {
        "answer": result.text,
        "gate_effect": None if result.gate_effect is None else asdict(result.gate_effect),
        **about,
        "config": config.to_dict(),
        "tokens": {
            "prompt": result.n_prompt_tokens,
            "visual": result.n_visual_tokens,
            "generated": result.n_generated_tokens,
        },
        "grid": {
            "t": result.grid.t,
            "h": result.grid.h,
            "w": result.grid.w,
            "n_extra": result.grid.n_extra,
            "row_newlines": result.grid.row_newlines,
        },
        "frames": {"timestamps": clip.timestamps.tolist(), "indices": clip.indices.tolist()},
        "ssc": {
            "eigengap": anchor.eigengap,
            "in_gap": anchor.in_gap,
            "n_iter": anchor.n_iter,
            "residual": anchor.residual,
            "converged": anchor.converged,
            "seconds": anchor.seconds,
        },
        "seconds": {**about.get("seconds", {}), **result.seconds},
        "peak_memory_bytes": result.peak_memory_bytes,
        "device": result.device,
        "versions": versions(),
    }
    tensors = save(_tensors(anchor, result.grid, clip))
    made_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder / "result.json") as about_run, replacing(folder / "anchors.safetensors") as anchors:
            about_run.write_text(json_text(record) + "\n", encoding="utf-8")
            anchors.write_bytes(tensors)
            for name in PICTURES:
                (folder / name).unlink(missing_ok=True)
    except BaseException:
        if made_folder:
            with suppress(OSError):
                folder.rmdir()
        raise
    return record


def draw_run(folder: Path, result: "Answer", clip: VideoClip, record: dict[str, Any], video: Path) -> None:
    """Adds `anchors.png` and `viz.html` to what `write_run` has written.

    Args:
        record: what `write_run` has returned.
        video: where it lies on this machine.
    """
    # these import matplotlib, and the folder is checked before that
    from .viz import contact_sheet, run_page
    from .viz.finished_run import FinishedRun

    tensors = {name: tensor.numpy() for name, tensor in _tensors(result.anchor, result.grid, clip).items()}
    names = ("scores", "labels", "timestamps", "frame_indices")
    values = (tensors[name] for name in names)
    run = FinishedRun(folder, record, result.grid, *values, groups=tensors.get("groups"))
    with replacing(folder / "anchors.png") as path:
        contact_sheet.draw(path, clip, run)
    with replacing(folder / "viz.html") as path:
        path.write_text(run_page.run_page(run, clip, video), encoding="utf-8")
