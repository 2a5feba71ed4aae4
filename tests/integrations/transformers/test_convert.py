"""`videoanchor convert`: the files that it reads and writes, and a run on what it wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import original_models as original
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_models_original import SIZE, edit, internvl, llava, refused

from videoanchor_triton.app import cli
from videoanchor_triton.app.video.reader import write_video
from videoanchor_triton.integrations.transformers.convert.conversion import convert_checkpoint
from videoanchor_triton.integrations.transformers.convert.llava import VISION_TOWERS


@pytest.fixture(autouse=True)
def _tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VISION_TOWERS, "tiny", original.TOWER)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    internvl(tmp_path / "source", n_shards=2)
    return tmp_path / "source"


def test_shards_keep_their_places_and_bytes(tmp_path: Path) -> None:
    internvl(tmp_path / "one")
    internvl(tmp_path / "three", n_shards=3)
    seen: list[tuple[str, int, int]] = []
    one = convert_checkpoint(tmp_path / "one", tmp_path / "a")
    three = convert_checkpoint(tmp_path / "three", tmp_path / "b", progress=lambda *step: seen.append(step))
    assert (one.n_shards, three.n_shards) == (1, 3)
    assert seen == [("weights", i, 3) for i in range(3)]
    whole = load_file(tmp_path / "a" / "model.safetensors")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    parts = {name: load_file(tmp_path / "b" / name) for name in sorted(set(index["weight_map"].values()))}
    assert index["weight_map"].keys() == whole.keys()
    assert len(parts) == 3
    for key, name in index["weight_map"].items():
        assert torch.equal(parts[name][key], whole[key])
    assert index["metadata"]["total_size"] == one.n_bytes == three.n_bytes
    assert one.n_bytes == sum(tensor.nbytes for tensor in whole.values())


def test_dtype_of_the_weights_is_kept(tmp_path: Path) -> None:
    internvl(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    original.write_weights(tmp_path / "source", {key: value.bfloat16() for key, value in state.items()})
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert report.n_bytes == sum(tensor.nbytes for tensor in weights.values())


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    llava(tmp_path / "source", original.llava_config(), n_shards=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_run_asks_a_converted_model(kind: str, tmp_path: Path) -> None:
    """Processor, prompt, `enable` and generate, as for any checkpoint."""
    if kind == "internvl":
        internvl(tmp_path / "source", original.internvl_config(max_position_embeddings=2048))
    else:
        llava(tmp_path / "source", original.llava_config(max_position_embeddings=2048))
    assert cli.main(["convert", str(tmp_path / "source"), "--out", str(tmp_path / "model")]) == 0
    frames = np.random.default_rng(0).integers(0, 255, (8, 24, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, fps=4)
    arguments = ["run", "--model", tmp_path / "model", "--video", tmp_path / "clip.mp4", "--out", tmp_path / "out"]
    options = ["--question", "word5", "--alpha-k", "2", "--alpha-v", "1", "--max-frames", "4"]
    assert cli.main([*map(str, arguments), *options, "--n-clusters", "3", "--max-new-tokens", "2"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    side, newlines = (2, False) if kind == "internvl" else (3, True)
    assert result["grid"] == {"t": 4, "h": side, "w": side, "n_extra": 0, "row_newlines": newlines}
    assert result["tokens"]["visual"] == 4 * side * (side + newlines)


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_frames_are_normalised_as_in_the_original(kind: str, tmp_path: Path) -> None:
    if kind == "internvl":
        internvl(tmp_path / "source")
        key, mean, std, size = "pixel_values", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], SIZE
    else:
        llava(tmp_path / "source", original.llava_config())
        key, mean, std, size = "pixel_values_videos", [0.5] * 3, [0.5] * 3, 20
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    frames = torch.full((1, 3, 24, 32), 51, dtype=torch.uint8)
    inputs = processor(text=["<video>\nword1"], videos=[frames], do_sample_frames=False, return_tensors="pt")
    values = inputs[key].reshape(3, -1)
    assert values.shape[1] == size * size
    expected = (0.2 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(values, expected[:, None].expand_as(values), atol=1e-5, rtol=0)
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    visual = "Frame1: <img>" + "<IMG_CONTEXT>" * 4 + "</img>" if kind == "internvl" else "<video>" * 10
    assert f"{visual}\nword1" in prompt


def test_pickles_are_not_read(source: Path, tmp_path: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(source, tmp_path / "out", "pickled weights")
    (source / "pytorch_model.bin").unlink()
    refused(source, tmp_path / "out", "no model.safetensors")


def test_truncated_shard(source: Path, tmp_path: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    refused(source, tmp_path / "out", "damaged or cut short")


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    sorted(source.glob("*.safetensors"))[1].unlink()
    refused(source, tmp_path / "out", "the download is not whole")


def test_index_lists_a_tensor_that_is_nowhere(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(iter(index.values()))
    edit(source / "model.safetensors.index.json", weight_map={**index, "somewhere.weight": name})
    refused(source, tmp_path / "out", r"no shard holds \(somewhere.weight\)")


def test_index_does_not_lead_outside_the_folder(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    moved = {key: "../elsewhere.safetensors" if name == shard.name else name for key, name in index.items()}
    edit(source / "model.safetensors.index.json", weight_map=moved)
    refused(source, tmp_path / "out", "which is not in")


def test_no_checkpoint_and_a_full_output(source: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path / "out", "no config.json there")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refused(source, tmp_path / "full", "there is something already")
    (source / "config.json").write_text("[1")
    refused(source, tmp_path / "out", "not a JSON object")


def test_a_failure_while_writing_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fail(_stage: str, done: int, _total: int) -> None:
        if done:
            raise OSError("disk full")

    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(source, tmp_path / "out", progress=fail)
    assert set(tmp_path.iterdir()) == before


def test_an_empty_folder_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_modes_are_those_of_new_files(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "folder" / "file").stat().st_mode}


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    for word in ("InternLM2ForCausalLM", "InternVLForConditionalGeneration", str(tmp_path / "a")):
        assert word in shown
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_shards"] == 2
    assert report["out"] == str(tmp_path / "b")
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "a")]) == 2
    assert "there is something already" in capsys.readouterr().err


def test_neither_code_nor_pickles_are_opened(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", fail)
    (source / "modeling_internvl_chat.py").write_text("raise SystemExit('code of the checkpoint ran')")
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    edit(source / "config.json", auto_map={"AutoConfig": "modeling_internvl_chat.X"})
    convert_checkpoint(source, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.endswith((".py", ".bin")) for name in written)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text()
