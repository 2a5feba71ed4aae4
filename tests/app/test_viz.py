"""`videoanchor viz` as a user runs it, on a run of the tiny checkpoint, with every number checked another way."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from viz_runs import N_FRAMES, N_SAMPLED, QUESTION, moving_pattern, rows_of

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.app import cli, demo, pipeline
from videoanchor_triton.app.video.reader import VideoClip, read_video, write_video

FIGURES = {"anchors.png", "subspaces.png", "affinity.png", "attention.png"}
TABLES = {"tokens.csv", "affinity.csv", "attention.csv"}
OVERLAYS = {"overlay_scores.mp4", "overlay_subspaces.mp4"}


@pytest.fixture(scope="module")
def by_hand(viz_run: Path) -> dict[str, Any]:
    """The run once more through the public pieces: its tokens, and the arguments of each attention of the prefill."""
    record = json.loads((viz_run / "result.json").read_text())
    scores = load_tensors(viz_run / "anchors.safetensors")["scores"]
    tokens = []

    def recorded(found: torch.Tensor) -> torch.Tensor:
        tokens.append(found.clone())
        return scores

    config = VideoAnchorConfig(**{**record["config"], "scorer": recorded})
    model, processor = pipeline.load(record["model"], "cpu")
    clip = read_video(record["video"], max_frames=N_SAMPLED)
    with demo.record_attention() as calls:
        pipeline.answer(model, processor, clip, record["question"], config, max_new_tokens=1)
    inputs, _ = pipeline.prepare(model, processor, clip, record["question"])
    visual = (inputs["input_ids"][0] == model.config.video_token_id).numpy()
    return {"tokens": tokens[0], "config": config, "calls": calls, "visual": visual}


def duration(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float((stream.duration or 0) * (stream.time_base or 0))


def decode(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [float(frame.time or 0) for frame in frames]


def test_everything_is_made(gallery: Path) -> None:
    assert {path.name for path in gallery.iterdir()} == FIGURES | TABLES | OVERLAYS | {"frames", "viz.html"}
    names = {f"{n:04d}_{kind}.png" for n in range(N_SAMPLED) for kind in ("scores", "subspaces")}
    assert {path.name for path in (gallery / "frames").iterdir()} == names


def test_table_against_the_tensors(viz_run: Path, gallery: Path) -> None:
    tensors = load_file(viz_run / "anchors.safetensors")
    rows = rows_of(gallery / "tokens.csv")
    t, h, w = tensors["grid"]
    assert len(rows) == t * h * w == len(tensors["scores"]) == 36
    for row, place in zip(rows, itertools.product(range(t), range(h), range(w)), strict=True):
        token, first = int(row["token"]), 2 * place[0]
        assert tuple(int(row[name]) for name in ("step", "row", "column")) == place
        assert np.float32(row["score"]) == tensors["scores"][token]
        assert int(row["label"]) == tensors["labels"][token]
        assert int(row["frame"]) == tensors["frame_indices"][first]
        assert float(row["time_s"]) == pytest.approx(tensors["timestamps"][first], abs=1e-6)


def test_affinity_against_a_dense_w(gallery: Path, by_hand: dict[str, Any]) -> None:
    config: VideoAnchorConfig = by_hand["config"]
    features = token_features(by_hand["tokens"].float(), config.pca_rank)
    dense = self_expression(features, config).to_dense().abs().double().numpy()
    t, per_step = 3, 12
    expected = np.array(
        [
            [dense[i * per_step : (i + 1) * per_step, j * per_step : (j + 1) * per_step].sum() for j in range(t)]
            for i in range(t)
        ]
    )
    found = np.zeros((t, t))
    for row in rows_of(gallery / "affinity.csv"):
        found[int(row["step"]), int(row["expressed_step"])] = float(row["share"])
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-6)
    assert not np.allclose(found, found.T, rtol=1e-2), "W is not symmetric, so a transposed matrix would be seen"


def test_attention_against_a_dense_softmax(gallery: Path, by_hand: dict[str, Any]) -> None:
    visual = by_hand["visual"]
    first = int(np.flatnonzero(visual)[-1]) + 1
    calls = [call for call in by_hand["calls"] if call.q.shape[2] > 1]
    found = {(row["layer"], row["head"]): row for row in rows_of(gallery / "attention.csv")}
    heads, means = calls[0].q.shape[1], []
    assert len(found) == len(calls) * (heads + 1)
    for layer, call in enumerate(calls):
        q, k = call.q[0].double(), call.k[0].double().repeat_interleave(heads // call.k.shape[1], 0)
        logits = q @ k.transpose(-1, -2) * call.options["scale"]
        logits.masked_fill_(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        gamma = call.options["log_gamma_k"][0].double().exp()
        for column, gate in (("share_before_gate", torch.ones(len(visual))), ("share_after_gate", gamma)):
            weights = (logits + gate.log()).softmax(-1)
            expected = weights[:, first:, torch.from_numpy(visual)].sum(-1).mean(-1).numpy()
            shares = [float(found[str(layer), str(head)][column]) for head in range(heads)]
            np.testing.assert_allclose(shares, expected, atol=2e-6)
            assert float(found[str(layer), "mean"][column]) == pytest.approx(expected.mean(), abs=2e-6)
            means.append(expected.mean())
    before, after = np.array(means).reshape(-1, 2).T
    assert (after > before + 1e-3).all()


def _expected_colours(viz_run: Path, kind: str) -> np.ndarray:
    """(t, h, w, 4) colours as the palette says, with the labels in order of their size, and their weights."""
    from matplotlib import colormaps

    from videoanchor_triton.app.viz.palette import COLOURS

    tensors = load_file(viz_run / "anchors.safetensors")
    shape = tuple(tensors["grid"])
    if kind == "scores":
        scores = tensors["scores"].reshape(shape)
        return np.concatenate([255 * colormaps["viridis"](scores)[..., :3], 0.8 * scores[..., None]], -1)
    by_size = sorted(set(tensors["labels"].tolist()), key=lambda label: (-(tensors["labels"] == label).sum(), label))
    colours = [COLOURS[by_size.index(label)] for label in tensors["labels"]]
    return np.array([[*(int(colour[i : i + 2], 16) for i in (1, 3, 5)), 0.62] for colour in colours]).reshape(*shape, 4)


def _check_colours(picture: np.ndarray, colours: np.ndarray, source: np.ndarray, kind: str, tolerance: float) -> None:
    """On the left the frame; on the right the middle of each cell of one step: its colour, over the frame, for
    subspaces in grey."""
    h, w = colours.shape[:2]
    left, picture = np.split(picture, 2, 1)
    times = picture.shape[1] // source.shape[1]
    large = source.repeat(times, 0).repeat(times, 1).astype(float)
    assert np.abs(left[: len(large)] - large).mean() < tolerance
    cell_h, cell_w = source.shape[0] * times // h, source.shape[1] * times // w
    for row, column in itertools.product(range(h), range(w)):
        y, x = row * cell_h + cell_h // 2, column * cell_w + cell_w // 2
        near = slice(y - 2, y + 3), slice(x - 2, x + 3)
        under = large[near].mean((0, 1))
        if kind == "subspaces":
            under = 127.5 + 0.7 * (under.mean() - 127.5)
        *colour, weight = colours[row, column]
        expected = weight * np.array(colour) + (1 - weight) * under
        np.testing.assert_allclose(picture[near].mean((0, 1)), expected, atol=tolerance)


@pytest.mark.parametrize("kind", ["scores", "subspaces"])
def test_overlay_of_the_sampled_frames(viz_run: Path, gallery: Path, kind: str) -> None:
    colours = _expected_colours(viz_run, kind)
    clip = read_video(viz_run.parent / "clip.mp4", max_frames=N_SAMPLED)
    pictures, times = decode(gallery / f"overlay_{kind}.mp4")
    assert len(pictures) == N_SAMPLED
    np.testing.assert_allclose(times, np.arange(N_SAMPLED) / 4, atol=1e-3)
    assert duration(gallery / f"overlay_{kind}.mp4") == pytest.approx(N_SAMPLED / 4), "the last is shown as long"
    for n, (picture, source) in enumerate(zip(pictures, clip.frames, strict=True)):
        assert picture.shape[1] == 2 * 560
        _check_colours(picture, colours[n // 2], source, kind, tolerance=8)


@pytest.mark.parametrize("kind", ["scores", "subspaces"])
def test_single_frames(viz_run: Path, gallery: Path, kind: str) -> None:
    from PIL import Image

    colours = _expected_colours(viz_run, kind)
    clip = read_video(viz_run.parent / "clip.mp4", max_frames=N_SAMPLED)
    for n, source in enumerate(clip.frames):
        with Image.open(gallery / "frames" / f"{n:04d}_{kind}.png") as picture:
            _check_colours(np.asarray(picture), colours[n // 2], source, kind, tolerance=1.5)


@pytest.fixture
def nothing_is_decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes videos and opens images may only run in the child, which has its own."""

    def refused(*_: object) -> Any:
        raise AssertionError("a video is decoded in the main process")

    monkeypatch.setattr("videoanchor_triton.app.video.decoding.VideoFile", refused)
    monkeypatch.setattr("videoanchor_triton.app.video.views.read_views", refused)


