"""`va.ask`, `va.prepare`: what they take, and that they do what `generate()` under `va.enable` does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models_checkpoint import save_checkpoint

import videoanchor_triton as va
from videoanchor_triton.app import demo
from videoanchor_triton.app.pipeline import load
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import write_video
from videoanchor_triton.integrations.errors import InputError

CONFIG = va.VideoAnchorConfig(alpha_k=4.0, alpha_v=2.0, n_clusters=3, pca_rank=8)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (112, 168, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ask")
    demo.make_checkpoint(path / "qwen")
    for name in ("internvl", "llava_onevision"):
        save_checkpoint(name, path / name)
    for name in ("a", "b"):
        write_video(path / f"{name}.mp4", RNG.integers(0, 255, (8, 112, 112, 3), dtype=np.uint8), fps=4)
    Image.fromarray(IMAGE).save(path / "image.png")
    return path


@pytest.fixture(scope="module")
def qwen(folder: Path) -> Any:
    return load(str(folder / "qwen"), "cpu")


def entry(kind: str, **held: Any) -> dict[str, Any]:
    return {"type": kind, **held}


def say(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [entry("text", text=one) if isinstance(one, str) else one for one in content]}


def test_ask_is_generate_with_the_gate_on(folder: Path, qwen: Any) -> None:
    model, processor = qwen
    clip = va.read_video(folder / "a.mp4", max_frames=4)
    inputs, grids = va.prepare(model, processor, clip, "Why?")
    with va.enable(model, CONFIG) as handle:
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        scores = handle.last[0].scores  # pyright: ignore
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    for answer in (
        va.ask(str(folder / "qwen"), folder / "a.mp4", "Why?", CONFIG, max_frames=4, max_new_tokens=5, device="cpu"),
        va.ask(model, clip, "Why?", CONFIG, max_new_tokens=5),
    ):
        assert answer.text == text
        assert torch.equal(answer.anchor.scores, scores)
        assert answer.grids == grids == [answer.grid]
        assert {"decode_video", "load_model", "vision", "ssc", "prefill", "decode"} <= answer.seconds.keys()
    assert scores.shape == (grids[0].n_tokens,)


def test_media_go_to_their_entries(folder: Path, qwen: Any) -> None:
    """A chat with two videos and an image: the same tokens and pixels as the processor's own, in whatever way they are
    given; the grids follow the order of the prompt, not that of the kinds."""
    model, processor = qwen
    a, b = (va.read_video(folder / f"{name}.mp4", max_frames=n) for name, n in (("a", 4), ("b", 6)))
    beside = [say(entry("video"), "one", entry("image")), say("yes", role="assistant"), say(entry("video"), "more?")]
    within = [
        say(entry("video", video=a), "one", entry("image", path=str(folder / "image.png"))),
        say("yes", role="assistant"),
        say(entry("video", video=b), "more?"),
    ]
    expected, grids = va.prepare(model, processor, [a, IMAGE, b], beside)
    again, same = va.prepare(model, processor, None, within)
    assert grids == same
    assert [(grid.t, grid.h, grid.w) for grid in grids] == [(2, 4, 4), (1, 4, 6), (3, 4, 4)]
    assert expected.keys() == again.keys()
    assert all(torch.equal(torch.as_tensor(expected[name]), torch.as_tensor(again[name])) for name in expected)
    ids = expected["input_ids"][0]
    kinds = {model.config.video_token_id: "v", model.config.image_token_id: "i"}
    visual = "".join(kinds[int(token)] for token in ids if int(token) in kinds)
    assert visual == "v" * 32 + "i" * 24 + "v" * 48
    answer = va.ask(model, None, within, CONFIG, max_new_tokens=2)
    assert answer.n_visual_tokens == len(answer.anchor.scores) == 104
    with pytest.raises(ValueError, match="3 videos and images; use grids"):
        _ = answer.grid


def test_two_frame_rates(folder: Path, qwen: Any) -> None:
    """Each video's time is its own: as when it is asked about alone."""
    model, processor = qwen
    clips = [va.read_video(folder / "a.mp4", max_frames=n) for n in (2, 8)]
    alone = [float(va.prepare(model, processor, clip, "?")[0]["second_per_grid_ts"][0]) for clip in clips]
    assert alone[0] != alone[1]
    together, _ = va.prepare(model, processor, clips, "?")
    assert list(map(float, together["second_per_grid_ts"])) == alone


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_grids_without_thw(name: str, folder: Path) -> None:
    """InternVL sets frames apart by text, LLaVA-OneVision has a newline after each video."""
    model, processor = load(str(folder / name), "cpu")
    clip = va.read_video(folder / "a.mp4", max_frames=3)
    video = TokenGrid(3, 2, 2, int(name == "llava_onevision"))
    words = [say(entry("video"), "word3", entry("video"), "word4")]
    assert va.prepare(model, processor, [clip, clip], words)[1] == [video, video]
    answer = va.ask(model, [IMAGE, clip], [say(entry("image"), "word3", entry("video"))], CONFIG, max_new_tokens=2)
    image, same = answer.grids
    assert same == video
    assert image == TokenGrid(0, 0, 0, len(answer.anchor.scores) - video.n_tokens), "its tiles have no known places"


