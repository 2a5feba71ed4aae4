"""Several videos and images in one prompt: what `run` says of them, its page and its pictures."""

import hashlib
import html
import itertools
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, needs_browser
from PIL import Image
from safetensors.numpy import load_file
from several_videos import CONFIG, GATE, SIZE
from tiny_models_checkpoint import save_checkpoint

import videoanchor_triton as va
from videoanchor_triton.anchor.solver import SelfExpression
from videoanchor_triton.app import cli, pipeline
from videoanchor_triton.app.budget import Planner
from videoanchor_triton.app.output import draw_run
from videoanchor_triton.app.prompt import place
from videoanchor_triton.app.room_scan_demo import SEED
from videoanchor_triton.app.room_scans import CHECKPOINT, COLOURS, FPS, SHAPES, RoomScan
from videoanchor_triton.app.text import asked
from videoanchor_triton.app.token_grid import JoinedGrid, TokenGrid, joined
from videoanchor_triton.app.video.reader import VideoClip, read_video
from videoanchor_triton.app.viz.finished_run import read_run
from videoanchor_triton.app.viz.run_page import strongest_links
from videoanchor_triton.integrations.errors import InputError


def run(several: Path, out: Path, *options: Any, videos: Sequence[str] = ("b.mp4", "view.png", "short.mp4")) -> int:
    command = ["run", "--model", several / "checkpoint", "--video", *(several / video for video in videos)]
    return cli.main([*map(str, (*command, "--question", "Which?", "--out", out, *GATE, *SIZE, *options))])


@pytest.fixture(scope="module")
def finished(several: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert run(several, out, "--json", "--system", "Be short.") == 0
    return out


def test_run_is_ask(several: Path, loaded_several: tuple[Any, Any], finished: Path) -> None:
    """With an image as an image: the same answer, scores and grids, the record's lists in the order of the prompt."""
    model, _ = loaded_several
    clips = [read_video(several / name, max_frames=4) for name in ("b.mp4", "short.mp4")]
    image = Image.open(several / "view.png")
    entries = [{"type": "video"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "Which?"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]}, {"role": "user", "content": entries}
    ]  # fmt: skip
    expected = va.ask(model, [clips[0], image, clips[1]], messages, CONFIG, max_new_tokens=3)
    record = json.loads((finished / "result.json").read_text())
    assert (record["answer"], record["tokens"]["prompt"]) == (expected.text, expected.n_prompt_tokens)
    assert record["video"] == [str(several / name) for name in ("b.mp4", "view.png", "short.mp4")]
    assert record["sha256"] == [None] * 3
    assert [TokenGrid(**grid) for grid in record["grid"]] == expected.grids
    assert [(grid.t, grid.h, grid.w) for grid in expected.grids] == [(2, 6, 2), (1, 4, 6), (1, 3, 4)]
    assert [len(frames["indices"]) for frames in record["frames"]] == [4, 1, 2]
    assert record["budget"]["n_visual_tokens"] == 24 + 24 + 12
    tensors = load_file(finished / "anchors.safetensors")
    np.testing.assert_array_equal(tensors["scores"], expected.anchor.scores.numpy())
    assert tensors["grid"].tolist() == [[2, 6, 2], [1, 4, 6], [1, 3, 4]]
    assert tensors["timestamps"].tolist() == [*clips[0].timestamps, 0.0, *clips[1].timestamps]


@pytest.mark.parametrize("system", [None, "Be short."])
def test_an_image_is_an_image_beside_others(several: Path, system: str | None) -> None:
    """Also one that is read as a clip; alone, and as a several of two views, it is a video."""
    video, image = (read_video(several / name, max_frames=2) for name in ("a.mp4", "view.png"))
    views = read_video([several / "view.png", several / "view.png"])
    for media, kinds in (
        ([video, image, views, image], ["video", "image", "video", "image"]),
        ([image, image], ["image", "image"]),
        ([image], ["video"]),
        (image, ["video"]),
    ):
        items, messages = place(media, asked("Which?", system))
        entries = messages[-1]["content"]
        assert entries == [*({"type": kind} for kind in kinds), {"type": "text", "text": "Which?"}]
        assert ["video" if isinstance(item, VideoClip) else "image" for item in items] == kinds
    (clip,) = items
    assert isinstance(clip, VideoClip)
    np.testing.assert_array_equal(clip.frames[0], np.asarray(Image.open(several / "view.png")))


