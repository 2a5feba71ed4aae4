"""What a run leaves in its folder: all of its files, or none."""

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..anchor.config import VideoAnchorConfig
from .errors import InputError
from .token_grid import TokenGrid
from .video.reader import VideoClip
from .viz import contact_sheet

if TYPE_CHECKING:  # these import transformers, and the folder is checked before that
    from ..anchor.scores import AnchorResult
    from .pipeline import RunResult


def check_folder(path: Path) -> None:
    """Refuses an output folder that could not be written at the end.

    Raises:
        InputError: when `path` is a file or its nearest existing parent cannot be written.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"--out {path}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--out {path}: no permission to write in {existing}; give another folder")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("videoanchor-triton", "torch", "triton", "transformers", "scikit-learn", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _tensors(result: "AnchorResult", grid: TokenGrid, clip: VideoClip) -> dict[str, Tensor]:
    """What `anchors.safetensors` holds: scores (N,) fp32, labels (N,) int64, grid (3,) int64 as t, h, w, timestamps
    (T,) fp64 seconds and frame_indices (T,) int64 of the sampled frames."""
    return {
        "scores": result.scores.float().cpu().contiguous(),
        "labels": result.labels.long().cpu().contiguous(),
        "grid": torch.tensor([grid.t, grid.h, grid.w]),
        "timestamps": torch.from_numpy(clip.timestamps.copy()),
        "frame_indices": torch.from_numpy(clip.indices.copy()),
    }


def write_run(
    folder: Path, result: "RunResult", clip: VideoClip, config: VideoAnchorConfig, about: dict[str, Any]
) -> dict[str, Any]:
    """Writes `result.json`, `anchors.safetensors` and `anchors.png` into `folder`.

    The files are made in a folder inside it and moved when all three are there, so that an error or an interruption
    leaves what stood there before.

    Args:
        folder: made if missing.
        about: further entries of `result.json`: model, video, question, seconds before the model ran.

    Returns:
        what `result.json` holds.
    """
    anchor = result.anchor
    record = {
        "answer": result.answer,
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
            "algorithm": anchor.algorithm,
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
    title = f"{Path(about['video']).name}: {result.n_visual_tokens} visual tokens, scorer {record['config']['scorer']}"
    made_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_files(folder, record, _tensors(anchor, result.grid, clip), clip, result.grid, title)
    except BaseException:
        if made_folder:
            folder.rmdir()
        raise
    return record


def _write_files(
    folder: Path, record: dict[str, Any], tensors: dict[str, Tensor], clip: VideoClip, grid: TokenGrid, title: str
) -> None:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        scratch = Path(name)
        (scratch / "result.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        save_file(tensors, scratch / "anchors.safetensors")
        scores, labels = tensors["scores"].numpy(), tensors["labels"].numpy()
        contact_sheet.draw(scratch / "anchors.png", clip, grid, scores, labels, title)
        for path in scratch.iterdir():
            os.replace(path, folder / path.name)
