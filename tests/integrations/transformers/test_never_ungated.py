"""What once ran ungated, or wrongly gated, without a word: each is right now, or raises one sentence."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE, assert_same, build, generate_dense, merged_embeddings, merged_scores
from gated_prompts import CONFIG, ONE, PREFILL
from torch import Tensor
from transformers import DynamicCache

import videoanchor_triton as va
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

v5 = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 cannot prefill a video in chunks")


# Passes that no hook could gate


def test_another_attention_set_while_enabled(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    with va.enable(model, CONFIG):
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="set to 'sdpa' while VideoAnchor is enabled"):
            model.generate(**tiny.inputs(name, ONE), **GENERATE)


def test_language_model_called_by_itself(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    embeds, scores = merged_embeddings(model, batch), merged_scores(model, batch)
    text = model.base_model.language_model
    positions = torch.arange(embeds.shape[1])[None]
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        with pytest.raises(RuntimeError, match="called by itself"):
            text(inputs_embeds=embeds)
        with pytest.raises(RuntimeError, match="called by itself"):
            text(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        with handle.use_scores(scores):
            gated = text(inputs_embeds=embeds, use_cache=False).last_hidden_state
    plain = text(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert (gated - plain).abs().max() > 0.1


@pytest.mark.parametrize("part", ["base", "language-model", "layer"])
def test_forward_called_without_hooks(backbone: tuple[str, Any], part: str) -> None:
    name, model = backbone
    batch, hidden = tiny.inputs(name, ONE), torch.randn(1, 4, 64)
    text = model.base_model.language_model
    positions = torch.arange(4).expand((3, 1, 4) if name.startswith("qwen") else (1, 4))
    layer: dict[str, Any] = {"position_embeddings": text.rotary_emb(hidden, positions), "position_ids": positions}
    calls: dict[str, Callable[[], Any]] = {
        "base": lambda: find_multimodal_model(model).forward(**batch),
        "language-model": lambda: text.forward(inputs_embeds=hidden),
        "layer": lambda: text.layers[0](hidden, **layer),
    }
    calls[part]()
    with va.enable(model, CONFIG), pytest.raises(RuntimeError, match=r"by itself|got no gate"):
        calls[part]()


def test_pixels_by_position(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    base = find_multimodal_model(model)
    del batch["attention_mask"]
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        expected = base(**batch, use_cache=False).last_hidden_state
        handle.last = []
        by_position = base(batch["input_ids"], batch["pixel_values"], use_cache=False).last_hidden_state
        assert handle.last[0] is not None
    torch.testing.assert_close(by_position, expected)


def test_features_under_a_name_that_nobody_knows(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """What the forward encodes is visual, however its pixels are called."""
    model, batch = internvl
    base = find_multimodal_model(model)
    pixels = batch.pop("pixel_values")
    forward = base.forward

    def renamed(*args: Any, frames: Tensor, **kwargs: Any) -> Any:
        return forward(*args, pixel_values=frames, **kwargs)

    with va.enable(model, CONFIG), torch.no_grad():
        expected = base(**batch, pixel_values=pixels, use_cache=False).last_hidden_state
        base.forward = renamed
        out = base(**batch, frames=pixels, use_cache=False).last_hidden_state
        del base.forward
    torch.testing.assert_close(out, expected)


# Ways of generating


@v5
def test_chunks_for_a_model_enabled_in_part(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with va.enable(model.base_model, CONFIG):
        with pytest.raises(RuntimeError, match="enable the model whose generate"):
            model.generate(**batch, **GENERATE, prefill_chunk_size=5)
        whole = model.generate(**batch, **GENERATE)
    assert_same(whole, generate_dense(model, batch, merged_scores(model, batch)))


@v5
def test_chunks_of_features_at_other_tokens_are_refused() -> None:
    """GLM-4V's video stands at image tokens, by which transformers does not cut it: it would lose it."""
    model = build("glm4v")
    batch = tiny.inputs("glm4v", ONE)
    with va.enable(model, CONFIG), pytest.raises(NotImplementedError, match="leave prefill_chunk_size out"):
        model.generate(**batch, **GENERATE, prefill_chunk_size=5)


@pytest.mark.parametrize(
    "option",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"use_mtp": True}, {"use_cache": False}],
    ids=lambda option: next(iter(option)),
)
def test_gate_in_the_prompt_only_refuses(internvl: tuple[Any, dict[str, Tensor]], option: dict[str, Any]) -> None:
    model, batch = internvl
    with va.enable(model, PREFILL), pytest.raises(NotImplementedError, match='decode="prefill"'):
        model.generate(**batch, **GENERATE, **option)


def test_prompt_of_several_tokens_after_a_kept_cache_is_gated_in_prefill_mode(backbone: tuple[str, Any]) -> None:
    """A second turn of one token is a prompt, too."""
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    n = batch["input_ids"].shape[1]
    prefix = {
        key: value[:, : n - 1] if value.shape == batch["input_ids"].shape else value for key, value in batch.items()
    }
    rest = {key: value for key, value in batch.items() if not key.startswith("pixel")}
    expected = generate_dense(model, batch, merged_scores(model, batch), "prefill")
    with va.enable(model, PREFILL), torch.no_grad():
        cache = model(**prefix, past_key_values=DynamicCache(), use_cache=True).past_key_values
        out = model.generate(**rest, **GENERATE, past_key_values=cache)
    assert_same(out, expected)


# State


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("part", ["model", "base"])
def test_copies_of_an_enabled_model(internvl: tuple[Any, Any], copied: Callable[[Any], Any], part: str) -> None:
    model, _ = internvl
    with va.enable(model, CONFIG), pytest.raises(TypeError, match=r"videoanchor_triton\.disable\(model\)"):
        copied(model if part == "model" else model.base_model)
    copied(model)


def test_lost_handle(internvl: tuple[Any, Any]) -> None:
    model, _ = internvl
    va.enable(model, CONFIG)
    va.disable(model)
    va.disable(model)
    va.enable(model, CONFIG).disable()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_disable_that_fails_leaves_the_rest_undone(
    internvl: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = internvl
    handle = va.enable(model, CONFIG)

    def failing(_implementation: object) -> None:
        raise RuntimeError("no such attention")

    monkeypatch.setattr(model, "set_attn_implementation", failing)
    with pytest.raises(RuntimeError, match="no such attention"):
        handle.disable()
    monkeypatch.undo()
    assert "generate" not in vars(model)
    assert not model.base_model._forward_pre_hooks
    assert inspect.ismethod(model.base_model.get_image_features)
    with va.enable(model, CONFIG):
        model.generate(**batch, **GENERATE)


def test_nested_given_scores(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    outer, inner = torch.rand(batch["input_ids"].shape), torch.rand(batch["input_ids"].shape)
    expected = {key: generate_dense(model, batch, scores) for key, scores in (("outer", outer), ("inner", inner))}
    with va.enable(model, CONFIG) as handle, handle.use_scores(outer):
        with handle.use_scores(inner):
            assert_same(model.generate(**batch, **GENERATE), expected["inner"])
        assert_same(model.generate(**batch, **GENERATE), expected["outer"])


def test_last_is_of_the_last_prompt(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    text = tiny.inputs("internvl", [[3, 4, 5]])
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        for prompt in (model.generate, model):
            model.generate(**batch, **GENERATE)
            assert handle.last[0] is not None
            prompt(**text)
            assert handle.last == []
            model(**batch)
            assert handle.last[0] is not None
            with handle.use_scores(torch.zeros(batch["input_ids"].shape)):
                prompt(**batch)
            assert handle.last == []
