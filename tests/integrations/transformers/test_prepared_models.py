"""Models that were compiled, wrapped, quantised, cast or set to train, under the gate."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense_eager
import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE, assert_same, build, generate_dense, merged_scores
from gated_prompts import CONFIG, ONE, TWO
from torch import Tensor
from transformers import BitsAndBytesConfig

import videoanchor_triton as va


def test_gradient_checkpointing() -> None:
    """The layers that run again in backward see the same gate."""
    batch = tiny.inputs("qwen2_5_vl", TWO)

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = build("qwen2_5_vl").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with va.enable(model, CONFIG):
            model(**batch, use_cache=False).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    """The gate in half precision is off from fp32 by no more than twice what the dense eager model is."""
    model = build("llava_onevision")
    batch = tiny.inputs("llava_onevision", TWO)
    scores = merged_scores(model, batch)
    exact = generate_dense(model, batch, scores, max_new_tokens=1).logits[0]
    model = model.to(dtype)
    eager = generate_dense(model, batch, scores, max_new_tokens=1).logits[0]
    with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
        ours = model.generate(**batch, **{**GENERATE, "max_new_tokens": 1}).logits[0]
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def _compile(model: Any, what: str) -> Any:
    base = model.base_model
    compiled: Any = functools.partial(torch.compile, backend="eager")
    if what == "forward":
        model.forward = compiled(model.forward)
    elif what == "language-model":
        base.language_model = compiled(base.language_model)
    elif what == "layers":
        base.language_model.layers = torch.nn.ModuleList([compiled(layer) for layer in base.language_model.layers])
    return compiled(model) if what in ("model", "given-scores") else model


@pytest.mark.parametrize("what", ["model", "forward", "language-model", "layers", "given-scores"])
def test_compiled_before_enable(what: str) -> None:
    given = what == "given-scores"
    model = build("internvl", num_hidden_layers=2)
    batch = tiny.inputs("internvl", ONE)
    scores = torch.rand(batch["input_ids"].shape) if given else merged_scores(model, batch)
    expected = generate_dense(model, batch, scores)
    torch._dynamo.reset()
    compiled = _compile(model, what)
    with va.enable(compiled, CONFIG) as handle, handle.use_scores(scores) if given else nullcontext():
        out = compiled.generate(**batch, **GENERATE)
    assert_same(out, expected)


def _lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def _offloaded(folder: Path) -> Callable[[Any], Any]:
    def offload(model: Any) -> Any:
        accelerate = pytest.importorskip("accelerate")
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))

    return offload


@pytest.mark.parametrize("kind", ["peft", "disk-offload"])
def test_wrapped_models(kind: str, tmp_path: Path) -> None:
    model = build("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", TWO)
    wrapped = {"peft": _lora, "disk-offload": _offloaded(tmp_path)}[kind](model)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores)
    with va.enable(wrapped, CONFIG):
        out = wrapped.generate(**batch, **GENERATE)
    assert_same(out, expected)


def test_four_bit_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    build("internvl").save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = type(build("internvl")).from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    for layer in model.modules():  # on some CPUs layers are repacked for bf16 products, if their width allows
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    batch = tiny.inputs("internvl", TWO)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores)
    with va.enable(model, CONFIG):
        out = model.generate(**batch, **GENERATE)
    assert_same(out, expected)


def test_factors_move_once_to_each_device() -> None:
    from videoanchor_triton.integrations.transformers.attention import LayerGate

    gate = LayerGate(log_gamma_k=torch.rand(2, 5))
    meta = torch.device("meta")
    first, _ = gate.factors(2, 5, meta)
    second, _ = gate.factors(2, 4, meta)
    assert first is not None
    assert second is not None
    assert first.device == second.device == meta
    assert second._base is first._base or second._base is first
    assert dense_eager.state["scores"] is None


def test_a_prompts_logarithm_is_taken_once_and_read_where_it_lies() -> None:
    from videoanchor_triton.integrations.transformers.cache_scores import CacheScores

    held = CacheScores(torch.rand(2, 9))
    gate = held.gate(CONFIG)
    assert held.gate(CONFIG) is gate
    assert gate.log_gamma_k is not None
    torch.testing.assert_close(gate.log_gamma_k, (1 + CONFIG.alpha_k * held.scores).log())
    for filled, window in ((9, 9), (12, 5)):  # a prompt, and a later step of a sliding-window layer
        log_gamma_k, _ = replace(gate, n_positions=filled).factors(2, window, torch.device("cpu"))
        assert log_gamma_k is not None
        assert log_gamma_k.shape == (2, min(9 - filled + window, window))
        assert log_gamma_k.data_ptr() == gate.log_gamma_k[:, filled - window :].data_ptr()
