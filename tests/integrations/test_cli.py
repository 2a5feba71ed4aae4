"""The commands as a user runs them, in a process of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from videoanchor_triton.anchor import memory
from videoanchor_triton.integrations import cli
from videoanchor_triton.integrations import demo as demo_of_the_package
from videoanchor_triton.integrations.commands import shared
from videoanchor_triton.integrations.video.reader import write_video
from videoanchor_triton.integrations.viz import contact_sheet

ROOT = Path(__file__).resolve().parents[2]


def videoanchor(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "videoanchor_triton.integrations.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = videoanchor("demo", "--out", folder / "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_demo_shows_what_it_made(demo: tuple[Path, str]) -> None:
    folder, shown = demo
    assert {path.name for path in folder.iterdir()} == {
        "anchors.png",
        "anchors.safetensors",
        "cameras.json",
        "checkpoint",
        "clip.mp4",
        "result.json",
    }
    assert str(folder / "anchors.png") in shown
    for word in ("answer", "scores", "seconds", "kernels", "camera"):
        assert word in shown


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_demo_compares_the_kernels_with_the_reference(demo: tuple[Path, str], backend: str) -> None:
    line = next(line for line in demo[1].splitlines() if line.split()[:1] == [backend])
    assert float(line.split()[1]) < 1e-4


def test_demo_result_file(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    result = json.loads((folder / "result.json").read_text())
    assert result["config"]["alpha_k"] == 9.5
    assert result["tokens"]["generated"] > 0
    assert result["ssc"]["converged"] is True
    for stage in ("decode_video", "load_model", "vision", "ssc", "prefill", "decode", "decode_per_token", "generate"):
        assert result["seconds"][stage] > 0
    grid = result["grid"]
    n_tokens = grid["t"] * grid["h"] * grid["w"] + grid["n_extra"]
    assert result["tokens"]["visual"] == n_tokens
    tensors = load_file(folder / "anchors.safetensors")
    assert tensors["scores"].shape == tensors["labels"].shape == (n_tokens,)
    assert tensors["scores"].dtype == np.float32
    assert (tensors["scores"].min(), tensors["scores"].max()) == pytest.approx((0, 1), abs=1e-5)
    assert 2 <= len(np.unique(tensors["labels"])) <= 24
    assert tensors["grid"].tolist() == [grid["t"], grid["h"], grid["w"]]
    np.testing.assert_allclose(tensors["timestamps"], result["frames"]["timestamps"])
    np.testing.assert_allclose(tensors["timestamps"], tensors["frame_indices"] / 8, atol=1e-6)


def test_demo_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(calls: list[Any], backend: str, _progress: Any) -> Any:
        if backend == "triton":
            raise ValueError("no GPU")
        return 1e-6, float(len(calls))

    monkeypatch.setattr(demo_of_the_package, "compare_with_reference", refused)
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["video"] == str(tmp_path / "out" / "clip.mp4")
    assert shown["kernels"]["triton"] == {"refused": "no GPU"}
    assert shown["kernels"]["sdpa"]["error"] == 1e-6
    assert 0 <= shown["camera"]["agree"] <= 1


def test_demo_picture(demo: tuple[Path, str]) -> None:
    from PIL import Image

    with Image.open(demo[0] / "anchors.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_run_again_on_the_demo_checkpoint(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = demo
    arguments = ("run", "--model", folder / "checkpoint", "--video", folder / "clip.mp4", "--question", "What is left?")
    options = ("--preset", "internvl2-8b", "--fps", "1", "--max-new-tokens", "3", "--scorer", "kmeans", "--json")
    done = videoanchor(*arguments, *options, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["question"] == "What is left?"
    assert result["config"]["scorer"] == "kmeans"
    assert len(result["frames"]["timestamps"]) == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.json", "anchors.safetensors", "anchors.png"}


GATE = ("--alpha-k", "9.5", "--alpha-v", "2.5")


def test_run_with_a_solver_of_ones_choice(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = demo
    arguments = ("run", "--model", folder / "checkpoint", "--video", folder / "clip.mp4", "--question", "What is left?")
    solver = ("--algorithm", "blocked", "--tol", "0.05", "--memory-budget", "0.5", "--n-clusters", "auto")
    options = (*GATE, "--max-frames", "4", "--max-new-tokens", "1", "--json")
    done = videoanchor(*arguments, *options, *solver, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ssc"]["algorithm"] == "blocked"
    assert 0.001 < result["ssc"]["residual"] <= 0.05
    assert (result["config"]["n_clusters"], result["config"]["memory_budget"]) == ("auto", 2**29)
    refused = videoanchor(*arguments, *options, "--memory-budget", "0.001", "--out", tmp_path / "none", cwd=tmp_path)
    assert refused.returncode == 2
    assert "may use 0.001 GiB" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("--video", "missing.mp4", *GATE), "no video file at missing.mp4", id="missing-video"),
        pytest.param(("--video", "broken.mp4", *GATE), "cannot be read as a video", id="broken-video"),
        pytest.param(("--video", "clip.mp4"), "--alpha-k and --alpha-v", id="no-alphas"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "1"), "--alpha-k and --alpha-v", id="one-alpha"),
        pytest.param(("--video", "clip.mp4", "--preset", "gpt"), "internvl2-8b", id="unknown-preset"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "-1", "--alpha-v", "1"), "alpha_k", id="negative-alpha"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "nan", "--alpha-v", "1"), "alpha_k", id="alpha-nan"),
        pytest.param(("--video", "clip.mp4", *GATE, "--max-frames", "0"), "max_frames", id="no-frames"),
        pytest.param(("--video", "clip.mp4", *GATE, "--fps", "-2"), "fps", id="negative-fps"),
        pytest.param(("--video", "clip.mp4", *GATE, "--max-new-tokens", "0"), "--max-new-tokens", id="no-new-tokens"),
        pytest.param(("--video", "clip.mp4", *GATE, "--dtype", "int3"), "dtype", id="dtype"),
        pytest.param(("--video", "clip.mp4", *GATE, "--model", "nowhere"), "cannot be loaded", id="missing-model"),
        pytest.param(("--video", "clip.mp4", *GATE, "--model", "text"), "no visual tokens", id="text-model"),
        pytest.param(("--video", "clip.mp4", *GATE, "--out", "clip.mp4"), "is a file", id="out-is-a-file"),
        pytest.param(("--video", "clip.mp4", *GATE, "--max-new-tokens", "4090"), "lower --max-new-tokens", id="answer"),
        pytest.param(
            ("--video", "long.mp4", *GATE, "--max-frames", "48", "--max-new-tokens", "2000"),
            "try --max-frames 38",
            id="context",
        ),
        pytest.param(("--video", "clip.mp4", *GATE, "--n-clusters", "0"), "n_clusters", id="clusters"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    demo: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    write_video(tmp_path / "clip.mp4", np.zeros((8, 48, 64, 3), np.uint8), fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    (tmp_path / "long.mp4").symlink_to(demo[0] / "clip.mp4")
    if "text" in options:
        _save_text_model(tmp_path / "text")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--model", str(demo[0] / "checkpoint"), "--question", "?", "--out", "out", *options]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing may be left behind"


def test_wrong_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = videoanchor(
        "run", "--model", "m", "--video", "missing.mp4", "--question", "?", "--out", "out", *GATE, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["videoanchor run: no video file at missing.mp4: check the path"]
    assert list(tmp_path.iterdir()) == []


def _save_text_model(folder: Path) -> None:
    import transformers as hf

    config = hf.Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    hf.Qwen2ForCausalLM(config).save_pretrained(folder)


def test_too_many_tokens_for_the_memory(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With little memory left, the run says before the model works how to need less."""
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _device: 1000)
    monkeypatch.chdir(tmp_path)
    run = ("run", "--model", demo[0] / "checkpoint", "--video", demo[0] / "clip.mp4", "--question", "?", "--out", "out")
    assert cli.main([*map(str, run), *GATE]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1728 tokens" in line
    assert "--max-frames" in line
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_what_stood_there(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result.json").write_text("from before")

    def failing(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(contact_sheet, "draw", failing)
    run = (
        "run",
        "--model",
        demo[0] / "checkpoint",
        "--video",
        demo[0] / "clip.mp4",
        "--question",
        "?",
        "--out",
        tmp_path,
    )
    assert cli.main([*map(str, run), *GATE, "--max-frames", "2", "--max-new-tokens", "1", "--n-clusters", "4"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "from before"
    assert cli.main([*map(str, run[:-1]), str(tmp_path / "new"), *GATE, "--max-frames", "2", "--n-clusters", "4"]) == 1
    assert not (tmp_path / "new").exists()


def test_missing_extras_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: None if name == "matplotlib" else name)
    run = ("run", "--model", "m", "--video", "v.mp4", "--question", "?", "--out", tmp_path / "out")
    assert cli.main([*map(str, run), *GATE]) == 2
    line = capsys.readouterr().err
    assert line == "videoanchor run: missing matplotlib: pip install 'videoanchor-triton[video,viz]'\n"


def _copy_checkpoint(demo: Path, folder: Path) -> Path:
    return Path(shutil.copytree(demo / "checkpoint", folder))


def _run_on(checkpoint: Path, demo: Path, out: Path) -> list[str]:
    run = ("run", "--model", checkpoint, "--video", demo / "clip.mp4", "--question", "?", "--out", out)
    return [*map(str, run), *GATE]


def test_truncated_checkpoint(demo: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = _copy_checkpoint(demo[0], tmp_path / "checkpoint") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert cli.main([*_run_on(weights.parent, demo[0], tmp_path / "out")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


def test_weights_that_overflow(demo: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    weights = _copy_checkpoint(demo[0], tmp_path / "checkpoint") / "model.safetensors"
    tensors = load(weights)
    tensors["visual.patch_embed.proj.weight"][:] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert cli.main([*_run_on(weights.parent, demo[0], tmp_path / "out"), "--max-frames", "2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "X must be finite" in line
    assert "--dtype" in line
    assert not (tmp_path / "out").exists()


def test_info(tmp_path: Path) -> None:
    done = videoanchor("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("torch", "transformers", "triton", "sdpa", "reference"):
        assert word in done.stdout
    report = json.loads(videoanchor("info", "--json", cwd=tmp_path).stdout)
    assert {"triton", "sdpa", "reference"} <= report["devices"][0]["backends"].keys()
    assert report["versions"]["torch"] in done.stdout


@pytest.mark.parametrize("command", [(), ("demo",), ("run",), ("info",)])
def test_help(command: tuple[str, ...], tmp_path: Path) -> None:
    done = videoanchor(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "usage: videoanchor" in done.stdout