def test_videos_that_cannot_be_told_apart(folder: Path) -> None:
    """Nothing stands between them in this prompt."""
    model, processor = load(str(folder / "llava_onevision"), "cpu")
    clip = va.read_video(folder / "a.mp4", max_frames=3)
    assert va.prepare(model, processor, [clip, clip], "word3")[1] == [TokenGrid(0, 0, 0, 2 * (3 * 4 + 1))]
    with pytest.raises(InputError, match=r"equal size.*; most models take videos of equally many frames"):
        va.prepare(model, processor, [clip, va.read_video(folder / "a.mp4", max_frames=2)], "word3")


@pytest.mark.parametrize(
    ("media", "messages", "error"),
    [
        (None, "Why?", "expected a video or an image to ask about, got none"),
        ([], "Why?", "expected a video or an image to ask about, got none"),
        (IMAGE, " ", "question"),
        (IMAGE, [say("Why?")], "1 of 1 media have no entry"),
        ([IMAGE, IMAGE], [say(entry("image"), "?")], "1 of 2 media have no entry"),
        (IMAGE, [say(entry("image"), entry("image"))], "more entries of type video or image than media"),
        (IMAGE, [say(entry("video"), "?")], "an entry of type video meets image data"),
        (None, [say(entry("image", url="nope://a/b.png"), "?")], "nope://a/b.png: fsspec knows no such protocol"),
        (None, [say(entry("video", video="missing.mp4"), "?")], "missing.mp4"),
        (IMAGE.astype(np.float32), "Why?", r"got float32 \(112, 168, 3\)"),
        (IMAGE[..., 0], "Why?", r"got uint8 \(112, 168\)"),
        ([3], "Why?", "got int"),
    ],
)
def test_what_does_not_fit_is_refused(qwen: Any, media: Any, messages: Any, error: str) -> None:
    model, processor = qwen
    with pytest.raises(InputError, match=error):
        va.prepare(model, processor, media, messages)


def test_a_model_without_a_name_needs_its_processor(qwen: Any) -> None:
    nameless = type(qwen[0])(qwen[0].config)
    nameless.name_or_path = ""
    with pytest.raises(InputError, match="give its processor"):
        va.ask(nameless, IMAGE, "Why?", CONFIG)


def test_several_media_beyond_the_context_are_refused(qwen: Any) -> None:
    with pytest.raises(InputError, match=r"context holds 4096: give fewer or shorter videos, or smaller images"):
        va.ask(qwen[0], [IMAGE, IMAGE], "Why?", CONFIG, processor=qwen[1], max_new_tokens=4096)
