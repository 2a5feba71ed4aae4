"""An engine with the plug-in answers what a dense gate, and `va.enable`, answer in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_triton import install
from safetensors.torch import save_file
from vllm_media import GATED, QWEN
from vllm_reference import Reference
from vllm_runs import assert_answers, run_engine

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def reference(qwen: Path) -> Reference:
    return Reference(qwen)


def preemptions(out: dict[str, Any]) -> int:
    return out["metrics"]["vllm:num_preemptions"]


def test_chunks_prefix_cache_and_encoder_cache(qwen: Path, reference: Reference, tmp_path: Path) -> None:
    """Chunks cut the videos, the second round meets blocks of the first, and each item is scored once."""
    out = run_engine(tmp_path, qwen, rounds=2, max_num_batched_tokens=64)
    assert_answers(out, reference, "dense")
    assert_answers(out, reference, "enable")
    (model,) = out["models"]
    assert model["class"] == "GatedQwen2_5_VLForConditionalGeneration"
    assert model["gated"] == 4
    assert model["scored"]["items"] == 4  # of 13 in each round
    assert model["scored"]["unscored"] == 0
    assert max(one["cached"] for one in out["rounds"][1].values()) >= 96


def test_preemption(qwen: Path, reference: Reference, tmp_path: Path) -> None:
    out = run_engine(tmp_path, qwen, n=40, rounds=2, num_gpu_blocks_override=13, max_model_len=256)
    assert preemptions(out) > 0
    assert_answers(out, reference, "dense")


def test_without_the_key_vllm_is_as_it_was(qwen: Path, reference: Reference, tmp_path: Path) -> None:
    """Neither its numbers nor its kernels, which write the cache in a layout of their own."""
    out = run_engine(tmp_path, qwen, gate=None)
    assert_answers(out, reference, "ungated")
    assert out["models"][0]["gated"] == 0
    with pytest.raises(AssertionError):
        assert_answers(out, reference, "dense")


def test_two_processes(qwen: Path, reference: Reference, tmp_path: Path) -> None:
    """Tensor parallel: the first process scores, the second receives."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    out = run_engine(tmp_path, qwen, env=env, tensor_parallel_size=2)
    assert_answers(out, reference, "dense")
    first, second = out["models"]
    assert (first["scored"]["items"], second["scored"]["items"]) == (4, 0)


@pytest.mark.parametrize(
    "options", [{}, {"num_gpu_blocks_override": 19, "block_size": 16}], ids=["chunks", "preempted"]
)
def test_as_on_a_gpu(qwen: Path, reference: Reference, tmp_path: Path, options: dict[str, Any]) -> None:
    """vLLM's second model runner, its Triton metadata, and our kernels over pages, all in Triton's interpreter."""
    path = str(install(tmp_path / "path"))
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    out = run_engine(tmp_path, qwen, "FEW", n=20, env=env, max_num_batched_tokens=64, max_model_len=256, **options)
    assert out["models"][0]["attention"] == ["InterpretedTritonImpl"]
    assert "vllm.v1.worker.gpu.model_runner" in out["runner"]
    assert (preemptions(out) > 0) == bool(options)
    assert_answers(out, reference, "dense", "FEW")


def test_adapter(qwen: Path, tmp_path: Path) -> None:
    """LoRA on the decoder's projections of queries and values, against a reference whose weights have it added."""
    reference, adapter, weights = Reference(qwen), tmp_path / "adapter", {}
    rank, strength = 4, 8
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": strength, "target_modules": ["q_proj", "v_proj"]}
    settings |= {"bias": "none", "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(3)
    for n, layer in enumerate(reference.model.model.language_model.layers):
        for name in settings["target_modules"]:
            linear = getattr(layer.self_attn, name)
            down = torch.randn(rank, linear.in_features, generator=generator) * 0.1
            up = torch.randn(linear.out_features, rank, generator=generator) * 0.1
            linear.weight.data += strength / rank * up @ down
            key = f"base_model.model.model.language_model.layers.{n}.self_attn.{name}"
            weights |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(weights, adapter / "adapter_model.safetensors")
    out = run_engine(tmp_path, qwen, "FEW", lora=adapter, enable_lora=True, max_lora_rank=8)
    assert_answers(out, reference, "dense", "FEW")


def test_an_item_that_cannot_be_scored(qwen: Path, reference: Reference, tmp_path: Path) -> None:
    """It is served ungated and counted; the engine goes on, and the other items keep their gates."""
    out = run_engine(tmp_path, qwen, gate=GATED | {"scorer": "vllm_media:failing"})
    scored = out["models"][0]["scored"]
    assert (scored["items"], scored["unscored"]) == (4, 1)
    answers = out["rounds"][0]
    for name in ("video A", "image", "videos A and C", "video B"):
        how = "ungated" if name == "video B" else "dense"
        assert answers[name]["tokens"] == reference.answer(QWEN[name], answers[name]["prompt"], 12, how).tokens, name
