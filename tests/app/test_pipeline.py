"""`videoanchor run` on checkpoints of the other backbones, with their own processors, saved and loaded like any."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.numpy import load_file, save_file
from tiny_models_checkpoint import save_checkpoint
from transformers import AutoModelForImageTextToText

import videoanchor_triton as va
from videoanchor_triton.app import cli, pipeline, prompt
from videoanchor_triton.app.answer import output_warning
from videoanchor_triton.app.room_scans import CHECKPOINT, RoomScan, write_scans
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


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_how_far_the_gate_moves_an_answer(alpha: float) -> None:
    """Against the model's own logits; a gate of 0 moves nothing."""
    model, processor = pipeline.load(str(CHECKPOINT), "cpu", "float32")
    prompt = RoomScan(0).clip(), "How many objects are there?"
    config = va.VideoAnchorConfig(alpha_k=alpha, alpha_v=alpha / 4, n_clusters=12, pca_rank=32)
    found = pipeline.answer(model, processor, *prompt, config, max_new_tokens=2, gate_effect=True)
    effect = found.gate_effect
    assert effect is not None
    assert found.text == effect.token == pipeline.answer(model, processor, *prompt, config, max_new_tokens=2).text
    inputs, _ = pipeline.prepare(model, processor, *prompt)
    probabilities, sizes = [], []
    layers = model.model.language_model.layers
    for one in (config, va.VideoAnchorConfig(alpha_k=0, alpha_v=0)):
        seen: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            for layer in layers
        ]
        with va.enable(model, one), torch.no_grad():
            probabilities.append(model(**inputs).logits[0, -1].softmax(-1))
        sizes.append(torch.stack([out.double().norm() for out in seen]))
        for hook in hooks:
            hook.remove()
    ratios = sizes[0] / sizes[1]
    assert effect.output_size == pytest.approx(float(ratios[ratios.log().abs().argmax()]), rel=1e-5)
    assert (output_warning([effect.output_size]) is None) == (alpha == 0)
    token, without = (int(one.argmax()) for one in probabilities)
    assert (effect.token, effect.token_without) == (processor.decode([token]), processor.decode([without]))
    assert effect.probability == pytest.approx(float(probabilities[0][token]), rel=1e-5)
    assert effect.probability_without == pytest.approx(float(probabilities[1][token]), rel=1e-5)
    assert (effect.probability == effect.probability_without) == (alpha == 0)


@pytest.mark.parametrize("command", ["run", "batch"])
def test_the_gate_effect_is_in_results_on_request(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scans(tmp_path, [RoomScan(0)], [RoomScan(0).questions()[:2]])
    options = [
        "--alpha-k",
        "4",
        "--alpha-v",
        "1",
        "--n-clusters",
        "12",
        "--pca-rank",
        "32",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
    ]
    which = {
        "run": ["run", "--video", str(tmp_path / "scan000.mp4"), "--question", "How many objects are there?"],
        "batch": ["batch", str(tmp_path / "questions.jsonl"), "--tables", "csv"],
    }[command]
    arguments = [*which, "--model", str(CHECKPOINT), "--out", str(tmp_path / "out"), *options]
    file = tmp_path / "out" / {"run": "result.json", "batch": "results.jsonl"}[command]
    for asked in (False, True):
        assert cli.main([*arguments, *(["--gate-effect"] if asked else [])]) == 0
        effect = json.loads(file.read_text().splitlines()[-1] if command == "batch" else file.read_text())[
            "gate_effect"
        ]
        assert (effect is not None) == asked
        assert ("which the model was not trained for" in capsys.readouterr().out) == asked
    assert effect["output_size"] > 1.2
    assert 0 < effect["probability"] <= 1
    assert 0 < effect["probability_without"] < 1


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
