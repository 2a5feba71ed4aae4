"""The frame of each visual token, as `score="cross_frame"` gets it."""

import inspect
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.integrations.transformers.frames import Images, frames_of_rows, images_of
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model


def row(text: str) -> tuple[Tensor, Tensor]:
    """A row of a prompt: v a token of a video, i of an image, . of text."""
    return torch.tensor([letter in "vi" for letter in text]), torch.tensor([letter == "v" for letter in text])


def frames(texts: list[str], steps: list[int] | None, images: Images | None = None) -> list[list[int]]:
    visual, video = (torch.stack(side) for side in zip(*map(row, texts), strict=True))
    return [frame.tolist() for frame in frames_of_rows(visual, video, steps, images)]


@pytest.mark.parametrize(
    ("texts", "steps", "expected"),
    [
        pytest.param([".vvvvvv."], [3], [[0, 0, 1, 1, 2, 2]], id="a-video-in-one-run"),
        pytest.param([".vvvvvvv"], [3], [[0, 0, 1, 1, 2, 2, 2]], id="newline-at-the-end"),
        pytest.param([".vv.vv.vv"], [3], [[0, 0, 1, 1, 2, 2]], id="a-run-a-frame"),
        pytest.param([".ii.iii."], None, [[0, 0, 1, 1, 1]], id="images"),
        pytest.param([".ii.vvvv."], [2], [[0, 0, 1, 1, 2, 2]], id="image-and-video"),
        pytest.param([".iivvvv.."], [2], [[0, 0, 1, 1, 2, 2]], id="image-beside-video"),
        pytest.param([".vvvv.vvv"], [2, 3], [[0, 0, 1, 1, 2, 3, 4]], id="two-videos"),
        pytest.param(["vvvv....", "........", "....vv.."], [2, 1], [[0, 0, 1, 1], [], [0, 0]], id="three-rows"),
        pytest.param(["vvvv", "vvvv", "vv..", "vv.."], [4, 2], [[0, 1, 2, 3]] * 2 + [[0, 1]] * 2, id="two-beams"),
        pytest.param(["vv.vv", "vv.vv"], [1, 1], [[0, 0, 1, 1]] * 2, id="beams-of-single-frames"),
        pytest.param(["....."], None, [[]], id="text"),
    ],
)
def test_frames(texts: list[str], steps: list[int] | None, expected: list[list[int]]) -> None:
    assert frames(texts, steps) == expected


@pytest.mark.parametrize(
    ("texts", "lengths", "expected"),
    [
        pytest.param([".iiiii."], [2, 3], [[0, 0, 1, 1, 1]], id="nothing-between"),
        pytest.param([".iiiiii."], [2, 2, 2], [[0, 0, 1, 1, 2, 2]], id="three"),
        pytest.param([".ii.ii.i"], [4, 1], [[0, 0, 0, 0, 1]], id="line-breaks-within"),
        pytest.param([".iivvvviii"], [2, 2, 1], [[0, 0, 1, 1, 2, 2, 3, 3, 4]], id="around-a-video"),
        pytest.param(["iiii", ".ii."], [2, 2, 2], [[0, 0, 1, 1], [0, 0]], id="two-rows"),
        pytest.param(["iiii", "iiii", ".ii.", ".ii."], [2, 2, 2], [[0, 0, 1, 1]] * 2 + [[0, 0]] * 2, id="two-beams"),
    ],
)
def test_images_side_by_side(texts: list[str], lengths: list[int], expected: list[list[int]]) -> None:
    steps = [2] if "v" in texts[0] else None
    assert frames(texts, steps, Images(lengths, whole=True)) == expected


def test_images_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot tell one image in 2 tiles from several images"):
        frames([".iiii."], None, Images([2, 2], whole=False))
    assert frames([".ii.ii"], None, Images([2, 2], whole=False)) == [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match="2 of 5 tokens were encoded, and 4 stand in the prompt"):
        frames(["iiii"], None, Images([2, 3], whole=True))


@pytest.mark.parametrize("name", ["llava", "llava_next", "mistral3", "internvl", "qwen3_vl"])
def test_images_of_an_encoder(name: str) -> None:
    """Two images, and what says that they are two."""
    model = tiny.build(name)
    base: Any = find_multimodal_model(model)
    batch = tiny.inputs(name, [["V"]])
    encode = "get_video_features" if "pixel_values_videos" in batch else "get_image_features"
    given = {key: batch[key] for key in inspect.signature(getattr(base, encode)).parameters if key in batch}
    with torch.no_grad():
        images = images_of(
            {key.replace("video", "image"): x for key, x in given.items()}, getattr(base, encode)(**given), name
        )
    token = tiny.VIDEO if name == "qwen3_vl" else tiny.IMAGE
    assert sum(images.lengths) == int((batch["input_ids"] == token).sum())
    assert images.whole == (name != "internvl")


def test_runs_that_fit_no_video_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 videos of \[4, 3\] frames stand in 3 runs"):
        frames(["vv.vv.vv"], [4, 3])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", tiny.BACKBONES)
def test_frames_reach_the_score(name: str, options: dict[str, Any]) -> None:
    if options and not tiny.V5 and name in ("internvl", "qwen3_vl", "llava_onevision"):
        pytest.skip("transformers 4.57 breaks such beams, or gives them other prompts' videos, ungated too")
    model = tiny.build(name)
    model.set_attn_implementation("sdpa")
    batch = tiny.inputs(name, [[3, 4, "V", 5], [7, "V", 8, "V", 9]])
    seen: list[list[int]] = []

    def spy(tokens: Tensor, config: Any, *, frames: Tensor, progress: Any) -> Any:
        seen.append(frames.tolist())
        return va.anchor_scores(tokens, config, frames=frames, progress=progress)

    config = va.VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=3, pca_rank=6, score="cross_frame")
    with va.enable(model, config) as handle:
        handle.anchor_scores = spy
        model.generate(**batch, **GENERATE, **options)
    one = [frame for frame in range(tiny.FRAMES) for _ in range(4)]
    newline = [tiny.FRAMES - 1] if name == "llava_onevision" else []
    both = [*one, *newline, *(tiny.FRAMES + frame for frame in [*one, *newline])]
    assert seen == [[*one, *newline], both]
    assert all(result is not None and result.scores.max() > 0 for result in handle.last)
