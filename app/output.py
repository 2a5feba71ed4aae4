"""What a run leaves in its folder: its results first, and a picture of them."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..anchor.config import VideoAnchorConfig
from ..integrations.errors import InputError
from .atomic_write import replacing
from .machine import versions
from .text import json_text
from .token_grid import joined
from .video.reader import VideoClip, frames_of

if TYPE_CHECKING:  # these import transformers, and the folder is checked before that
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


def _tensors(result: "Answer", clips: Sequence[VideoClip]) -> dict[str, Tensor]:
    """What `anchors.safetensors` holds: scores (N,) fp32, labels (N,) int64, grid (3,) int64 as t, h, w, timestamps
    (T,) fp64 seconds and frame_indices (T,) int64 of the sampled frames; where tokens were merged, groups (N,) int64,
    -1 of those that were dropped. Of several videos and images those of one after those of another, and grid (M, 3).
    """
    anchor = result.anchor
    groups = {} if anchor.groups is None else {"groups": anchor.groups.long().cpu().contiguous()}
    shapes = torch.tensor([[grid.t, grid.h, grid.w] for grid in result.grids])
    return {
        "scores": anchor.scores.float().cpu().contiguous(),
        "labels": anchor.labels.long().cpu().contiguous(),
        "grid": shapes[0] if len(clips) == 1 else shapes,
        "timestamps": torch.from_numpy(np.concatenate([clip.timestamps for clip in clips])),
        "frame_indices": torch.from_numpy(np.concatenate([clip.indices for clip in clips])),
        **groups,
    }


def write_run(
    folder: Path, result: "Answer", clips: Sequence[VideoClip], config: VideoAnchorConfig, about: dict[str, Any]
) -> dict[str, Any]:
    """Writes `result.json` and `anchors.safetensors` into `folder`, both or none; `draw_run` makes the pictures.

    Pictures of an earlier run are removed: they are not of this one.

    Args:
        folder: made if missing.
        clips: those of the prompt, in its order; "video", "grid" and "frames" of several are lists.
        about: further entries of `result.json`: model, video, question, seconds before the model ran.

    Returns:
        what `result.json` holds.
    """
    anchor = result.anchor
    grids = [asdict(grid) for grid in result.grids]
    frames = [{"timestamps": clip.timestamps.tolist(), "indices": clip.indices.tolist()} for clip in clips]
    one = len(clips) == 1
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
        "grid": grids[0] if one else grids,
        "frames": frames[0] if one else frames,
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
    tensors = save(_tensors(result, clips))
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


def draw_run(
    folder: Path, result: "Answer", clips: Sequence[VideoClip], record: dict[str, Any], videos: Sequence[Path]
) -> None:
    """Adds `anchors.png` and `viz.html` to what `write_run` has written.

    Args:
        record: what `write_run` has returned.
        videos: where they lie on this machine.

    Raises:
        InputError: the tokens of an image have no places.
    """
    # these import matplotlib, and the folder is checked before that
    from .viz import contact_sheet, run_page
    from .viz.finished_run import FinishedRun

    tensors = {name: tensor.numpy() for name, tensor in _tensors(result, clips).items()}
    names = ("scores", "labels", "timestamps", "frame_indices")
    grid = joined(result.grids, [len(clip.frames) for clip in clips])
    run = FinishedRun(folder, record, grid, *(tensors[name] for name in names), groups=tensors.get("groups"))
    frames = frames_of(clips)
    with replacing(folder / "anchors.png") as path:
        contact_sheet.draw(path, frames, run)
    with replacing(folder / "viz.html") as path:
        path.write_text(run_page.run_page(run, frames, videos), encoding="utf-8")
