"""viz.html: what its data says, what a hostile name cannot do, and what a click changes in a real browser."""

import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, keep_screenshot, needs_browser
from hostile_texts import HOSTILE
from PIL import Image
from viz_runs import N_SAMPLED, rows_of

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.solver import SelfExpression
from videoanchor_triton.app import pipeline
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import VideoClip, read_video
from videoanchor_triton.app.viz import run_page as module
from videoanchor_triton.app.viz.attention_share import SharesRecord, VisualShare
from videoanchor_triton.app.viz.finished_run import FinishedRun
from videoanchor_triton.app.viz.run_page import FromModel, run_page, video_sha256

GRID = TokenGrid(3, 4, 6, n_extra=1, row_newlines=True)
N_FRAMES = 6
LABELS = np.arange(GRID.n_tokens) % 7 // 2  # 4 subspaces; number 3 is the smallest


def run_of(grid: TokenGrid = GRID, n_frames: int = N_FRAMES, **record: Any) -> FinishedRun:
    scores = np.linspace(0, 1, grid.n_tokens, dtype=np.float32)
    labels = LABELS if grid is GRID else np.arange(grid.n_tokens) % 24
    indices = np.arange(n_frames) * 3 + 1
    about = {"video": "/data/clip.mp4", "model": "/data/tiny", "question": "Where?", "answer": "left", **record}
    return FinishedRun(Path("run"), {"config": {"alpha_k": 9.5}, **about}, grid, scores, labels, indices / 10, indices)


