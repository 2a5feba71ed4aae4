"""enable(): what it refuses, what it leaves behind, and the implementation without it."""

import gc
import logging
import weakref
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
import transformers as hf
from dense_eager import GENERATE, pseudo_scores

import videoanchor_triton as va
from videoanchor_triton.integrations.transformers import attention

CONFIG = va.VideoAnchorConfig(alpha_k=1.7, alpha_v=1.3, scorer=pseudo_scores)


@pytest.fixture
def model() -> Any:
    model = tiny.build("qwen2_5_vl")
    model.set_attn_implementation("sdpa")
    return model


def test_twice_is_refused_and_disable_twice_is_not(model: Any) -> None:
    handle = va.enable(model, CONFIG)
    with pytest.raises(ValueError, match="enabled already"):
        va.enable(model, CONFIG)
    handle.disable()
    handle.disable()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)
    va.enable(model, CONFIG).disable()


def test_model_without_visual_tokens() -> None:
    text = hf.Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no visual tokens"):
        va.enable(hf.Qwen2ForCausalLM(text), CONFIG)


def test_config_of_another_type(model: Any) -> None:
    with pytest.raises(TypeError, match="VideoAnchorConfig"):
        va.enable(model, {"alpha_k": 1.0})  # pyright: ignore[reportArgumentType]


def test_failing_scorer_leaves_nothing_stale(model: Any) -> None:
    def failing(_tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("scorer failed")

    batch, text = tiny.inputs("qwen2_5_vl", [[3, "V", 5]]), tiny.inputs("qwen2_5_vl", [[3, 4, 5]])
    ungated = model.generate(**text, **GENERATE)
    config = va.VideoAnchorConfig(alpha_k=1.7, alpha_v=1.3, scorer=failing)
    with va.enable(model, config):
        with pytest.raises(RuntimeError, match="scorer failed"):
            model.generate(**batch, **GENERATE)
        after = model.generate(**text, **GENERATE)
    assert torch.equal(after.sequences, ungated.sequences)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(ungated.logits))


def test_failing_vision_leaves_nothing_stale(model: Any) -> None:
    batch, text = tiny.inputs("qwen2_5_vl", [[3, "V", 5]]), tiny.inputs("qwen2_5_vl", [[3, 4, 5]])
    broken = {**batch, "pixel_values_videos": batch["pixel_values_videos"][:-16]}
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model(**broken)
        model(**text)
        assert handle.last == []


def test_scores_outside_the_unit_interval_are_refused(model: Any) -> None:
    config = va.VideoAnchorConfig(alpha_k=1.7, alpha_v=1.3, scorer=lambda tokens: torch.full((len(tokens),), -2.0))
    with va.enable(model, config), pytest.raises(ValueError, match="scorer"):
        model.generate(**tiny.inputs("qwen2_5_vl", [[3, "V", 5]]), **GENERATE)


def test_assisted_decoding_with_the_gate_in_the_prompt_only_is_refused(model: Any) -> None:
    batch = tiny.inputs("qwen2_5_vl", [[3, "V", 5]])
    config = va.VideoAnchorConfig(alpha_k=1.7, alpha_v=1.3, scorer=pseudo_scores, decode="prefill")
    with va.enable(model, config), pytest.raises(NotImplementedError, match="assisted decoding"):
        model.generate(**batch, **GENERATE, prompt_lookup_num_tokens=3)


def test_assistance_by_a_positional_config_is_seen(model: Any) -> None:
    batch = tiny.inputs("qwen2_5_vl", [[3, "V", 5]])
    config = va.VideoAnchorConfig(alpha_k=1.7, alpha_v=1.3, scorer=pseudo_scores, decode="prefill")
    assisted = hf.GenerationConfig(prompt_lookup_num_tokens=3)
    with va.enable(model, config), pytest.raises(NotImplementedError, match="assisted decoding"):
        model.generate(batch.pop("input_ids"), assisted, **batch)


def test_an_enabled_model_that_is_dropped_is_freed() -> None:
    model = tiny.build("qwen2_5_vl")
    handle = va.enable(model, CONFIG)
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_a_failing_enable_leaves_no_trace(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_implementation: object) -> None:
        raise RuntimeError("no such attention")

    monkeypatch.setattr(model, "set_attn_implementation", failing)
    with pytest.raises(RuntimeError, match="no such attention"):
        va.enable(model, CONFIG)
    monkeypatch.undo()
    assert "generate" not in vars(model)
    assert not model.base_model._forward_pre_hooks
    va.enable(model, CONFIG).disable()


def test_continuous_batching_is_refused(model: Any) -> None:
    with va.enable(model, CONFIG), pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2, 3]])


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 has another interface")
@pytest.mark.parametrize("whole", [False, True], ids=["language-model", "whole-model"])
def test_continuous_batching_without_enable_says_so(model: Any, whole: bool) -> None:
    name = "videoanchor_triton"
    model.set_attn_implementation(name if whole else {"text_config": name})
    options = hf.GenerationConfig(max_new_tokens=2)
    if whole:
        with pytest.raises(ValueError, match="not supported for continuous batching"):
            model.generate_batch([[1, 2, 3]], generation_config=options)
    else:
        (result,) = model.generate_batch([[1, 2, 3]], generation_config=options).values()
        assert result.generated_tokens == []
        assert "takes no continuous batching" in result.error


