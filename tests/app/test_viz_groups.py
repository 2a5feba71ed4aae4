"""The groups of a run with `keep`: recorded, and drawn over its frames in pictures and on the page."""

import hashlib
import json
import re
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from browser import chromium, keep_screenshot, needs_browser
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.numpy import load_file, save_file
from test_run_page import clip_of, data_of, run_of, unpacked

from videoanchor_triton.app import cli
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.viz import groups as module
from videoanchor_triton.app.viz.finished_run import FinishedRun, read_run
from videoanchor_triton.app.viz.groups import draw, group_maps, numbered, outlines
from videoanchor_triton.app.viz.run_page import run_page
from videoanchor_triton.integrations.errors import InputError

GRID = TokenGrid(2, 2, 3, n_extra=1, row_newlines=True)
# step 0: 0 0 1 / 0 2 1, step 1: 0 3 3 / 4 3 5; newlines and the last token are of group 1
GROUPS = np.array([0, 0, 1, 1, 0, 2, 1, 1, 0, 3, 3, 1, 4, 3, 5, 1, 1])

# the first of each group stays, the others are dropped: step 0: 0 . 1 / . 2 ., step 1: . 3 . / 4 . .
DROPPED = np.array([0, -1, 1, -1, -1, 2, -1, -1, -1, 3, -1, -1, 4, -1, -1, -1, -1])


