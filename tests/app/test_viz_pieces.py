"""The pieces of `videoanchor viz` by themselves: odd sizes, newlines, one frame, and pictures without overlap."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks

from videoanchor_triton.app.token_grid import Grid, JoinedGrid, TokenGrid
from videoanchor_triton.app.video.reader import VideoClip
from videoanchor_triton.app.viz import affinity, attention_share, contact_sheet, table
from videoanchor_triton.app.viz.affinity import FrameAffinity, frame_affinity
from videoanchor_triton.app.viz.attention_share import (
    SharesRecord,
    VisualShare,
    attention_by_key,
    record_visual_share,
)
from videoanchor_triton.app.viz.finished_run import FinishedRun, read_clip, source_frames
from videoanchor_triton.app.viz.overlay import MAX_HEIGHT, MIN_WIDTH, Painter, write_video
from videoanchor_triton.app.viz.palette import subspace_names
from videoanchor_triton.integrations.errors import InputError
from videoanchor_triton.integrations.transformers import attention

GRIDS = [
    pytest.param(TokenGrid(3, 5, 7), id="plain"),
    pytest.param(TokenGrid(3, 5, 7, row_newlines=True), id="newlines"),
    pytest.param(TokenGrid(3, 5, 7, n_extra=2), id="extra"),
    pytest.param(TokenGrid(1, 1, 1), id="one-token"),
    pytest.param(TokenGrid(1, 3, 1, n_extra=1, row_newlines=True), id="one-column"),
]


LONG = "a-video-with-a-name-that-would-never-fit-into-any-title-of-a-figure-take-7.mp4"
CONFIG = {"alpha_k": 9.5, "alpha_v": 2.5, "scorer": "ssc"}


def finished(grid: TokenGrid, n_frames: int, labels: np.ndarray | None = None, video: str = "clip.mp4") -> FinishedRun:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, grid.n_tokens) if labels is None else labels
    scores = rng.random(grid.n_tokens, dtype=np.float32)
    indices = np.arange(n_frames) * 3 + 1
    about = {"video": video, "model": LONG, "question": f"Where is {LONG * 3}?", "answer": LONG * 2, "config": CONFIG}
    return FinishedRun(Path("run"), about, grid, scores, labels, indices / 10, indices)


@pytest.mark.parametrize("grid", GRIDS)
def test_places_are_those_of_the_grid(grid: TokenGrid) -> None:
    places = grid.places()
    assert places.shape == (grid.n_tokens, 3)
    placed = places[:, 2] >= 0
    assert placed.sum() == grid.t * grid.h * grid.w
    arranged = grid.arrange(np.arange(grid.n_tokens))
    np.testing.assert_array_equal(arranged[tuple(places[placed].T)], np.flatnonzero(placed))
    assert (places[~placed, 0] >= 0).sum() == grid.t * grid.h * grid.row_newlines
    assert (places[:, 0] < 0).sum() == grid.n_extra


@pytest.mark.parametrize(("n_frames", "t"), [(1, 1), (5, 3), (6, 3), (7, 4), (4, 4), (1023, 512)])
def test_first_frames_of_steps_of_one_or_two_frames(n_frames: int, t: int) -> None:
    """Frame n lies in step n // 2 where two frames make a step, as the processors pair them."""
    grid = TokenGrid(t, 2, 2)
    per_step = 1 if t == n_frames else 2
    np.testing.assert_array_equal(grid.steps_of_frames(n_frames), np.arange(n_frames) // per_step)
    steps = np.arange(n_frames) // per_step
    np.testing.assert_array_equal(grid.first_frames(n_frames), [np.flatnonzero(steps == step)[0] for step in range(t)])


def test_table_leaves_cells_empty_where_a_token_has_no_place(tmp_path: Path) -> None:
    grid = TokenGrid(2, 2, 2, n_extra=1, row_newlines=True)
    run = finished(grid, 3)
    table.write(tmp_path / "tokens.csv", table.token_rows(run))
    lines = (tmp_path / "tokens.csv").read_text().splitlines()
    assert lines[0] == "token,step,frame,time_s,row,column,score,subspace,label,video"
    cells = [line.split(",") for line in lines[1:]]
    assert len(cells) == 13
    assert cells[1][:6] == ["1", "0", "1", "0.100000", "0", "1"]
    assert cells[2][:6] == ["2", "0", "1", "0.100000", "0", ""]
    assert cells[9][:6] == ["9", "1", "7", "0.700000", "1", "0"]
    assert cells[12][:6] == ["12", "", "", "", "", ""]
    assert [np.float32(row[6]) for row in cells] == run.scores.tolist()
    assert [int(row[8]) for row in cells] == run.labels.tolist()
    assert {row[9] for row in cells} == {"1"}


def test_table_names_subspaces_as_the_legend_does(tmp_path: Path) -> None:
    grid = TokenGrid(1, 1, 200)
    sizes = np.arange(1, 20)[::-1]
    labels = np.repeat(np.random.default_rng(0).permutation(40)[:19], sizes)  # 19 subspaces, under numbers with gaps
    run = finished(grid, 1, np.append(labels, [labels[0]] * (200 - len(labels))))
    table.write(tmp_path / "tokens.csv", table.token_rows(run))
    with (tmp_path / "tokens.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["subspace"] for row in rows} == {name for name, _ in subspace_names(run.labels)}
    painted = Painter(run, "subspaces")
    for row in rows:
        colour = painted.colours[0, 0, int(row["column"])].astype(int)
        assert dict(painted.names)[row["subspace"]] == "#{:02X}{:02X}{:02X}".format(*colour)


@pytest.mark.parametrize("grid", [*GRIDS, JoinedGrid((TokenGrid(2, 3, 4), TokenGrid(1, 1, 2)), (2, 1))])
def test_affinity_against_a_dense_matrix(grid: Grid) -> None:
    n, generator = grid.n_tokens, torch.Generator().manual_seed(0)
    k = min(4, n)
    indices = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(n)])
    values = torch.randn(n, k, generator=generator)
    dense = torch.zeros(n, n).scatter_add_(1, indices, values).T.abs().double().numpy()
    step = grid.places()[:, 0]
    expected = np.array([[dense[step == i][:, step == j].sum() for j in range(grid.t)] for i in range(grid.t)])
    found = frame_affinity(indices, values, grid)
    np.testing.assert_allclose(found.share, expected / expected.sum(), rtol=1e-9)
    assert found.outside == pytest.approx(1 - expected.sum() / dense.sum(), abs=1e-12)
    placed = np.flatnonzero(step >= 0)
    others = ~np.eye(n, dtype=bool)[np.ix_(placed, placed)]
    apart = step[placed][:, None] != step[placed]
    assert found.chance == pytest.approx(apart[others].mean() if others.any() else 0)
    alike = [[(step[placed] == i)[:, None] & (step[placed] == j) for j in range(grid.t)] for i in range(grid.t)]
    by_chance = np.array([[(one & others).sum() for one in row] for row in alike]) / max(others.sum(), 1)
    np.testing.assert_allclose(found.by_chance, by_chance)
    assert found.between == pytest.approx(1 - np.trace(expected) / expected.sum(), abs=1e-12)


