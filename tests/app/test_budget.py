"""Tokens and memory worked out before a model is loaded, against the model, and what is said when they do not fit."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.anchor import memory
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.problem import features_memory_bytes
from videoanchor_triton.app import budget, cli, demo, pipeline
from videoanchor_triton.app.budget import Planner, check_fits
from videoanchor_triton.app.checkpoint import weight_bytes
from videoanchor_triton.app.video.reader import VideoClip, write_video
from videoanchor_triton.app.video.sampling import uniform
from videoanchor_triton.integrations.errors import InputError

GATE = VideoAnchorConfig(alpha_k=1, alpha_v=1, pca_rank=16)
GIB = 2**30
LIMIT = memory.solver_memory_bytes(60, 60, 16, memory.SMALLEST_BLOCK)  # 20 frames of 3 tokens
TIGHT = VideoAnchorConfig(alpha_k=1, alpha_v=1, pca_rank=16, memory_budget=LIMIT)


def made_clip(n: int, height: int = 56, width: int = 84) -> VideoClip:
    frames = np.random.default_rng(n).integers(0, 255, (n, height, width, 3), dtype=np.uint8)
    return VideoClip(frames, np.arange(n) / 2, np.arange(n), n, 2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    demo.make_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(checkpoint: str) -> tuple[Any, Any]:
    return pipeline.load(checkpoint, "cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the memory that is free."""
    return lambda n: monkeypatch.setattr(memory, "available_memory_bytes", lambda _device: n)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_budget_is_what_the_model_takes(checkpoint: str, dtype: str) -> None:
    clip = made_clip(7)
    budget = Planner(checkpoint, GATE, max_new_tokens=5, device="cpu", dtype=dtype).budget(clip, "Why?")
    model, processor = pipeline.load(checkpoint, "cpu", dtype)
    inputs, grids = pipeline.prepare(model, processor, clip, "Why?")
    assert budget.n_prompt_tokens == inputs["input_ids"].shape[1]
    assert budget.n_visual_tokens == grids[0].n_tokens
    assert budget.weights == sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode():
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, min_new_tokens=6, max_new_tokens=6, return_dict_in_generate=True, do_sample=False
        )
    cached = output.past_key_values.layers  # the last token is not put there
    assert budget.kv_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cached)
    assert budget.context == 4096
    assert budget.problem is None
    assert json.loads(json.dumps(budget.to_dict()))["needed"] == budget.needed


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_other_backbones(name: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    clip = made_clip(6, 32, 48)
    budget = Planner(str(tmp_path), GATE, max_new_tokens=1, device="cpu").budget(clip, "word5")
    model, processor = pipeline.load(str(tmp_path), "cpu")
    inputs, grids = pipeline.prepare(model, processor, clip, "word5")
    assert (budget.n_prompt_tokens, budget.n_visual_tokens) == (inputs["input_ids"].shape[1], grids[0].n_tokens)
    assert budget.activations > sum(value.nbytes for key, value in inputs.items() if key.startswith("pixel"))


@pytest.mark.parametrize("max_new_tokens", [4096 - 150, 4096 - 80, 4096 - 15])
def test_the_largest_number_of_frames_for_the_context(checkpoint: str, max_new_tokens: int) -> None:
    clip = made_clip(60)
    planner = Planner(checkpoint, GATE, max_new_tokens=max_new_tokens, device="cpu")
    fits = [n for n in range(1, 60) if _taken(planner, clip, n).problem is None]
    best = planner.largest(clip, "Why?")
    assert best == max(fits, default=0)
    problem = planner.budget(clip, "Why?").problem
    assert problem is not None
    assert "the model's context holds 4096" in problem
    expected = f"try --max-frames {best}" if best else "lower --max-new-tokens"
    assert expected in planner.advice(clip, "Why?")


def _taken(planner: Planner, clip: VideoClip, n: int) -> Any:
    return planner.budget(clip.take(uniform(np.arange(float(len(clip.frames))), n)), "Why?")


def test_the_largest_number_of_frames_for_the_memory(checkpoint: str, free: Any) -> None:
    clip = made_clip(40)
    free(100 * GIB)
    settings = VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer="uniform")
    roomy = Planner(checkpoint, settings, max_new_tokens=10, device="cpu")
    needed = [_taken(roomy, clip, n).needed for n in (20, 24)]
    assert needed[0] < needed[1]
    free(needed[1] - 1)
    planner = Planner(checkpoint, settings, max_new_tokens=10, device="cpu")
    problem = planner.budget(clip, "Why?").problem
    assert problem is not None
    assert "40 frames" in problem
    best = planner.largest(clip, "Why?")
    assert _taken(planner, clip, best).problem is None
    assert _taken(planner, clip, best + 1).problem is not None
    assert 0 < best < 24


