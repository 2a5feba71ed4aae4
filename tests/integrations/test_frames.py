"""The frame of each visual token, as `score="cross_frame"` gets it."""

from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.integrations.frames import frames_of_rows


def row(text: str) -> tuple[Tensor, Tensor]:
    """A row of a prompt: v a token of a video, i of an image, . of text."""
    return torch.tensor([letter in "vi" for letter in text]), torch.tensor([letter == "v" for letter in text])


def frames(texts: list[str], steps: list[int] | None) -> list[list[int]]:
    visual, video = (torch.stack(side) for side in zip(*map(row, texts), strict=True))
    return [frame.tolist() for frame in frames_of_rows(visual, video, steps)]


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