def test_affinity_of_nothing_and_of_other_tokens() -> None:
    grid = TokenGrid(2, 1, 2)
    found = frame_affinity(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1), grid)
    assert (found.share.sum(), found.outside, found.between) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"expected \(4, k\)"):
        frame_affinity(torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1), grid)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 3.0}, {"scale": 0.3}], ids=str)
def test_attention_by_key_against_a_dense_softmax(options: dict[str, Any]) -> None:
    """GQA, padding, fewer queries than keys."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((6, 5), (2, 37), (2, 37)))
    gamma = 1 + 9.5 * torch.rand(2, 37, generator=generator)
    padding = torch.ones(2, 37, dtype=torch.bool)
    padding[1, :7] = False
    with torch.inference_mode():
        found = attention_by_key(q, k, v, log_gamma_k=gamma.log(), key_padding_mask=padding, causal=True, **options)

    logits = q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2) * options.get("scale", 0.25)
    cap = options.get("softcap")
    logits = logits if cap is None else cap * (logits / cap).tanh()
    ahead = torch.arange(37) - (torch.arange(5) + 32)[:, None]
    hidden = (ahead > 0) | (ahead <= -options.get("window", 1000)) | ~padding[:, None, None, :]
    weights = (logits + gamma.double().log()[:, None, None]).masked_fill(hidden, -torch.inf).softmax(-1)
    np.testing.assert_allclose(found.double(), weights.mean(2), atol=2e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_attention_is_0_where_the_window_does_not_reach() -> None:
    q, k, v = (torch.ones(1, 1, n, 8) for n in (2, 20, 20))
    found = attention_by_key(q, k, v, causal=True, window=4)
    assert found[0, 0].tolist() == pytest.approx([0] * 15 + [0.125, 0.25, 0.25, 0.25, 0.125], abs=1e-6)


NAME = "anchored_attention"


class _Layer(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, q: torch.Tensor, k: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return getattr(attention, NAME)(q, k, k, log_gamma_k=gamma, causal=True)


def test_record_names_the_layers_and_leaves_things_as_they_were() -> None:
    """Layer 1 has no such attention (a linear one); a step of decoding is not measured."""
    before = getattr(attention, NAME)
    text = nn.Sequential(_Layer(0), _Layer(2))
    q, visual = torch.randn(1, 2, 12, 8), torch.arange(12) < 9
    with record_visual_share(visual) as record:
        outputs = [layer(q, q, torch.full((12,), 3.0)) for layer in text]
        text[0](q[:, :, -1:], torch.cat([q, q], 2), torch.ones(1))
    torch.testing.assert_close(outputs[1], before(q, q, q, log_gamma_k=torch.full((12,), 3.0), causal=True))
    assert getattr(attention, NAME) is before
    assert not any(hooks for hooks in (*(layer._forward_pre_hooks for layer in text), _global_forward_pre_hooks))
    assert [one.layer for one in record.layers] == [0, 2]
    assert (record.n_queries, record.n_keys, record.n_visual) == (3, 12, 9)


SIZES = [(MIN_WIDTH, 270), (37, 23), (481, 15), (1, 1), (271, 480), (4, 500), (2, 2400)]


@pytest.mark.parametrize("kind", ["scores", "subspaces"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_painted_frames_of_odd_sizes(kind: Any, width: int, height: int, tmp_path: Path) -> None:
    """Each pixel is its token's colour over the grey; the video has even sides and as many frames."""
    grid = TokenGrid(2, 3, 5, n_extra=1, row_newlines=True)
    run = finished(grid, 3)
    frames = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    painter = Painter(run, kind)
    whole = painter.paint(frames[2], 0.7)
    left, picture = np.split(whole, 2, 1)
    times = max(times for times in range(1, 481) if times == 1 or (times - 1) * width < MIN_WIDTH)
    times = min(times, max(MAX_HEIGHT // height, 1))
    assert picture.shape[1] >= MIN_WIDTH - 1
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    large_h, large_w = height * times, width * times
    row, column = np.arange(large_h) * 3 // large_h, np.arange(large_w) * 5 // large_w
    colours = painter.colours[1][row][:, column]
    large = frames[2].repeat(times, 0).repeat(times, 1)
    np.testing.assert_array_equal(left[:large_h, :large_w], large)
    weight, under = 0.62, 127.5 + 0.7 * (large.mean(-1, keepdims=True) - 127.5)
    if kind == "scores":
        weight, under = 0.8 * run.grid.arrange(run.scores)[1][row][:, column, None], large
    expected = weight * colours + (1 - weight) * under
    np.testing.assert_allclose(picture[:large_h, :large_w], expected, atol=0.51)
    path = tmp_path / "o.mp4"
    write_video(path, painter, zip(run.timestamps, frames, strict=True), slides=True)
    with av.open(str(path)) as container:
        shapes = [(frame.height, frame.width) for frame in container.decode(video=0)]
    assert shapes == [whole.shape[:2]] * 3


def test_one_frame() -> None:
    run = finished(TokenGrid(1, 2, 2), 1)
    painter = Painter(run, "scores")
    assert [painter.step_at(seconds) for seconds in (-5, 0.1, 99)] == [0, 0, 0]


def test_step_of_the_nearest_sampled_frame() -> None:
    painter = Painter(finished(TokenGrid(3, 2, 2), 5), "scores")  # at 0.1, 0.4, 0.7, 1.0, 1.3
    assert [painter.step_at(seconds) for seconds in (0, 0.54, 0.56, 1.1, 1.16, 9)] == [0, 0, 1, 1, 2, 2]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **options: Any) -> None:
        save(figure, *args, **options)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", kept)
    return saved


def check_texts(figure: Figure) -> None:
    """No text lies over another one or leaves the figure."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts: list[Any] = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for axes, name in itertools.product(figure.axes, ("xaxis", "yaxis")):
        axis = getattr(axes, name)
        low, high = sorted(axis.get_view_interval())
        unseen = {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
        texts = [text for text in texts if id(text) not in unseen]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for name, box in boxes:
        assert box.x0 >= -1, name
        assert box.y0 >= -1, name
        assert box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
    for (name, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), (name, other)


@pytest.mark.parametrize(
    ("n_frames", "shape", "n_clusters"),
    [(1, (90, 160), 1), (1, (160, 90), 24), (2, (900, 90), 24), (3, (50, 400), 24), (40, (90, 160), 24)],
)
def test_sheet_has_no_overlap(
    n_frames: int, shape: tuple[int, int], n_clusters: int, figures: list[Figure], tmp_path: Path
) -> None:
    grid = TokenGrid(n_frames, 5, 6, row_newlines=True)
    run = finished(grid, n_frames, np.arange(grid.n_tokens) % n_clusters, LONG)
    clip = VideoClip(np.zeros((n_frames, *shape, 3), np.uint8), run.timestamps + 3600, run.indices, 200, 10.0)
    contact_sheet.draw(tmp_path / "sheet.png", clip.frames, run)
    check_texts(figures[0])
    assert figures[0].get_figheight() < 13, "however tall the frames are"
    for said in ("Where is", "→", "alpha_k 9.5, alpha_v 2.5", f"{grid.n_tokens} visual"):
        assert said in figures[0].get_suptitle().replace("\n", " ")


@pytest.mark.parametrize(("t", "last"), [(1, 0.0), (2, 0.5), (5, 20.0), (40, 3600.0), (36, 36000.0)])
def test_affinity_has_no_overlap(t: int, last: float, figures: list[Figure], tmp_path: Path) -> None:
    share = np.random.default_rng(0).random((t, t)) ** 8
    run = finished(TokenGrid(t, 1, 1), t, video=LONG)
    run = replace(run, timestamps=np.linspace(0, last, t))
    moments = run.moments(np.arange(t), 0 if last >= 100 else 2)
    even = np.full((t, t), 1 / t**2)
    affinity.draw(tmp_path / "a.pdf", FrameAffinity(share / share.sum(), 0.0, even), moments, run.caption)
    affinity.draw(tmp_path / "b.png", FrameAffinity(share * 0, 0.0, even), moments, run.caption)
    for figure in figures:
        check_texts(figure)


@pytest.mark.parametrize("n_layers", [1, 4, 80])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_attention_has_no_overlap(n_layers: int, scale: float, figures: list[Figure], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [VisualShare.of_maps(n, rng.random((2, 8, 1)) * scale) for n in range(n_layers)]
    name = finished(TokenGrid(1, 1, 1), 1, video=LONG).caption
    attention_share.draw(tmp_path / "a.png", SharesRecord(layers, 123, 4567, 4000), name)
    check_texts(figures[0])


def test_the_frame_of_a_step_is_its_own(figures: list[Figure], tmp_path: Path) -> None:
    """Of five frames in three steps the second step begins with the third frame."""
    frames = np.repeat(np.array([10, 60, 110, 160, 210], np.uint8), 12).reshape(5, 2, 2, 3)
    run = finished(TokenGrid(3, 1, 1), 5)
    clip = VideoClip(frames, run.timestamps, run.indices, 20, 10.0)
    contact_sheet.draw(tmp_path / "sheet.png", clip.frames, run)
    shown = [axis.images[0].get_array()[0, 0, 0] for axis in figures[0].axes[:3]]  # pyright: ignore
    assert shown == [10, 110, 210]
    assert [axis.get_title() for axis in figures[0].axes[:3]] == ["0.10 s", "0.70 s", "1.30 s"]


def test_frames_of_a_video_with_uneven_times(tmp_path: Path) -> None:
    """The frames are found by their recorded positions, whatever sampling chose them."""
    from fractions import Fraction

    path, times, levels = tmp_path / "vfr.mp4", [0, 4, 5, 11, 30, 31], [20, 60, 100, 140, 180, 220]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
        stream.codec_context.time_base = Fraction(1, 10)
        for time, level in zip(times, levels, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))  # pyright: ignore[reportAttributeAccessIssue]
        container.mux(stream.encode(None))  # pyright: ignore[reportAttributeAccessIssue]

    scores = np.zeros(3, np.float32)
    run = FinishedRun(
        tmp_path, {"video": str(path)}, TokenGrid(3, 1, 1), scores, scores.astype(int), np.array([0.4, 1.1, 3.1]),
        np.array([1, 3, 5]),
    )  # fmt: skip
    clip = read_clip(run, path)
    np.testing.assert_allclose(clip.frames.mean((1, 2, 3)), [60, 140, 220], atol=3)
    assert clip.n_source_frames == 6
    found = list(source_frames(run, path))
    np.testing.assert_allclose([seconds for seconds, _ in found], np.array(times) / 10, atol=1e-6)
    np.testing.assert_allclose([frame.mean() for _, frame in found], levels, atol=3)
    other = FinishedRun(tmp_path, {}, run.grid, scores, run.labels, run.timestamps + 0.1, run.indices)
    with pytest.raises(InputError, match="another video"):
        read_clip(other, path)
    with pytest.raises(InputError, match="another video"):
        next(source_frames(other, path))


def test_views_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    for n in range(4):
        Image.new("RGB", (31, 17), (40 * n + 20,) * 3).save(tmp_path / f"view{n}.png")
    scores = np.zeros(2, np.float32)
    run = FinishedRun(
        tmp_path, {}, TokenGrid(2, 1, 1), scores, scores.astype(int), np.array([1.0, 3.0]), np.array([1, 3])
    )
    clip = read_clip(run, tmp_path)
    assert clip.frames[:, 0, 0, 0].tolist() == [60, 140]
    assert [float(frame.mean()) for _, frame in source_frames(run, tmp_path)] == [20, 60, 100, 140]