def test_softcap_of_the_layer_is_used() -> None:
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    gamma_k = 1 + torch.rand(1, 5)
    gate = attention.LayerGate(log_gamma_k=gamma_k.log())
    module = torch.nn.Module()
    out, _ = attention.attention_forward(
        module, query, key, key, None, scaling=1.0, is_causal=True, softcap=2.0, videoanchor_gate=gate
    )
    logits = 2 * torch.tanh(query @ key.transpose(2, 3) / 2) + gamma_k.log()
    logits = logits.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(out, (logits.softmax(-1) @ key).transpose(1, 2), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="softcap under a 4-D mask"):
        attention.attention_forward(
            module, query, key, key, torch.ones(1, 1, 5, 5).bool(), is_causal=True, softcap=2.0, videoanchor_gate=gate
        )


def test_layers_that_are_not_causal_stay_so() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16)
    gamma_k = 1 + torch.rand(1, 5)
    gate = attention.LayerGate(log_gamma_k=gamma_k.log())
    out, _ = attention.attention_forward(
        torch.nn.Module(), query, key, key, None, scaling=0.5, is_causal=False, videoanchor_gate=gate
    )
    expected = (query @ key.transpose(2, 3) / 2 + gamma_k.log()).softmax(-1) @ key
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=0)


def test_features_without_a_place_are_refused(model: Any) -> None:
    batch = tiny.inputs("qwen2_5_vl", [[3, "V", 5]])
    batch["input_ids"][batch["input_ids"] == tiny.VIDEO] = 7
    with va.enable(model, CONFIG), pytest.raises(ValueError, match="no token of theirs in the prompt"):
        model(**batch)


def test_attention_dropout_is_refused() -> None:
    model = tiny.build("internvl", attention_dropout=0.5).train()
    with va.enable(model, CONFIG), pytest.raises(ValueError, match="dropout"):
        model(**tiny.inputs("internvl", [[3, "V", 5]]))


def test_gradients_pass_the_gate(model: Any) -> None:
    batch = tiny.inputs("qwen2_5_vl", [[3, "V", 5]])
    with va.enable(model, CONFIG):
        model(**batch, use_cache=False).logits.square().mean().backward()
    gradient = model.base_model.language_model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_without_enable_it_is_ungated_and_says_so_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny.inputs("qwen2_5_vl", [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]])
    expected = model.generate(**batch, **GENERATE)
    said: list[str] = []
    logging.Logger.warning_once.cache_clear()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(attention.logger, "warning", lambda text, *_args, **_kwargs: said.append(text))
    model.set_attn_implementation({"text_config": "videoanchor_triton"})
    out = model.generate(**batch, **GENERATE)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
    assert len(said) == 1
    assert "ungated" in said[0]


def test_as_the_implementation_of_the_whole_model() -> None:
    """One name for all parts: the vision tower then runs plain SDPA."""
    batch = tiny.inputs("llava_onevision", [[3, 4, "V", 5]])
    model = tiny.build("llava_onevision")
    model.set_attn_implementation("sdpa")
    expected = model.generate(**batch, **GENERATE)
    model.set_attn_implementation("videoanchor_triton")
    assert model.config.vision_config._attn_implementation == "videoanchor_triton"
    out = model.generate(**batch, **GENERATE)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["bool", "additive"])
def test_own_four_dimensional_mask(model: Any, shape: str) -> None:
    """A caller's dense mask takes the dense path, gate included: the same logits as the mask that it spells out."""
    batch = tiny.inputs("qwen2_5_vl", [[3, 4, "V", 5, 6]])
    n = batch["input_ids"].shape[1]
    visible = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    positions = torch.arange(n)[None, None].expand(3, 1, n)
    with va.enable(model, CONFIG), torch.no_grad():
        expected = model(**batch, position_ids=positions, use_cache=False).logits
        mask = visible if shape == "bool" else torch.zeros(1, 1, n, n).masked_fill(~visible, float("-inf"))
        out = model(**{**batch, "attention_mask": mask}, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_rows_that_a_dense_mask_hides_wholly_are_zero() -> None:
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 4, 16)
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 1, :] = False
    gate = attention.LayerGate(log_gamma_k=torch.tensor([[3.0, 1.0, 2.0, 1.0]]).log())
    out, _ = attention.attention_forward(
        torch.nn.Module(), query, key, key, mask, is_causal=True, videoanchor_gate=gate
    )
    assert (out[:, 1] == 0).all()
    assert (out[:, [0, 2]] != 0).all()


def test_scaling_of_the_layer_is_used() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    gamma_k = 1 + torch.rand(1, 7)
    gate = attention.LayerGate(log_gamma_k=gamma_k.log())
    out, weights = attention.attention_forward(
        torch.nn.Module(), query, key, value, None, scaling=0.7, is_causal=True, videoanchor_gate=gate
    )
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.7
    logits[..., :7] += gamma_k.log()
    logits = logits.masked_fill(torch.ones(5, 9, dtype=torch.bool).triu(5), float("-inf"))
    expected = (logits.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert weights is None


@pytest.mark.parametrize("given", ["no-mask", "mask-of-the-prompt", "mask-of-the-whole-cache"])
def test_static_cache_by_hand(model: Any, given: str) -> None:
    """Queries end where the filled part of the cache ends, however the mask comes."""
    batch = tiny.inputs("qwen2_5_vl", [[3, 4, "V", 5, 6]])
    n, room = batch["input_ids"].shape[1], 40
    mask = batch.pop("attention_mask")
    if given != "no-mask":
        batch["attention_mask"] = mask if given == "mask-of-the-prompt" else F.pad(mask, (0, room - n))
    positions = torch.arange(n)[None, None].expand(3, 1, n)
    with va.enable(model, CONFIG), torch.no_grad():
        text_config = model.config.get_text_config()
        cache = hf.StaticCache(config=text_config, max_cache_len=room)
        out = model(**batch, position_ids=positions, past_key_values=cache, use_cache=True).logits
        batch.pop("attention_mask", None)
        expected = model(**batch, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
