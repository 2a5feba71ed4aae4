"""Tiny random LLaVA-Video checkpoints in their original layout give the same logits after the conversion."""

from pathlib import Path
from typing import Any

import numpy as np
import original_models as original
import pytest
import torch
import transformers as hf
from tiny_models_original import edit, llava, load, pixels, refused
from transformers.generation import utils as generation

import videoanchor_triton as va
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.integrations.transformers.convert.conversion import convert_checkpoint
from videoanchor_triton.integrations.transformers.convert.llava import VISION_TOWERS, insert_grid_newlines


@pytest.fixture(autouse=True)
def _tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VISION_TOWERS, "tiny", original.TOWER)


@pytest.mark.parametrize("newline", ["grid", "one_token"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=["gqa", "mha"])
def test_llava_video_logits(newline: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = llava(tmp_path / "source", original.llava_config(mm_newline_position=newline, **changes), n_shards=3)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert bool(report.notes) == (newline == "grid")
    converted = load(tmp_path / "out")
    before, after, frames = [3, 4, 5], [6, 7, 8, 9], pixels(2, 20)
    ids = torch.tensor([[*before, *[converted.config.video_token_index] * (2 * 9 + 1), *after]])
    if newline == "grid":
        ids = insert_grid_newlines(ids, converted.config)
        assert ids.shape[1] == 3 + 2 * 3 * 4 + 4
    with torch.inference_mode():
        expected = source(before, frames, after)
        got = converted(input_ids=ids, pixel_values_videos=frames[None]).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_llava_video_image_logits(tmp_path: Path) -> None:
    source = llava(tmp_path / "source", original.llava_config())
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = load(tmp_path / "out")
    ids = torch.tensor([[3, 4, *[converted.config.image_token_index] * (25 + 30), 5]])
    with torch.inference_mode():
        got = converted(input_ids=ids, pixel_values=pixels(2, 20)[None], image_sizes=torch.tensor([[20, 20]])).logits
        torch.testing.assert_close(got, source.image_logits([3, 4], pixels(2, 20), [5]), atol=1e-4, rtol=0)


def test_tied_llava_logits(tmp_path: Path) -> None:
    config = original.llava_config(mm_newline_position="one_token", tie_word_embeddings=True)
    source = llava(tmp_path / "source", config)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = load(tmp_path / "out")
    ids = torch.tensor([[3, *[converted.config.video_token_index] * 10, 4]])
    with torch.inference_mode():
        got = converted(input_ids=ids, pixel_values_videos=pixels(1, 20)[None]).logits
        torch.testing.assert_close(got, source([3], pixels(1, 20), [4]), atol=1e-4, rtol=0)


class _Config:
    video_newline_token_index, video_token_index = 9, 8
    vision_config = type("Vision", (), {"image_size": 20, "patch_size": 4})


def test_grid_newlines() -> None:
    ids = torch.tensor([[1, *[8] * 7, 2, *[8] * 4, 3]])
    assert insert_grid_newlines(ids, _Config).tolist() == [[1, 8, 8, 8, 9, 8, 8, 8, 8, 2, 8, 8, 8, 8, 3]]
    with pytest.raises(ValueError, match="6 video tokens are not rows of 3"):
        insert_grid_newlines(torch.tensor([[1, *[8] * 6]]), _Config)
    with pytest.raises(ValueError, match="same number of frames"):
        insert_grid_newlines(torch.tensor([[1, *[8] * 7], [*[8] * 4, 1, 1, 1, 1]]), _Config)
    with pytest.raises(ValueError, match="video_newline_token_index"):
        insert_grid_newlines(ids, object())


def test_qwen2_tokenizer_is_transformers_own(tmp_path: Path) -> None:
    llava(tmp_path / "source", original.llava_config())
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    (tmp_path / "source" / "config.json").unlink()
    own = hf.Qwen2TokenizerFast.from_pretrained(tmp_path / "source")  # pyright: ignore[reportAttributeAccessIssue]
    for text in (
        "word1 word22\n\n  word's e\u0301 <|im_start|>user\nword<|im_end|>",
        " ",
        "",
        "w<|endoftext|>  o r d  ",
    ):
        assert converted(text)["input_ids"] == own(text)["input_ids"]
        assert converted.decode(own(text)["input_ids"]) == own.decode(own(text)["input_ids"])


@pytest.mark.parametrize("chunk", [None, 5], ids=["whole", "chunked"])
def test_newlines_of_llava_video_are_scored(chunk: int | None, tmp_path: Path) -> None:
    """As the authors have them: visual tokens, by the embedding of the newline."""
    if chunk is not None and not hasattr(generation, "_slice_mm_encoder_output"):
        pytest.skip("transformers 4.57 cannot prefill a video in chunks")
    llava(tmp_path / "source", original.llava_config())
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    model = load(tmp_path / "out")
    ids = torch.tensor([[3, 4, *[model.config.video_token_index] * (2 * 9 + 1), 5]])
    ids = insert_grid_newlines(ids, model.config)
    seen: list[torch.Tensor] = []

    def scorer(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return torch.rand(len(tokens))

    with va.enable(model, va.VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, scorer=scorer)):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels(2, 20)[None],
            max_new_tokens=2,
            prefill_chunk_size=chunk,
        )
    (tokens,) = seen
    assert len(tokens) == 2 * 3 * 4
    newline = model.get_input_embeddings().weight[model.config.video_newline_token_index]
    assert [i for i, token in enumerate(tokens) if torch.equal(token, newline)] == list(range(3, 24, 4))
    arranged = TokenGrid(2, 3, 3, row_newlines=True).arrange(np.arange(24))
    assert arranged[1].tolist() == [[12, 13, 14], [16, 17, 18], [20, 21, 22]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode = 'average'"),
        ({"mm_newline_position": "frame"}, "mm_newline_position = 'frame'"),
        ({"mm_vision_tower": "openai/clip"}, "mm_vision_tower = .openai/clip"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ({"add_faster_video": True}, "add_faster_video"),
        ({"vocab_size": 20}, "no room for <image>, <video>, <video_newline>"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
    ],
)
def test_llava_configs_that_are_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    llava(tmp_path / "source", original.llava_config())
    edit(tmp_path / "source" / "config.json", **changes)
    refused(tmp_path / "source", tmp_path / "out", match)