@pytest.mark.usefixtures("nothing_is_decoded_here")
def test_overlay_of_all_frames(viz_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every frame of the video, when it is shown there, with the tokens of the sampled frame nearest in time."""
    arguments = ["viz", str(viz_run), "--what", "overlay", "--all-frames", "--out", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert {Path(path).name for path in report["files"]} == OVERLAYS == {path.name for path in tmp_path.iterdir()}
    clip = read_video(viz_run.parent / "clip.mp4", max_frames=N_FRAMES)
    sampled = load_file(viz_run / "anchors.safetensors")["timestamps"]
    colours = _expected_colours(viz_run, "subspaces")
    pictures, times = decode(tmp_path / "overlay_subspaces.mp4")
    np.testing.assert_allclose(times, clip.timestamps, atol=1e-3)
    for picture, seconds, source in zip(pictures, clip.timestamps, clip.frames, strict=True):
        step = int(np.abs(sampled - seconds).argmin()) // 2
        _check_colours(picture, colours[step], source, "subspaces", tolerance=8)


def test_report(viz_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["viz", str(viz_run), "--what", "attention,affinity", "--out", str(tmp_path), "--format", "pdf"]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {"attention.pdf", "attention.csv", "affinity.pdf", "affinity.csv"}
    assert {Path(path).name for path in report["files"]} == names == {path.name for path in tmp_path.iterdir()}
    for name in ("attention.pdf", "affinity.pdf"):
        assert (tmp_path / name).read_bytes().startswith(b"%PDF")
    attention = [row for row in rows_of(tmp_path / "attention.csv") if row["head"] == "mean"]
    assert report["attention"]["layers"] == len(attention) == 4
    mean = np.mean([float(row["share_after_gate"]) for row in attention])
    assert report["attention"]["share_after_gate"] == pytest.approx(mean, abs=1e-9)
    rows = rows_of(tmp_path / "affinity.csv")
    between = sum(float(row["share"]) for row in rows if row["step"] != row["expressed_step"])
    assert report["affinity"]["between_steps"] == pytest.approx(between, abs=1e-9)
    assert report["affinity"]["largest_difference_to_recorded_scores"] < 1e-4


@pytest.mark.usefixtures("nothing_is_decoded_here")
def test_default_needs_no_model(viz_run: Path, tmp_path: Path) -> None:
    """Beside the run, without its model, and with the video elsewhere."""
    moved = Path(shutil.copytree(viz_run, tmp_path / "run"))
    record = json.loads((moved / "result.json").read_text())
    record |= {"model": "gone", "video": "gone.mp4"}
    (moved / "result.json").write_text(json.dumps(record))
    assert cli.main(["viz", str(moved), "--what", "csv"]) == 0
    assert cli.main(["viz", str(moved), "--video", str(viz_run.parent / "clip.mp4")]) == 0
    made = {"anchors.png", "subspaces.png", "tokens.csv", "viz.html"} | OVERLAYS
    assert {path.name for path in (moved / "viz").iterdir()} == made


def test_nearest_neighbours_are_the_affinity_of_their_run(
    viz_run: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = json.loads((viz_run / "result.json").read_text())
    files = ("run", "--model", run["model"], "--video", run["video"], "--question", QUESTION, "--out", tmp_path / "run")
    gate = ("--alpha-k", "9.5", "--alpha-v", "2.5", "--n-clusters", "4", "--scorer", "knn")
    assert cli.main([*map(str, files), *gate, "--max-frames", str(N_SAMPLED), "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["viz", str(tmp_path / "run"), "--what", "affinity", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["affinity"]["largest_difference_to_recorded_scores"] < 1e-6
    assert not np.allclose(
        [float(row["share"]) for row in rows_of(tmp_path / "run" / "viz" / "affinity.csv")],
        [float(row["share"]) for row in rows_of(gallery / "affinity.csv")],
        atol=1e-3,
    ), "self-expression would be another picture"


def test_a_run_of_other_settings_says_what_to_do(
    viz_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(viz_run, tmp_path / "run"))
    record = json.loads((moved / "result.json").read_text())
    record["config"]["algorithm"] = "dense"
    (moved / "result.json").write_text(json.dumps(record))
    assert cli.main(["viz", str(moved), "--what", "affinity"]) == 2
    (*_, line) = capsys.readouterr().err.splitlines()
    assert "config cannot be read" in line
    assert "'algorithm'" in line
    assert line.endswith("run `videoanchor run` again")


def test_another_model_is_told(viz_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(viz_run.parent / "checkpoint", tmp_path / "other")) / "model.safetensors"
    weights = load_tensors(other)
    patches = "visual.patch_embed.proj.weight"
    weights[patches] = weights[patches].flip(0)
    save_file(weights, other, metadata={"format": "pt"})
    command = ["viz", str(viz_run), "--what", "affinity", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--model", str(other.parent)]) == 0
    assert "differ by up to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("nowhere",), "nowhere has no result.json", id="no-run"),
        pytest.param(("run", "--what", "sheet,cake"), "--what: expected some of sheet, montage", id="what"),
        pytest.param(("run", "--what", ""), "--what: expected some of", id="nothing"),
        pytest.param(("run", "--what", "csv", "--all-frames"), "--all-frames", id="all-frames"),
        pytest.param(("run", "--video", "gone.mp4"), "no video at gone.mp4", id="video-gone"),
        pytest.param(("run", "--video", "other.mp4"), "it is another video", id="another-video"),
        pytest.param(
            ("run", "--video", "other.mp4", "--what", "overlay", "--all-frames"),
            "it is another video",
            id="another-video-all-frames",
        ),
        pytest.param(("run", "--video", "broken.mp4"), "cannot be read as a video", id="broken-video"),
        pytest.param(("run", "--video", "damaged.mp4"), "of the run's frames cannot be decoded", id="damaged-video"),
        pytest.param(("run", "--timeout", "0"), "timeout: expected a positive number", id="timeout"),
        pytest.param(
            ("run", "--timeout", "-1", "--what", "overlay", "--all-frames"),
            "timeout: expected a positive number",
            id="timeout-all-frames",
        ),
        pytest.param(("moved",), "is no longer at moved.mp4: give --video", id="video-moved"),
        pytest.param(("run", "--what", "affinity", "--model", "./gone"), "no such folder", id="model"),
        pytest.param(("run", "--out", "broken.mp4"), "is a file", id="out-is-a-file"),
        pytest.param(("mixed",), "files are of different runs", id="mixed"),
        pytest.param(("cut",), "cannot be read as a finished run", id="cut"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    viz_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    write_video(tmp_path / "other.mp4", moving_pattern(4, 84, 112), fps=4)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    damaged = bytearray((viz_run.parent / "clip.mp4").read_bytes())
    end = damaged.index(b"moov")
    damaged[end - 2000 : end] = bytes(2000)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    for name in ("run", "moved", "mixed", "cut"):
        shutil.copytree(viz_run, tmp_path / name)
    record = json.loads((viz_run / "result.json").read_text())
    (tmp_path / "moved" / "result.json").write_text(json.dumps({**record, "video": "moved.mp4"}))
    grid = {**record["grid"], "row_newlines": True}
    (tmp_path / "mixed" / "result.json").write_text(json.dumps({**record, "grid": grid}))
    (tmp_path / "cut" / "anchors.safetensors").write_bytes(b"\x10")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["viz", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "run").glob("viz/*"))


def test_other_visual_tokens_are_refused(
    viz_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = pipeline.prepare

    def fewer(model: Any, processor: Any, clips: list[VideoClip], question: str) -> Any:
        return half(model, processor, [replace(clip, frames=clip.frames[:2]) for clip in clips], question)

    monkeypatch.setattr(pipeline, "prepare", fewer)
    assert cli.main(["viz", str(viz_run), "--what", "attention", "--out", str(tmp_path)]) == 2
    assert "makes 12 visual tokens of this video, the run had 36" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_figure_alone(viz_run: Path, tmp_path: Path) -> None:
    assert cli.main(["viz", str(viz_run), "--what", "attention", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"attention.png", "attention.csv"}


def test_what_was_finished_stays(viz_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(path: Path, *_args: Any, **_options: Any) -> None:
        path.write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("videoanchor_triton.app.viz.overlay.write_video", stopped)
    (tmp_path / "overlay_scores.mp4").write_text("from before")
    assert cli.main(["viz", str(viz_run), "--what", "sheet,overlay", "--out", str(tmp_path)]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"anchors.png", "overlay_scores.mp4"}
    assert (tmp_path / "overlay_scores.mp4").read_text() == "from before"
