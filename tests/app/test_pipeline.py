"""`videoanchor run` on checkpoints of the other backbones, with their own processors, saved and loaded like any."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from safetensors.numpy import load_file, save_file
from tiny_models_checkpoint import save_checkpoint
from transformers import AutoModelForImageTextToText

import videoanchor_triton as va
from videoanchor_triton.app import cli, pipeline, prompt
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import read_video, write_video
from videoanchor_triton.integrations.errors import InputError


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
    inputs, (grid,) = pipeline.prepare(model, processor, clip, "word7")
    assert grid == TokenGrid(5, 2, 2)
    brightness = inputs["pixel_values"].mean((1, 2, 3))
    assert brightness.argsort().tolist() == values.argsort().tolist()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills them with random numbers."""
    save_checkpoint("internvl", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "k_proj" in name)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of its weights \(.*k_proj.*would run with random ones"):
        pipeline.load(str(tmp_path), "cpu")


def test_a_loaded_checkpoint_is_known_as_tested(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Configs of transformers 4.57 answer otherwise once they were loaded."""
    tiny.build("qwen2_5_vl").save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    va.enable(model, va.VideoAnchorConfig(alpha_k=2.0, alpha_v=1.0)).disable()
    assert not [one for one in recwarn if "never compared" in str(one.message)]


def test_a_device_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint("internvl", tmp_path / "checkpoint")
    write_video(tmp_path / "clip.mp4", np.zeros((4, 32, 32, 3), dtype=np.uint8), fps=5)

    def failing(*_args: object, **_options: object) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered\nfurther lines")

    monkeypatch.setattr(pipeline, "answer", failing)
    options = ["--question", "?", "--alpha-k", "2", "--alpha-v", "1", "--out", str(tmp_path / "out")]
    model, video = str(tmp_path / "checkpoint"), str(tmp_path / "clip.mp4")
    assert cli.main(["run", "--model", model, "--video", video, *options]) == 1
    assert "the device failed, and this process cannot use it" in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_layout_is_refused() -> None:
    config = tiny.build("internvl").base_model.config
    clip = va.VideoClip(np.zeros((3, 2, 2, 3), dtype=np.uint8), np.arange(3.0), np.arange(3), 3, 1.0)
    with pytest.raises(InputError, match="cannot lay 25 visual tokens on 3 frames"):
        prompt.token_grids({}, [True] * 25, [clip], config)
