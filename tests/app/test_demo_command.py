"""`videoanchor demo`: answers about a room scan, pictures, and the kernels beside a dense reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from videoanchor_triton.app import cli, room_scan_demo
from videoanchor_triton.app import demo as demo_of_the_package
from videoanchor_triton.app.room_scans import RoomScan


def test_demo_shows_what_it_made(demo: tuple[Path, str]) -> None:
    folder, shown = demo
    assert {path.name for path in folder.iterdir()} == {
        "anchors.png",
        "anchors.safetensors",
        "cameras.json",
        "checkpoint",
        "clip.mp4",
        "result.json",
        "scan",
        "viz.html",
    }
    assert str(folder / "viz.html") in shown
    for word in ("answer", "scores", "seconds", "kernels", "camera"):
        assert word in shown


def test_demo_answers_about_a_room_scan(demo: tuple[Path, str]) -> None:
    """All ten questions right without a gate; the table has the truth that the scan gives."""
    asked = RoomScan(room_scan_demo.SEED).questions()
    table = demo[1].splitlines()
    assert len(asked) == 10
    for one in asked:
        (row,) = [line for line in table if line.startswith(one.text)]
        assert row.removeprefix(one.text).split()[:2] == [one.answer, one.answer], row
    (right,) = [line for line in table if line.startswith("right ")]
    assert right.split()[1:4] == ["10", "of", "10"]
    assert len((demo[0] / "scan" / "questions.jsonl").read_text().splitlines()) == 10


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
    for stage in (
        "import",
        "checkpoint",
        "budget",
        "decode_video",
        "load_model",
        "vision",
        "ssc",
        "prefill",
        "decode",
        "decode_per_token",
        "generate",
    ):
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
    assert shown["scan"]["right"].keys() == room_scan_demo.GATES.keys()


def test_demo_picture(demo: tuple[Path, str]) -> None:
    from PIL import Image

    with Image.open(demo[0] / "anchors.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