def test_the_order_of_the_prompt_is_that_of_the_paths(several: Path, tmp_path: Path) -> None:
    assert run(several, tmp_path, "--max-frames", "2", videos=("view.png", "b.mp4")) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert [(grid["t"], grid["h"], grid["w"]) for grid in record["grid"]] == [(1, 4, 6), (1, 6, 2)]


def test_one_video_is_as_it_was(several: Path, tmp_path: Path) -> None:
    """Text and objects, no lists; a single image is a video of one frame."""
    assert run(several, tmp_path, videos=["view.png"]) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["video"] == str(several / "view.png")
    assert record["grid"] == {"t": 1, "h": 4, "w": 6, "n_extra": 0, "row_newlines": False}
    assert load_file(tmp_path / "anchors.safetensors")["grid"].tolist() == [1, 4, 6]


def test_pictures_of_several(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in finished.iterdir()} >= {"anchors.png", "viz.html"}
    what = "sheet,montage,overlay,csv,page,frames,affinity,attention"
    assert cli.main(["viz", str(finished), "--what", what, "--out", str(tmp_path), "--device", "cpu"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"anchors.png", "subspaces.png", "overlay_scores.mp4", "viz.html", "frames", "affinity.png"}
    assert len([*(tmp_path / "frames").iterdir()]) == 2 * 7
    rows = [line.split(",") for line in (tmp_path / "tokens.csv").read_text().splitlines()[1:]]
    assert [row[-1] for row in rows] == ["1"] * 24 + ["2"] * 24 + ["3"] * 12
    assert [row[1] for row in rows] == ["0"] * 12 + ["1"] * 12 + ["2"] * 24 + ["3"] * 12
    assert max(int(row[4]) for row in rows[:24]) == 5, "the row in its own video"
    page = (tmp_path / "viz.html").read_text()
    times = json.loads((finished / "result.json").read_text())["frames"][0]["timestamps"]
    for text in ("1 b.mp4, 2 view.png, 3 short.mp4", "video 2", "sha256 of the video 3", f"1: {times[1]:.2f} s"):
        assert text in page
    assert cli.main(["viz", str(finished), "--all-frames", "--out", str(tmp_path / "all")]) == 2
    assert "--all-frames: this run is about several videos" in capsys.readouterr().err
    assert not (tmp_path / "all").exists(), "refused before a picture is drawn"


ACTS = """
const seen = {}, stage = document.getElementById("stage"), slider = document.getElementById("frame");
const ratio = () => { const box = stage.getBoundingClientRect(); return box.width / box.height; };
const at = frame => { slider.value = frame; slider.dispatchEvent(new Event("input")); };
seen.first = [document.getElementById("when").textContent, ratio()];
at(4);
seen.image = [document.getElementById("when").textContent, ratio()];
const box = stage.querySelector("canvas").getBoundingClientRect();
const [x, y] = [box.left + 0.9 * box.width, box.top + 0.9 * box.height];
stage.dispatchEvent(new MouseEvent("click", { clientX: x, clientY: y, bubbles: true }));
seen.token = document.getElementById("token").textContent;
seen.lit = [...document.querySelectorAll("#steps canvas")].map(canvas => {
  const { width, height } = canvas, found = canvas.getContext("2d").getImageData(0, 0, width, height).data, lit = [];
  for (let n = 0; n < width * height; n++) lit.push(found[4 * n] + found[4 * n + 1] + found[4 * n + 2] > 0);
  return lit;
});
const said = document.createElement("pre");
said.id = "said";
said.textContent = JSON.stringify(seen);
document.body.append(said);
"""


@needs_browser
def test_the_page_of_several(finished: Path, tmp_path: Path) -> None:
    """Each frame in its own shape, a token by its place in its own video, its subspace lit in all of them."""
    digest = b64encode(hashlib.sha256(ACTS.encode()).digest()).decode()
    text = (finished / "viz.html").read_text().replace("script-src ", f"script-src 'sha256-{digest}' ")
    (tmp_path / "viz.html").write_text(text.replace("</body>", f"<script>{ACTS}</script></body>"))
    done = chromium(tmp_path / "viz.html", "--dump-dom", "--window-size=1280,1600")
    assert "CONSOLE" not in done.stderr
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout)
    found, run = json.loads(html.unescape(said)), read_run(finished)
    assert found["first"] == [f"1: {run.timestamps[0]:.2f} s, frame 1 of 7", pytest.approx(56 / 168, rel=0.02)]
    assert found["image"] == ["2, frame 5 of 7", pytest.approx(168 / 112, rel=0.02)]
    tokens = run.grid.arrange(np.arange(60))  # (4, 6, 6)
    assert found["token"].startswith("Token at 2, row 4, column 6: score ")
    assert f"score {run.scores[tokens[2, 5, 5]]:.3f}" in found["token"]
    lit = run.grid.arrange(run.labels) == run.labels[tokens[2, 5, 5]]
    np.testing.assert_array_equal(np.reshape(found["lit"], lit.shape), lit)