def clip_of(run: FinishedRun, height: int = 80, width: int = 120) -> VideoClip:
    shape = (len(run.indices), height // 20, width // 20, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).repeat(20, 1).repeat(20, 2)
    return VideoClip(frames, run.timestamps, run.indices, 100, 10.0)


def expression_of(n: int, k: int = 8) -> SelfExpression:
    rng = np.random.default_rng(1)
    indices = np.stack([rng.choice(n, k, replace=False) for _ in range(n)])
    values = rng.normal(size=(n, k)) * (rng.random((n, k)) < 0.9)
    return SelfExpression(torch.from_numpy(indices), torch.from_numpy(values), torch.zeros(n), 1, 1.0, n)


def shares_of(n: int, n_layers: int = 2, n_heads: int = 3) -> SharesRecord:
    rng = np.random.default_rng(2)
    layers = [VisualShare.of_maps(5 * layer, rng.random((2, n_heads, n)) / n) for layer in range(n_layers)]
    return SharesRecord(layers, 9, 2 * n, n)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").write_bytes(b"a video")
    return tmp_path / "clip.mp4"


def whole_page(video: Path, /, **record: Any) -> str:
    run = run_of(**record)
    n = GRID.n_tokens
    found = FromModel(expression_of(n), shares_of(n), record.get("answer", "right"))
    return run_page(run, clip_of(run).frames, [video], found)


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


def unpacked(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(b64decode(text), dtype)


def test_data_of_the_page_against_the_run(video: Path) -> None:
    text = whole_page(video)
    data, run = data_of(text), run_of()
    cells = GRID.arrange(np.arange(GRID.n_tokens)).ravel()  # the token at each place
    np.testing.assert_array_equal(unpacked(data["scores"], np.float32), run.scores[cells])
    ranks, sizes = unpacked(data["ranks"], np.uint16), np.bincount(LABELS)
    assert [one["size"] for one in data["subspaces"]] == sorted(sizes, reverse=True)
    assert [one["share"] for one in data["subspaces"]] == pytest.approx(np.sort(sizes)[::-1] / len(LABELS))
    assert [data["subspaces"][rank]["size"] for rank in ranks] == sizes[LABELS[cells]].tolist()
    assert [frame["moment"] for frame in data["frames"]] == [f"{seconds:.2f} s" for seconds in run.timestamps]
    with Image.open(BytesIO(b64decode(data["frames"][2]["image"].split(",")[1]))) as picture:
        assert picture.format == "WEBP"
        error = np.abs(np.asarray(picture).astype(float) - clip_of(run).frames[2])
    assert error.mean() < 12
    assert [frame["step"] for frame in data["frames"]] == [n // 2 for n in range(len(run.timestamps))]


def test_links_are_the_strongest_by_size_of_their_weight(video: Path) -> None:
    links = data_of(whole_page(video))["links"]
    assert links["each"] == 5
    solution, cells = expression_of(GRID.n_tokens), GRID.arrange(np.arange(GRID.n_tokens)).ravel()
    place_of = {token: cell for cell, token in enumerate(cells.tolist())}
    found, weights = (unpacked(links[name], dtype) for name, dtype in (("cells", np.int32), ("weights", np.float32)))
    dense = solution.to_dense().numpy()  # [:, j] expresses token j
    for cell, token in enumerate(cells):
        by = np.argsort(-np.abs(dense[:, token]), kind="stable")[:5]
        expected = [place_of.get(int(one), -1) if dense[one, token] else -1 for one in by]
        assert found[5 * cell : 5 * cell + 5].tolist() == expected
        np.testing.assert_allclose(weights[5 * cell : 5 * cell + 5], dense[by, token], rtol=1e-6)
    assert (found == -1).any(), "some token without a place is among them"


def test_maps_of_attention_are_those_of_their_head(video: Path) -> None:
    layers, record = data_of(whole_page(video))["attention"], shares_of(GRID.n_tokens)
    assert [one["layer"] for one in layers] == [0, 5]
    for one, measured in zip(layers, record.layers, strict=True):
        for which, name in enumerate(("before", "after")):
            levels = unpacked(one[name], np.uint8).reshape(4, -1)
            expected = [GRID.arrange(head).ravel() for head in measured.levels[which]]
            np.testing.assert_array_equal(levels, expected)
        assert one["heads"] == ["mean of all", "0", "1", "2"]
        assert one["shares"][1] == pytest.approx([measured.gated.mean(), *measured.gated])


def test_levels_of_a_map() -> None:
    """Both maps of a head on one scale; the first is the mean of the heads."""
    maps = np.array([[[0.0, 0.1], [0.2, 0.0]], [[0.0, 0.4], [0.0, 0.0]]])
    found = VisualShare.of_maps(3, maps)
    np.testing.assert_allclose(found.top, [0.2, 0.4, 0.2])
    assert found.levels.tolist() == [[[180, 128], [0, 128], [255, 0]], [[0, 255], [0, 255], [0, 0]]]
    np.testing.assert_allclose([found.ungated, found.gated], [[0.1, 0.2], [0.4, 0.0]])


def test_what_was_run_is_on_the_page_and_folders_are_not(video: Path) -> None:
    text = whole_page(video, question="Where is $it?")
    for said in ("Where is $it?", hashlib.sha256(b"a video").hexdigest(), "alpha_k", "9.5", "clip.mp4", "0.400"):
        assert said in text
    assert "/data/" not in text
    assert "without the gate" in text
    assert "Not on this page" not in text
    assert "Left out" not in text


def test_how_frames_were_sampled_and_the_answer_drawn_is_on_the_page(video: Path) -> None:
    sampled = {"fps": 2.5, "max_frames": 7, "sampling": "scene"}
    drawn = {"temperature": 0.75, "top_p": 0.5, "top_k": 0, "seed": 77}
    others = {"dtype": "float16", "max_pixels": 45678, "budget": {"max_new_tokens": 123}}
    text = whole_page(video, sampled=sampled, drawn=drawn, **others)
    numbers = {"dtype": "float16", "most tokens of the answer": 123, "most pixels of a frame": 45678}
    for name, value in {**sampled, **drawn, **numbers}.items():
        assert f'<th scope="row">{name}</th><td class="text">{value}</td>' in text
    assert "temperature" not in whole_page(video, drawn=None)


def test_without_the_model_the_page_says_what_it_lacks(video: Path) -> None:
    run = run_of()
    text = run_page(run, clip_of(run).frames, [video])
    assert data_of(text)["links"] is data_of(text)["attention"] is None
    assert "videoanchor viz RUN --what page,affinity,attention adds them." in text
    assert "without the gate</strong>" not in text


def test_the_hash_of_views_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"a")
    first = video_sha256(tmp_path)
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    assert video_sha256(tmp_path) != first


def test_a_large_run_stays_below_15_mb(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 steps of 2,048 tokens, 80 layers of 28 heads: small frames, maps of the heads' mean in some layers."""
    grid = TokenGrid(32, 32, 64)
    run, n = run_of(grid, 64), grid.n_tokens
    levels = np.random.default_rng(0).integers(0, 256, (2, 29, n), dtype=np.uint8)
    layers = [VisualShare(layer, np.zeros(28), np.ones(28), levels, np.ones(29)) for layer in range(80)]
    links = SelfExpression(torch.randint(n, (n, 9)), torch.rand(n, 9), torch.zeros(n), 1, 1.0, n)
    monkeypatch.setattr(module, "_SIZES", ((512, 90), (96, 40)))  # the best that fits, not all that were tried
    frames = np.random.default_rng(0).integers(0, 256, (64, 256, 512, 3), dtype=np.uint8)  # noise: nothing is larger
    clip = VideoClip(frames, run.timestamps, run.indices, 100, 10.0)
    text = run_page(run, clip.frames, [video], FromModel(links, SharesRecord(layers, 9, n, n), "right"))
    data = data_of(text)
    assert 5_000_000 < len(text.encode()) < 15_000_000
    assert data["attention"][0]["heads"] == ["mean of all"]
    assert 20 < len(data["attention"]) < 80
    assert data["attention"][-1]["layer"] == 79
    missing, numbers = 80 - len(data["attention"]), ", ".join(str(one["layer"]) for one in data["attention"])
    assert f"Left out, for the size of the page: maps of {missing} of 80 layers (there are {numbers}); maps of" in text
    with Image.open(BytesIO(b64decode(data["frames"][0]["image"].split(",")[1]))) as picture:
        assert picture.size == (96, 48)


def test_page_of_everything(viz_run: Path, gallery: Path) -> None:
    """With what only the model knows: links by W, maps whose parts add up to the shares, and the ungated answer."""
    text = (gallery / "viz.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data = json.loads(found)
    assert (data["grid"], data["links"]["each"]) == ({"t": 3, "h": 3, "w": 4}, 5)
    rows = {(int(row["layer"]), row["head"]): row for row in rows_of(gallery / "attention.csv")}
    for one in data["attention"]:
        for name, which in (("before", 0), ("after", 1)):
            levels = np.frombuffer(b64decode(one[name]), np.uint8).reshape(len(one["heads"]), -1) / 255
            shares = (levels**2 * np.array(one["top"])[:, None]).sum(1)
            np.testing.assert_allclose(shares, one["shares"][which], atol=0.02)
            column = f"share_{name}_gate"
            for head, share in zip(["mean", *one["heads"][1:]], one["shares"][which], strict=True):
                assert share == pytest.approx(float(rows[one["layer"], head][column]), abs=1e-9)
    record = json.loads((viz_run / "result.json").read_text())
    model, processor = pipeline.load(record["model"], "cpu")
    clip, config = read_video(record["video"], max_frames=N_SAMPLED), VideoAnchorConfig(alpha_k=0, alpha_v=0)
    ungated = pipeline.answer(model, processor, clip, record["question"], config, max_new_tokens=1).text
    for name, answer in (("with the gate", record["answer"]), ("without the gate", ungated)):
        assert f"<strong>{name}</strong><pre>{answer or '(empty)'}</pre>" in text
    assert hashlib.sha256(Path(record["video"]).read_bytes()).hexdigest() in text


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def hostile_pages(video: Path, texts: Sequence[str] = HOSTILE) -> list[str]:
    names = ("video", "model", "question", "answer", "device")
    pages = [whole_page(video, **dict.fromkeys(names, text), notes=[text]) for text in texts]
    return [*pages, whole_page(video, config={HOSTILE[0]: HOSTILE[1]}, versions={HOSTILE[2]: HOSTILE[3]})]


def test_hostile_names_are_text(video: Path) -> None:
    usual = Tags(whole_page(video))
    for text in hostile_pages(video):
        found = Tags(text)
        assert sorted({*found.tags}) == sorted({*usual.tags})
        assert found.attributes == usual.attributes
        assert found.tags.count("script") == 2
        text.encode()


def test_nothing_is_asked_for_and_only_its_own_script_runs(video: Path) -> None:
    text = whole_page(video)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"\bon[a-z]+=", text)


ACTS = Path(__file__).with_name("viewer_acts.js").read_text(encoding="utf-8")


def acting(text: str) -> str:
    """The page with `ACTS` after it, which its policy lets run too."""
    digest = b64encode(hashlib.sha256(ACTS.encode()).digest()).decode()
    return text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{ACTS}</script></body>"
    )


@needs_browser
@pytest.mark.parametrize("size", ["1280,1600", "500,2200"])
def test_a_click_changes_what_it_should(video: Path, size: str) -> None:
    page = video.parent / "viz.html"
    page.write_text(acting(whole_page(video)), encoding="utf-8")
    done = chromium(page, "--dump-dom", f"--window-size={size}")
    assert "CONSOLE" not in done.stderr
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout)
    found = dict(json.loads(said.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")))
    tokens = GRID.arrange(np.arange(GRID.n_tokens))
    scores, labels, token = run_of().scores, GRID.arrange(LABELS), int(tokens[0, 1, 2])
    assert found["first score"][3] == found["untouched"] == 0
    assert found["alpha"] == pytest.approx(255 * 0.7 * scores[tokens[2, 3, 4]], abs=1)
    below = (scores[tokens.ravel()] < scores[tokens[1, 0, 0]]).mean() + 0.5 / tokens.size
    assert found["percentile"] == pytest.approx(255 * below, abs=1)
    assert found["attention hidden"]
    assert found["attention shown"]
    n_alike = np.bincount(LABELS)[LABELS[token]]
    assert found["token"].startswith(f"Token at 0.10 s, row 2, column 3: score {scores[token]:.3f}, subspace ")
    assert f"({n_alike} tokens" in found["token"]
    dense = expression_of(GRID.n_tokens).to_dense().numpy()[:, token]
    placed = {*tokens.ravel().tolist()}
    strongest = [one for one in np.argsort(-np.abs(dense), kind="stable")[:5] if one in placed and dense[one]]
    assert [float(text.split("weight ")[1]) for text in found["links"]] == pytest.approx(dense[strongest], abs=6e-4)
    assert found["marks"] == 1
    np.testing.assert_array_equal(np.reshape(found["lit"], labels.shape), labels == LABELS[token])
    assert "row 2, column 4" in found["moved"]
    assert found["ended"] == 0
    measured = shares_of(GRID.n_tokens).layers[1]
    for name, which in (("before", 0), ("after", 1)):
        assert found[name] == measured.levels[which, 2][tokens[0, 1, 3]]
    assert f"{100 * measured.gated[1]:.1f}% after" in found["share"]
    assert found["when"] == "1.30 s, frame 5 of 6"
    assert found["image"]
    assert found["back"] == "1.00 s, frame 4 of 6"
    assert (found["playing"], found["paused"]) == ("Pause", "Play")
    assert found["unnamed"] == 0
    assert not found["wide"], "the page scrolls to the side"
    (video.parent / "viz.html").write_text(whole_page(video), encoding="utf-8")
    picture = keep_screenshot(page, f"viz-{size.split(',')[0]}.png", size)
    with Image.open(picture) as image:
        assert len({*image.convert("RGB").resize((64, 64)).tobytes()}) > 50


@needs_browser
def test_hostile_names_run_nothing_without_the_policy_either(video: Path) -> None:
    """Sixty at once."""
    text = hostile_pages(video, ["\n".join(HOSTILE)])[0]
    page = video.parent / "all.html"
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    page.write_text(without.replace("</title>", " before</title>", 1), encoding="utf-8")
    done = chromium(page, "--dump-dom")
    assert re.search(r" before</title>", done.stdout)
    assert 'aria-pressed="true"' in done.stdout, "the page's own script has run"
    assert "CONSOLE" not in done.stderr