@pytest.fixture
def video(tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").write_bytes(b"a video")
    return tmp_path / "clip.mp4"


def merged_run() -> FinishedRun:
    run = run_of(GRID, 4, config={"alpha_k": 9.5, "keep": 0.3, "group": "ward"})
    return replace(run, groups=GROUPS)


def test_maps_count_tokens_without_a_place() -> None:
    maps = group_maps(GROUPS, GRID)
    assert maps.groups.tolist() == [[[0, 0, 1], [0, 2, 1]], [[0, 3, 3], [4, 3, 5]]]
    assert maps.counts.tolist() == [[[4, 4, 7], [4, 1, 7]], [[4, 3, 3], [1, 3, 1]]]


def test_dropped_tokens_are_of_no_group() -> None:
    maps = group_maps(np.where(GROUPS == 1, -1, GROUPS), GRID)
    assert maps.groups.tolist() == [[[0, 0, -1], [0, 2, -1]], [[0, 3, 3], [4, 3, 5]]]
    assert maps.counts.tolist() == [[[4, 4, 0], [4, 1, 0]], [[4, 3, 3], [1, 3, 1]]]
    found = {tuple(map(tuple, ends)) for ends in outlines(maps.groups[0]).tolist()}
    assert ((2, 0), (2, 1)) in found
    assert not {((3, 0), (3, 1)), ((2, 0), (3, 0)), ((2, 1), (3, 1))} & found
    assert numbered(maps.groups[0], maps.counts[0]) == [(0, 0, 4)]


def test_outlines_are_the_sides_between_groups_and_around_all() -> None:
    found = {tuple(map(tuple, ends)) for ends in outlines(group_maps(GROUPS, GRID).groups[0]).tolist()}
    around = {((0, y), (0, y + 1)) for y in range(2)} | {((3, y), (3, y + 1)) for y in range(2)}
    around |= {((x, 0), (x + 1, 0)) for x in range(3)} | {((x, 2), (x + 1, 2)) for x in range(3)}
    assert found == around | {((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)), ((1, 1), (2, 1))}
    assert len(outlines(np.zeros((4, 5), dtype=int))) == 18


def test_a_group_of_several_is_numbered_once_a_step_within_it() -> None:
    maps = group_maps(GROUPS, GRID)
    assert numbered(maps.groups[0], maps.counts[0]) == [(0, 0, 4), (0, 2, 7)]
    assert numbered(maps.groups[1], maps.counts[1]) == [(0, 0, 4), (0, 1, 3)]


def test_the_picture_has_the_outlines_and_the_numbers(
    video: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Figure] = []

    def recorded(*args: Any, **kwargs: Any) -> Figure:
        figures.append(Figure(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(module, "Figure", recorded)
    run = merged_run()
    draw(video.parent / "groups.png", clip_of(run).frames, run)
    (figure,) = figures
    below = figure.axes[2:]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["0.10 s", "0.70 s"]
    for step, axis in enumerate(below):
        maps = group_maps(GROUPS, GRID)
        (lines,) = axis.findobj(LineCollection)
        drawn = np.array(lines.get_segments()) + 0.5
        np.testing.assert_allclose(drawn, outlines(maps.groups[step]) * [40, 40])  # 120 x 80 pixels of 3 x 2 tokens
        texts = {(text.get_position(), text.get_text()) for text in axis.texts}
        expected = numbered(maps.groups[step], maps.counts[step])
        assert texts == {((40 * x + 19.5, 40 * y + 19.5), str(n)) for y, x, n in expected}
    said = " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")
    assert "17 visual tokens in 6 groups of 1 to 7 (keep 0.3, ward)" in said
    assert (video.parent / "groups.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_dropped_tokens_is_dark_there(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []

    def recorded(*args: Any, **kwargs: Any) -> Figure:
        figures.append(Figure(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(module, "Figure", recorded)
    run = replace(merged_run(), groups=DROPPED)
    draw(video.parent / "groups.png", clip_of(run).frames, run)
    for step, axis in enumerate(figures[0].axes[2:]):
        _, dark = axis.images
        assert (np.asarray(dark.get_array())[..., 3] > 0).tolist() == (
            group_maps(DROPPED, GRID).groups[step] < 0
        ).tolist()
        assert not axis.texts
    said = " ".join(text.get_text() for text in figures[0].findobj(Text)).replace("\n", " ")
    assert "5 of 17 visual tokens (keep 0.3, ward); the others were dropped: dark" in said


ACTS = """
const said = {}, find = id => document.getElementById(id), over = document.querySelector("#stage .over");
const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
Object.assign(copy.canvas, { width: over.width, height: over.height });
const read = (from, ...part) => {
  copy.clearRect(0, 0, over.width, over.height); copy.drawImage(from, 0, 0);
  return copy.getImageData(...part).data.filter((_, n) => n % 4 === 3);
};
const ink = () => read(over, 0, 0, over.width, over.height).filter(one => one).length;
said.before = ink();
[...document.querySelectorAll("#views button")].find(one => one.textContent === "merged tokens").click();
said.outlined = ink();
const box = find("stage").getBoundingClientRect();
const side = (x, y) => read(over, x * over.width - 1, y * over.height, 1, 1)[0] > 0;
said.between = [side(2 / 3, 0.2), side(1 / 3, 0.2), side(1 / 3, 0.8)];
said.scale = find("scale").textContent;
find("stage").dispatchEvent(new MouseEvent("click", { bubbles: true, clientX: box.left + box.width * 0.5,
  clientY: box.top + box.height * 0.25 }));
said.token = find("token").textContent;
said.dark = [...read(document.querySelector("#stage canvas"), 0, 0, 3, 2)].map(one => one > 0);
said.steps = document.querySelectorAll("#steps .over").length;
const left = document.createElement("pre");
Object.assign(left, { id: "said", textContent: JSON.stringify(said) });
document.body.append(left);
"""


def test_the_page_has_the_groups(video: Path) -> None:
    run, maps = merged_run(), group_maps(GROUPS, GRID)
    data = data_of(run_page(run, clip_of(run).frames, [video]))["groups"]
    assert unpacked(data["of"], np.int32).tolist() == maps.groups.ravel().tolist()
    assert unpacked(data["members"], np.int32).tolist() == maps.counts.ravel().tolist()
    assert data_of(run_page(replace(run, groups=None), clip_of(run).frames, [video]))["groups"] is None


def acted(run: FinishedRun, video: Path) -> dict[str, Any]:
    """What the page says after `ACTS`."""
    text = run_page(run, clip_of(run).frames, [video])
    digest = b64encode(hashlib.sha256(ACTS.encode()).digest()).decode()
    acting = text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{ACTS}</script></body>"
    )
    page = video.parent / "viz.html"
    page.write_text(acting, encoding="utf-8")
    done = chromium(page, "--dump-dom", "--window-size=1280,1600")
    assert "CONSOLE" not in done.stderr
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout)
    return json.loads(said)


@needs_browser
def test_the_page_outlines_them(video: Path) -> None:
    found = acted(merged_run(), video)
    assert found["before"] == 0 < found["outlined"]
    assert found["between"] == [True, False, True]
    assert found["scale"].startswith("Outlined: tokens for which one stands")
    assert found["token"].endswith("One token stands for it and 3 others.")
    assert found["dark"] == [False, False, True, False, True, True]
    assert found["steps"] == GRID.t
    keep_screenshot(video.parent / "viz.html", "viz-groups.png")


@needs_browser
def test_the_page_darkens_dropped_ones(video: Path) -> None:
    run = replace(merged_run(), groups=DROPPED)
    found = acted(run, video)
    assert found["between"] == [True, True, True]
    assert found["scale"].startswith("Outlined: tokens that were kept. Dark: tokens that were dropped.")
    assert found["token"].endswith("It was dropped.")  # the one that is chosen, which alone is bright then
    assert found["dark"] == [True, False, True, True, True, True]


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 merges nothing")
def test_a_run_with_keep_from_end_to_end(viz_run: Path, tmp_path: Path) -> None:
    job = ("run", "--model", viz_run.parent / "checkpoint", "--video", viz_run.parent / "clip.mp4", "--out", tmp_path)
    gate = ("--question", "Which?", "--alpha-k", "2", "--alpha-v", "1", "--n-clusters", "4", "--tol", "0.01")
    options = (*job, *gate, "--max-frames", "5", "--max-new-tokens", "1", "--keep", "0.25")
    assert cli.main([*map(str, options)]) == 0
    tensors, run = load_file(tmp_path / "anchors.safetensors"), read_run(tmp_path)
    n = len(tensors["scores"])
    assert tensors["groups"].dtype == np.int64
    assert tensors["groups"].shape == (n,)
    assert len(np.unique(tensors["groups"])) == int(0.25 * n + 0.5)
    assert run.groups is not None
    assert np.array_equal(run.groups, tensors["groups"])
    assert data_of((tmp_path / "viz.html").read_text(encoding="utf-8"))["groups"] is not None
    assert cli.main([*map(str, options), "--merge", "drop", "--out", str(tmp_path / "drop")]) == 0
    dropped = load_file(tmp_path / "drop" / "anchors.safetensors")["groups"]
    k = len(np.unique(tensors["groups"]))
    assert sorted(dropped) == [-1] * (n - k) + [*range(k)]
    assert cli.main(["viz", str(tmp_path), "--what", "sheet,page"]) == 0
    assert {path.name for path in (tmp_path / "viz").iterdir()} == {"anchors.png", "groups.png", "viz.html"}
    save_file({**tensors, "groups": tensors["groups"][1:]}, tmp_path / "anchors.safetensors")
    with pytest.raises(InputError, match=r"anchors.safetensors .*'groups': .* does not fit the grid"):
        read_run(tmp_path)


def test_a_run_without_has_none(viz_run: Path, gallery: Path) -> None:
    assert "groups" not in load_file(viz_run / "anchors.safetensors")
    assert read_run(viz_run).groups is None
    assert not (gallery / "groups.png").exists()
