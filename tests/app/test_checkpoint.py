"""Checkpoints that are refused before they do harm: foreign code, names of the hub, broken weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import GATE, run_arguments
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from videoanchor_triton.app import checkpoint, cli, pipeline
from videoanchor_triton.integrations.errors import InputError


def _foreign(demo: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The checkpoint with another config.json, and code that leaves a trace in every file that could be run."""
    shutil.copytree(demo / "checkpoint", folder)
    for name in ("evil.py", *changes.get("files", ())):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(folder / 'EVIL')!r}, 'w')")
    auto = ("Config", "Model", "ModelForImageTextToText", "Processor", "Tokenizer", "ImageProcessor", "VideoProcessor")
    for file in folder.glob("*config.json"):
        values = json.loads(file.read_text())
        values["auto_map"] = {f"Auto{name}": f"evil.{name}" for name in auto}
        values |= {name: value for name, value in changes.items() if name in values}
        file.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"model_type": "internvl_chat"}, "videoanchor convert foreign --out foreign-hf", id="internvl"),
        pytest.param({"model_type": "llava_qwen"}, "videoanchor convert foreign --out foreign-hf", id="llava-video"),
        pytest.param({"model_type": "my_vlm"}, "needs Python code of its own", id="unknown-model"),
        pytest.param({"processor_class": "MyProcessor"}, "needs Python code of its own", id="unknown-processor"),
        pytest.param({"vision_config": {"attn_implementation": "a/b"}}, "code of the hub", id="kernel"),
        pytest.param({"files": ["custom_generate/generate.py"]}, "custom_generate", id="generate"),
        pytest.param({}, None, id="known-to-transformers"),
    ],
)
def test_code_of_a_repository_is_never_run(
    demo: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str | None,
) -> None:
    folder = _foreign(demo[0], tmp_path / "foreign", changes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    monkeypatch.chdir(tmp_path)
    code = cli.main(run_arguments(demo[0], Path("out"), "--model", "foreign"))
    shown = capsys.readouterr().err
    assert not (folder / "EVIL").exists()
    if message is None:
        assert code == 0
    else:
        assert code == 2
        assert message in shown.splitlines()[-1]
        assert "clip.mp4" not in shown, "the video is read after the checkpoint"
        shutil.copytree(demo[0], "done", ignore=shutil.ignore_patterns("checkpoint"))
        assert cli.main(["viz", "done", "--what", "sheet,attention", "--model", "foreign"]) == 2
        assert not Path("done/viz").exists()


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (RepositoryNotFoundError, "no such name on the hub"),
        (GatedRepoError, "hf auth login"),
        (EntryNotFoundError, "has no config.json"),
        (LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_names_of_the_hub(cause: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError("three\nlong\nlines") from cause.__new__(cause)

    monkeypatch.setattr(checkpoint, "cached_file", failing)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.read_config("someone/model")
    assert "\n" not in str(caught.value)


def test_a_published_format_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
    monkeypatch.setattr(checkpoint, "cached_file", lambda *_: str(tmp_path / "config.json"))
    command = "hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B && videoanchor convert InternVL2-8B --out "
    with pytest.raises(InputError, match=command):
        checkpoint.read_config("OpenGVLab/InternVL2-8B")


def test_the_revision_of_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--org--name" / "snapshots" / "0123abcd" / "config.json"
    monkeypatch.setattr(checkpoint, "cached_file", lambda *_: str(cached))
    assert checkpoint.revision_of("org/name") == "0123abcd"
    assert checkpoint.revision_of(str(tmp_path)) is None


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


@pytest.mark.parametrize(
    ("able", "dtype", "warns"),
    [
        ({"architecture": "x86_64", "avx2": True}, "bfloat16", True),
        ({"architecture": "x86_64", "avx512_bf16": True}, "float16", True),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bfloat16", False),
        ({"architecture": "x86_64", "amx_fp16": True}, "float16", False),
        ({"architecture": "x86_64", "avx2": True}, "float32", False),
        ({"architecture": "aarch64"}, "bfloat16", False),
        (None, "bfloat16", False),
    ],
)
def test_a_dtype_that_is_slow_on_this_cpu_is_warned_of(
    demo: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    able: dict[str, Any] | None,
    dtype: str,
    warns: bool,
) -> None:
    if able is None:  # an older torch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    pipeline.load(str(demo[0] / "checkpoint"), "cpu", dtype)
    assert [f"no instructions for {dtype}" in said.message for said in caplog.records] == [True] * warns