def test_scores_past_their_own_budget(checkpoint: str, free: Any) -> None:
    """The solver may use less than what is free."""
    free(100 * GIB)
    planner = Planner(checkpoint, TIGHT, max_new_tokens=10, device="cpu")
    clip = made_clip(40)
    problem = planner.budget(clip, "Why?").problem
    assert problem is not None
    assert "memory_budget" in problem
    assert planner.advice(clip, "Why?") == "try --max-frames 20"
    uniform_scores = VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer="uniform", memory_budget=LIMIT)
    assert Planner(checkpoint, uniform_scores, max_new_tokens=10, device="cpu").budget(clip, "Why?").problem is None


@pytest.mark.parametrize("scorer", ["ssc", "knn", "kmeans", "uniform"])
def test_scores_count_the_tokens_and_their_pca(scorer: Any) -> None:
    """The PCA of few wide tokens takes more than their self-expression; bf16 tokens half of what fp32 ones do."""
    settings = VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer=scorer, pca_rank=8)
    half, full = (
        budget._plan_scores(300, 2048, itemsize, settings, torch.device("cpu"), None)[0] for itemsize in (2, 4)
    )
    assert full - half == 300 * 2048 * 2
    pca = 0 if scorer == "uniform" else features_memory_bytes(300, 2048, 8)
    assert half >= 300 * 2048 * 2 + pca


def test_the_authors_arithmetic_grows_with_the_square() -> None:
    settings = VideoAnchorConfig(alpha_k=1, alpha_v=1, pca_rank=8).reproduce()

    def plan(n_tokens: int, limit: int | None = None) -> tuple[int, str | None]:
        return budget._plan_scores(n_tokens, 64, 4, settings, torch.device("cpu"), limit)

    assert plan(2000)[0] - plan(1000)[0] == 10 * 8 * (2000**2 - 1000**2) + 1000 * 64 * 4
    assert "authors' self-expression of 2000 tokens" in str(plan(2000, 10 * 8 * 2000**2 - 1)[1])
    assert plan(2000, 10 * 8 * 2000**2)[1] is None


def test_weights_that_do_not_fit(checkpoint: str, free: Any) -> None:
    free(1000)
    planner = Planner(checkpoint, GATE, max_new_tokens=10, device="cpu")
    clip = made_clip(4)
    assert planner.largest(clip, "Why?") == 0
    assert "smaller checkpoint" in planner.advice(clip, "Why?")


@pytest.mark.parametrize(
    ("n_frames", "max_new_tokens", "settings"),
    [
        (60, 4096 - 150, GATE),
        (59, 4096 - 80, GATE),
        (59, 4096 - 190, GATE),
        (60, 4096 - 15, GATE),
        (40, 10, TIGHT),
    ],
    ids=["context", "odd", "one-too-many", "not-even-one", "scores"],
)
def test_a_loaded_model_refuses_in_the_same_words(
    checkpoint: str, loaded: tuple[Any, Any], n_frames: int, max_new_tokens: int, settings: VideoAnchorConfig
) -> None:
    """`answer` needs no planner, and says what a planner would have said; what it advises is then taken."""
    clip = made_clip(n_frames)
    planner = Planner(checkpoint, settings, max_new_tokens=max_new_tokens, device="cpu")
    expected = f"{planner.budget(clip, 'Why?').problem}: {planner.advice(clip, 'Why?')}"
    with pytest.raises(InputError) as refused:
        pipeline.answer(*loaded, clip, "Why?", settings, max_new_tokens=max_new_tokens)
    assert str(refused.value) == expected
    best = planner.largest(clip, "Why?")
    for n in range(max(best, 1), best + 2):
        fewer = clip.take(uniform(np.arange(float(n_frames)), n))
        inputs, grids = pipeline.prepare(*loaded, fewer, "Why?")
        with nullcontext() if n <= best else pytest.raises(InputError):
            check_fits(loaded[0], inputs["input_ids"].shape[1], max_new_tokens, fewer, grids, settings)


