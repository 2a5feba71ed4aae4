"""What cannot be merged consistently is refused in a sentence, or is exactly the run without merging."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE, build, plain_attention
from gated_prompts import CONFIG, ONE, TWO
from torch import Tensor
from transformers import DynamicCache

import videoanchor_triton as va
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

MERGED = replace(CONFIG, keep=0.5)
v5 = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 is refused before")


@pytest.fixture
def ready() -> tuple[Any, dict[str, Tensor]]:
    return build("internvl"), tiny.inputs("internvl", ONE)


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.5, -3, float("nan"), float("inf")])
def test_keep_out_of_range(keep: float) -> None:
    with pytest.raises(ValueError, match=r"keep must be a share of the visual tokens in \(0, 1\], or a number of them"):
        replace(CONFIG, keep=keep)


@pytest.mark.parametrize("keep", [True, "0.5", None])
def test_keep_is_a_number(keep: Any) -> None:
    with pytest.raises(TypeError, match="keep must be a number"):
        replace(CONFIG, keep=keep)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="group must be one of"):
        replace(CONFIG, group="fastv")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="merge must be one of"):
        replace(CONFIG, merge="sum")  # pyright: ignore[reportArgumentType]
    for scorer in ("uniform", lambda tokens: tokens[:, 0]):
        with pytest.raises(ValueError, match='group="subspace" needs the subspaces of scorer'):
            replace(CONFIG, keep=0.5, group="subspace", scorer=scorer)
    with pytest.raises(ValueError, match="keep merges tokens, which the authors' code does not"):
        va.VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, keep=0.5).reproduce()


@pytest.mark.skipif(tiny.V5, reason="transformers 5 encodes pixels before")
def test_pixels_that_the_forward_encodes(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    with va.enable(model, MERGED), pytest.raises(NotImplementedError, match="merges no tokens of pixels that this"):
        model.generate(**batch, **GENERATE)


@v5
@pytest.mark.parametrize("name", ["exaone4_5", "hyperclovax"])
def test_models_that_count_positions_by_the_cache(name: str) -> None:
    model = tiny.build(name)
    model.set_attn_implementation(plain_attention(model))
    batch = tiny.inputs(name, ONE)
    with va.enable(model, MERGED), pytest.raises(NotImplementedError, match="was given no position_ids"):
        model.generate(**batch, **GENERATE)
    with va.enable(model, CONFIG):
        model.generate(**batch, **GENERATE)  # and nothing is left of it


@v5
def test_embeddings(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with va.enable(model, MERGED), pytest.raises(NotImplementedError, match="merges no tokens of a prompt of inputs_e"):
        model.generate(**batch, inputs_embeds=embeds, **GENERATE)


@v5
def test_given_scores(ready: tuple[Any, dict[str, Tensor]]) -> None:
    """In the first turn and in the second, where the cache has merged tokens."""
    model, batch = ready
    cache = DynamicCache(config=model.config.get_text_config())
    scores = torch.zeros(batch["input_ids"].shape)
    with va.enable(model, MERGED) as handle:
        with (
            handle.use_scores(scores),
            pytest.raises(NotImplementedError, match="scores are given by use_scores"),
        ):
            model.generate(**batch, **GENERATE)
        ids = model.generate(**batch, **GENERATE, past_key_values=cache).sequences
        turn = {"input_ids": torch.cat([ids, ids[:, :2]], 1), "past_key_values": cache}
        with (
            handle.use_scores(scores),
            pytest.raises(NotImplementedError, match="scores are given by use_scores"),
        ):
            model.generate(**turn, **GENERATE)


@v5
def test_a_forward_outside_generate(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    with va.enable(model, MERGED), pytest.raises(NotImplementedError, match="the model was called by itself"):
        model(**batch)


@v5
def test_a_part_that_does_not_generate(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, _ = ready
    with pytest.raises(ValueError, match="enable the model whose generate"):
        va.enable(find_multimodal_model(model), MERGED)
    va.enable(model, CONFIG).disable()  # nothing was left behind


@v5
def test_fewer_tokens_than_frames(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    for keep in (2, 0.1):
        with (
            va.enable(model, replace(CONFIG, keep=keep)),
            pytest.raises(ValueError, match=r"of 12 visual tokens for 3 frames or images: .*keep=3 or 0\.25"),
        ):
            model.generate(**batch, **GENERATE)
    with va.enable(model, replace(CONFIG, keep=3)):
        assert model.generate(**batch, **GENERATE).past_key_values.get_seq_length() == 15


@v5
def test_a_cache_cropped_inside_the_prompt(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    cache = DynamicCache(config=model.config.get_text_config())
    with va.enable(model, MERGED):
        ids = model.generate(**batch, **GENERATE, past_key_values=cache).sequences
        with pytest.raises(RuntimeError, match="the cache was cropped to 8 positions, inside a prompt of"):
            cache.crop(8 - cache.get_seq_length())
        with pytest.raises(RuntimeError, match="inside a prompt of"):
            model.generate(ids, **GENERATE, past_key_values=cache)


@v5
def test_a_merged_cache_continued_without_keep(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    cache = DynamicCache(config=model.config.get_text_config())
    with va.enable(model, MERGED):
        ids = model.generate(**batch, **GENERATE, past_key_values=cache).sequences
    with va.enable(model, CONFIG), pytest.raises(RuntimeError, match="this cache holds merged tokens"):
        model.generate(ids, **GENERATE, past_key_values=cache)


@v5
def test_a_merged_cache_in_a_loop_of_ones_own(ready: tuple[Any, dict[str, Tensor]]) -> None:
    """Positions would be counted by the short cache: they have to be given."""
    model, batch = ready
    cache = DynamicCache(config=model.config.get_text_config())
    with va.enable(model, MERGED), torch.no_grad():
        out = model.generate(**batch, **GENERATE, past_key_values=cache)
        step = {"input_ids": out.sequences[:, -1:], "past_key_values": cache}
        with pytest.raises(NotImplementedError, match="was given no position_ids"):
            model(**step)
        model(**step, position_ids=torch.tensor([[out.sequences.shape[1] - 1]]))


@v5
def test_hidden_visual_tokens(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    batch["attention_mask"][0, :6] = 0
    with va.enable(model, MERGED), pytest.raises(ValueError, match="the attention_mask hides visual tokens"):
        model.generate(**batch, **GENERATE)


@v5
def test_ids_that_do_not_fit_the_cache(ready: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = ready
    cache = DynamicCache(config=model.config.get_text_config())
    with va.enable(model, MERGED):
        model.generate(**batch, **GENERATE, past_key_values=cache)
        with pytest.raises(ValueError, match="give all ids, or new ones with the attention_mask of all"):
            model.generate(torch.tensor([[5, 6, 7]]), **GENERATE, past_key_values=cache)


@v5
@pytest.mark.parametrize("option", ["token_healing", "assistant_early_exit"])
def test_options_that_look_at_the_prompt(ready: tuple[Any, dict[str, Tensor]], option: str) -> None:
    model, batch = ready
    with va.enable(model, MERGED), pytest.raises(NotImplementedError, match=f"of a prompt under {option}"):
        model.generate(**batch, **GENERATE, **{option: 1})


@v5
def test_images_and_videos_at_one_token() -> None:
    model = build("glm4v")
    batch = tiny.inputs("glm4v", ONE)
    images = {"pixel_values": batch["pixel_values_videos"][:16], "image_grid_thw": torch.tensor([[1, 4, 4]])}
    types = batch["mm_token_type_ids"].clone()
    types[0, (types[0] == 2).nonzero()[:4, 0]] = 1
    videos = {"pixel_values_videos": batch["pixel_values_videos"][16:], "video_grid_thw": torch.tensor([[2, 4, 4]])}
    prompt = {**batch, **images, **videos, "mm_token_type_ids": types}
    with va.enable(model, MERGED), pytest.raises(NotImplementedError, match="puts images and videos at one token"):
        model.generate(**prompt, **GENERATE)


@v5
def test_nothing_is_left_after_disable(ready: tuple[Any, dict[str, Tensor]]) -> None:
    """Nor after a run that failed; and the next run within is as the first."""
    model, batch = ready
    before = set(vars(model))
    with va.enable(model, MERGED):
        first = model.generate(**batch, **GENERATE)
        wrong = {**batch, "pixel_values": batch["pixel_values"][:2]}
        with pytest.raises(ValueError, match="features were made for them"):
            model.generate(**wrong, **GENERATE)
        again = model.generate(**batch, **GENERATE)
        two = model.generate(**tiny.inputs("internvl", TWO), **GENERATE)
    assert set(vars(model)) == before
    assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))
    assert len(two.sequences) == 2