def test_moved_videos_are_given_in_their_order(
    several: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["viz", str(finished), "--what", "sheet", "--out", str(tmp_path), "--video"]
    assert cli.main([*command, str(several / "b.mp4")]) == 2
    assert "--video: expected the 3 of the run, in their order, got 1" in capsys.readouterr().err
    assert cli.main([*command, *(str(several / name) for name in ("a.mp4", "view.png", "short.mp4"))]) == 2
    assert "video" in capsys.readouterr().err
    assert cli.main([*command, *(str(several / name) for name in ("b.mp4", "view.png", "short.mp4"))]) == 0


def test_grids_joined_for_pictures() -> None:
    """Each place shows a token of its own video, at the same part of its picture."""
    grids = [TokenGrid(2, 2, 3, n_extra=1), TokenGrid(1, 4, 2, row_newlines=True)]
    both, n_frames = joined(grids, [3, 1]), 4
    assert isinstance(both, JoinedGrid)
    assert (both.t, both.h, both.w, both.n_tokens) == (3, 4, 3, 13 + 12)
    tokens = both.arrange(np.arange(25))
    np.testing.assert_array_equal(tokens[:2], np.arange(12).reshape(2, 2, 3).repeat(2, 1))
    np.testing.assert_array_equal(tokens[2], [[13, 13, 14], [16, 16, 17], [19, 19, 20], [22, 22, 23]])
    places = both.places()
    assert places[12].tolist() == [-1, -1, -1]
    assert places[13:16].tolist() == [[2, 0, 0], [2, 0, 1], [2, 0, -1]]
    assert both.steps_of_frames(n_frames).tolist() == [0, 0, 1, 2]
    assert both.first_frames(n_frames).tolist() == [0, 2, 3]
    long = joined([TokenGrid(32, 1, 1), TokenGrid(1, 1, 1), TokenGrid(16, 1, 1)], [32, 1, 16])
    assert len(long.some_steps(8)) == 8
    assert {0, 31, 32, 33, 48} <= {*long.some_steps(8).tolist()}
    assert long.some_steps(2).tolist() == [0, 32, 33], "one of each at least"
    assert joined(grids[:1], [3]) is grids[0]
    with pytest.raises(InputError, match="not known of this model's images"):
        joined([grids[0], TokenGrid(0, 0, 0, 5)], [3, 1])


def test_links_lead_to_the_first_place_of_a_token() -> None:
    grid = joined([TokenGrid(1, 1, 1), TokenGrid(1, 2, 2)], [1, 1])  # token 0 fills the first four places
    indices = torch.tensor([[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]])
    values = torch.tensor([[0.5, 0.0], [0.2, 0.1], [0.1, 0.0], [0.3, 0.2], [0.0, 0.1]])
    found = strongest_links(SelfExpression(indices, values, torch.zeros(5), 1, 1e-3, 5), grid)
    cells = np.frombuffer(b64decode(found["cells"]), np.int32).reshape(8, 2)
    assert cells.tolist() == [[4, -1]] * 4 + [[0, 5], [0, -1], [0, 4], [4, -1]]


def test_pictures_need_places(several: Path, tmp_path: Path) -> None:
    """Where an image's tiles are not known, the answer is written, and one sentence says why there is no picture."""
    save_checkpoint("internvl", tmp_path / "internvl")
    command = ["run", "--model", tmp_path / "internvl", "--video", several / "a.mp4", several / "view.png"]
    assert cli.main([*map(str, (*command, "--question", "word3", "--out", tmp_path / "out", *GATE, *SIZE))]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.json", "anchors.safetensors"}
    with pytest.raises(InputError, match="not known of this model's images"):
        read_run(tmp_path / "out")


def test_fit_takes_fewer_frames_of_the_longer(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number is the largest that fits, for all of them alike."""
    clips = [read_video(several / name, max_frames=12) for name in ("a.mp4", "b.mp4", "short.mp4")]
    planner = Planner(str(several / "checkpoint"), CONFIG, max_new_tokens=3, device="cpu")
    whole = planner.budget(clips, "Which?")
    assert whole.n_frames == 8 + 12 + 2
    tokens = {n: planner.budget([clip.take(np.arange(min(n, len(clip.frames)))) for clip in clips], "Which?")
              for n in range(1, 13)}  # fmt: skip
    assert whole.context is not None
    planner._max_new_tokens = whole.context - tokens[7].n_prompt_tokens
    assert planner.budget(clips, "Which?").problem is not None
    best = max(n for n, one in tokens.items() if one.n_prompt_tokens <= tokens[7].n_prompt_tokens)
    assert planner.largest(clips, "Which?") == best
    n = whole.context - tokens[7].n_prompt_tokens
    options = ("--max-frames", "12", "--max-new-tokens", n)
    command = ["run", "--model", several / "checkpoint", "--video"]
    command += [several / name for name in ("a.mp4", "b.mp4", "short.mp4")]
    texts = [*map(str, (*command, "--question", "Which?", "--out", tmp_path, *GATE, *options, "--device", "cpu"))]
    assert cli.main(texts) == 2
    assert f"try --max-frames {best}" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(3))
def test_a_trained_model_sees_both_videos(number: int) -> None:
    """What is in the first, in the second and in neither, though no prompt of its training had two videos."""
    model, processor = pipeline.load(str(CHECKPOINT), "cpu", "float32")
    scans = [RoomScan(SEED + number), RoomScan(SEED + number + 5)]
    clips = [VideoClip(scan.frames, np.arange(8) / FPS, np.arange(8), 8, FPS) for scan in scans]
    first, second = ({tuple(one) for one in scan.objects.tolist()} for scan in scans)
    config = va.VideoAnchorConfig(alpha_k=1, alpha_v=0, n_clusters=12, pca_rank=32)
    every = {*itertools.product(range(len(COLOURS)), range(len(SHAPES)))}
    for some, truth in (
        (first - second, "yes"),
        (second - first, "yes"),
        (every - first - second, "no"),
    ):
        colour, shape = min(some)
        question = f"Is there a {list(COLOURS)[colour]} {SHAPES[shape]}?"
        assert pipeline.answer(model, processor, clips, question, config, max_new_tokens=4).text == truth


def test_pictures_of_clips_that_do_not_fit_the_grids(
    several: Path, loaded_several: tuple[Any, Any], tmp_path: Path
) -> None:
    """A model that cannot tell its videos apart answers, and draws nothing."""
    model, processor = loaded_several
    clip: VideoClip = read_video(several / "a.mp4", max_frames=2)
    answer = pipeline.answer(model, processor, [clip, clip], "?", CONFIG, max_new_tokens=1)
    answer.grids[:] = [TokenGrid(0, 0, 0, answer.n_visual_tokens)]
    with pytest.raises(InputError, match="not known"):
        draw_run(tmp_path, answer, [clip, clip], {}, [several / "a.mp4"] * 2)
