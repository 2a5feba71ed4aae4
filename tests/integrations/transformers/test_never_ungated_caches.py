"""Caches, and passes of one token, that once ran ungated or wrongly gated without a word."""

import copy
import pickle
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE, assert_same, generate_dense, merged_embeddings, merged_scores
from gated_prompts import CONFIG, ONE, PREFILL, TWO, text_after
from torch import Tensor
from transformers import DynamicCache, StaticCache

import videoanchor_triton as va

v5 = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 cannot prefill a video in chunks")


# Caches


def test_cache_prefilled_before_enable(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        with va.enable(model, CONFIG), pytest.raises(RuntimeError, match="not filled with VideoAnchor enabled"):
            model(**text_after(batch), past_key_values=cache)


def test_cache_rebuilt_from_its_tensors(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(RuntimeError, match="rebuilt from its tensors"):
            model(**text_after(batch), past_key_values=rebuilt)


def test_scores_for_a_cache_that_has_none(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """use_scores says what the positions of a rebuilt cache are, for a step of any length."""
    model, batch = internvl
    scores = merged_scores(model, batch)
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        for n in (1, 3):
            rebuilt = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
            step = text_after(batch, n)
            expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
            with handle.use_scores(scores):
                out = model(**step, past_key_values=rebuilt).logits
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("stored", [False, True], ids=["same", "pickled"])
def test_gated_cache_continued_after_the_block(backbone: tuple[str, Any], stored: bool) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with torch.no_grad():
        with va.enable(model, CONFIG):
            cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
            expected = model(**text_after(batch), past_key_values=copy.deepcopy(cache)).logits
        if stored:
            cache = pickle.loads(pickle.dumps(cache))
        with pytest.raises(RuntimeError, match="has none: continue it within"):
            model(**text_after(batch), past_key_values=copy.deepcopy(cache))
        with va.enable(model, CONFIG):
            out = model(**text_after(batch), past_key_values=cache).logits
    torch.testing.assert_close(out, expected)


def test_cache_of_text_that_went_on_without_the_gate(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """Text may go on anywhere; but what came without the gate may have been a video."""
    model, batch = internvl
    text = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        with va.enable(model, CONFIG):
            cache = model(**text, past_key_values=DynamicCache(), use_cache=True).past_key_values
        positions = {"position_ids": torch.arange(6, 6 + batch["input_ids"].shape[1])[None]}
        if not tiny.V5:
            positions["cache_position"] = positions["position_ids"][0]
        batch["attention_mask"] = torch.ones(1, 6 + batch["input_ids"].shape[1], dtype=torch.long)
        model(**batch, **positions, past_key_values=cache, use_cache=True)
        with va.enable(model, CONFIG), pytest.raises(RuntimeError, match="not filled with VideoAnchor enabled"):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True)


def test_second_turn_of_merged_embeddings(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    embeds = merged_embeddings(model, batch)
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        n = embeds.shape[1]
        extra = {} if tiny.V5 else {"cache_position": torch.arange(n, 2 * n)}
        with pytest.raises(ValueError, match="use_scores"):
            model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **extra)


def test_reset_forgets_the_scores(backbone: tuple[str, Any]) -> None:
    """A prompt of one token after a reset is not gated by the prompt before it."""
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    one = {"input_ids": torch.tensor([[20]]), "use_cache": True}
    if name.startswith("qwen"):
        one["position_ids"] = torch.zeros(3, 1, 1, dtype=torch.long)
    if not tiny.V5:
        one["cache_position"] = torch.tensor([0])
    text = model.config.get_text_config()
    with va.enable(model, CONFIG), torch.no_grad():
        cache = StaticCache(config=text, max_cache_len=40)
        model(**batch, past_key_values=cache, use_cache=True)
        cache.reset()
        out = model(**one, past_key_values=cache).logits
        expected = model(**one, past_key_values=StaticCache(config=text, max_cache_len=40)).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_crop_and_growth_behind_a_pass(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        held = cache.videoanchor_scores.scores
        cache.crop(7 if not tiny.V5 else 7 - batch["input_ids"].shape[1])
        assert cache.videoanchor_scores.scores.shape[1] == 7
        assert torch.equal(cache.videoanchor_scores.scores, held[:, :7])


# Passes of one token


@v5
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("prompts", [ONE, TWO], ids=["one", "two"])
def test_chunks_of_one_token(backbone: tuple[str, Any], prompts: list[tiny.Prompt], static: bool) -> None:
    name, model = backbone
    batch = tiny.inputs(name, prompts)
    expected = generate_dense(model, batch, merged_scores(model, batch))
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with va.enable(model, CONFIG):
        out = model.generate(**batch, **GENERATE, prefill_chunk_size=1, **options)
    assert_same(out, expected)


@v5
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_last_chunk_of_one_token_belongs_to_the_prompt(backbone: tuple[str, Any], static: bool) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    n = batch["input_ids"].shape[1]
    expected = generate_dense(model, batch, merged_scores(model, batch), "prefill")
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}
    for chunk in (1, n - 1):
        with va.enable(model, PREFILL):
            out = model.generate(**batch, **GENERATE, prefill_chunk_size=chunk, **options)
        assert_same(out, expected)


def test_given_scores_with_a_static_cache(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    scores = torch.rand(batch["input_ids"].shape)
    expected = generate_dense(model, batch, scores)
    chunks = (None, 1, 4) if tiny.V5 else (None,)
    for chunk in chunks:
        with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
            out = model.generate(
                **batch, **GENERATE, cache_implementation="static", disable_compile=True, prefill_chunk_size=chunk
            )
        assert_same(out, expected)