def test_memory_that_nobody_knows(checkpoint: str, free: Any) -> None:
    free(None)
    budget = Planner(checkpoint, GATE, max_new_tokens=10, device="cpu").budget(made_clip(4), "Why?")
    assert budget.problem is None
    assert "free" not in "".join(budget.lines())


def test_size_of_the_weights(tmp_path: Path) -> None:
    """Shards are added up; floats take the dtype asked for, integers keep theirs; other formats are not known."""
    config = hf.Qwen2Config()
    config.dtype = torch.float32
    tensors = {"a": torch.zeros(5, 3, dtype=torch.float16), "b": torch.zeros(7, dtype=torch.int8)}
    assert weight_bytes(str(tmp_path), config) is None
    save_file(tensors, tmp_path / "model.safetensors")
    assert weight_bytes(str(tmp_path), config) == 15 * 4 + 7
    assert weight_bytes(str(tmp_path), config, "float16") == 15 * 2 + 7
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert weight_bytes(str(tmp_path), config) is None
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for key, name in names.items():
        save_file({key: tensors[key]}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert weight_bytes(str(tmp_path), config, "float64") == 15 * 8 + 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"dtype": "int3"}, "dtype: expected", id="dtype"),
        pytest.param({"device": "cuda:7"}, "no CUDA device", id="device"),
    ],
)
def test_wrong_arguments(checkpoint: str, options: dict[str, Any], message: str) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(InputError, match=message):
        Planner(checkpoint, GATE, max_new_tokens=1, **options)


def _run(checkpoint: str, folder: Path, *options: str) -> list[str]:
    if not (folder / "clip.mp4").exists():
        write_video(folder / "clip.mp4", made_clip(40).frames, fps=8)
    run = ["run", "--model", checkpoint, "--video", str(folder / "clip.mp4"), "--question", "?"]
    return [*run, "--out", str(folder / "out"), "--alpha-k", "1", "--alpha-v", "1", "--scorer", "uniform", *options]


def test_refused_before_the_model_is_loaded_then_fitted(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A context of 100 tokens: the refusal names the frames that fit, --fit takes just those."""
    small = tmp_path / "small"
    small.mkdir()
    for file in Path(checkpoint).iterdir():
        (small / file.name).symlink_to(file)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").unlink()
    text = config.get("text_config", config)
    text["max_position_embeddings"] = 100
    (small / "config.json").write_text(json.dumps(config))
    options = ("--max-frames", "40", "--max-new-tokens", "2")

    def unwanted(*_: object) -> None:
        raise AssertionError("the model is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load", unwanted)
        assert cli.main(_run(str(small), tmp_path, *options)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the model's context holds 100: try --max-frames " in line
    frames = line.rsplit(" ", 1)[1]
    assert cli.main(_run(str(small), tmp_path, *options, "--fit")) == 0
    assert f"--fit chose --max-frames {frames}:" in capsys.readouterr().err
    fitted = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(fitted["frames"]["indices"]) == int(frames)
    assert fitted["budget"]["n_prompt_tokens"] == fitted["tokens"]["prompt"] <= 98
    assert cli.main(_run(str(small), tmp_path, "--max-frames", frames, "--max-new-tokens", "2")) == 0
    asked = json.loads((tmp_path / "out" / "result.json").read_text())
    assert asked["frames"] == fitted["frames"]


def test_views_are_asked_about_like_a_video(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (tmp_path / "views").mkdir()
    for n, frame in enumerate(made_clip(3).frames):
        Image.fromarray(frame[: 56 - 10 * n]).save(tmp_path / "views" / f"{n}.png")
    options = ("--video", str(tmp_path / "views"), "--max-new-tokens", "1")
    assert cli.main(_run(checkpoint, tmp_path, *options)) == 0
    assert "3 of 3 images" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["frames"]["indices"] == [0, 1, 2]
    assert result["notes"] == ["2 of 3 images scaled into 84 x 56 pixels with black bars"]


def test_scenes_from_the_command_line(checkpoint: str, tmp_path: Path) -> None:
    colours = np.repeat(np.array([0, 250, 90, 180]), [2, 20, 2, 16]).astype(np.uint8)
    write_video(tmp_path / "clip.mp4", np.broadcast_to(colours[:, None, None, None], (40, 56, 84, 3)).copy(), fps=8)
    options = ("--sampling", "scene", "--max-frames", "4", "--max-new-tokens", "1", "--timeout", "60")
    assert cli.main(_run(checkpoint, tmp_path, *options)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["frames"]["indices"] == [1, 12, 23, 32]
