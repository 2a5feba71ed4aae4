"""`videoanchor run` on checkpoints of the other backbones, with their own processors, saved and loaded like any."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.numpy import load_file
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.integrations import cli, pipeline, prompt
from videoanchor_triton.integrations.errors import InputError
from videoanchor_triton.integrations.token_grid import TokenGrid
from videoanchor_triton.integrations.video.reader import read_video, write_video


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_run_on_another_backbone(name: str, dtype: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path / "checkpoint")
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, fps=5)
    out = tmp_path / "out"
    arguments = ["run", "--model", tmp_path / "checkpoint", "--video", tmp_path / "clip.mp4", "--out", out]
    options = ["--question", "word5 word6", "--alpha-k", "2", "--alpha-v", "1", "--max-frames", "6"]
    shape = ["--n-clusters", "4", "--pca-rank", "8", "--max-new-tokens", "3", "--dtype", dtype]
    assert cli.main([*map(str, arguments), *options, *shape]) == 0
    result = json.loads((out / "result.json").read_text())
    n_extra = 1 if name == "llava_onevision" else 0
    assert result["grid"] == {"t": 6, "h": 2, "w": 2, "n_extra": n_extra, "row_newlines": False}
    assert result["tokens"]["visual"] == 24 + n_extra
    assert load_file(out / "anchors.safetensors")["scores"].shape == (24 + n_extra,)
    assert (out / "anchors.png").stat().st_size > 10_000


def test_the_processor_gets_the_frames_of_the_clip(tmp_path: Path) -> None:
    """Frames reach the vision tower in order and unsampled: a token's frame is the frame that the grid says."""
    save_checkpoint("internvl", tmp_path)
    values = np.array([10, 250, 60, 200, 120], dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", np.broadcast_to(values[:, None, None, None], (5, 32, 32, 3)).copy(), fps=5)
    model, processor = pipeline.load(str(tmp_path), "cpu")
    clip = read_video(tmp_path / "clip.mp4")
    inputs, grid = pipeline.prepare(model, processor, clip, "word7")
    assert grid == TokenGrid(5, 2, 2)
    brightness = inputs["pixel_values"].mean((1, 2, 3))
    assert brightness.argsort().tolist() == values.argsort().tolist()


def test_an_unknown_layout_is_refused() -> None:
    config = tiny.build("internvl").base_model.config
    with pytest.raises(InputError, match="cannot lay 25 visual tokens on 3 frames"):
        prompt.token_grid({"input_ids": torch.zeros(1, 25)}, 25, 3, config)
