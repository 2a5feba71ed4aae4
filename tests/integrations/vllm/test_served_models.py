"""Each backbone in vLLM, chunked and with prefix caching, against a dense gate in transformers."""

from pathlib import Path

import pytest
import vllm_checkpoints
from vllm_reference import Reference
from vllm_runs import assert_answers, run_engine

pytestmark = pytest.mark.timeout(900)
MODELS = {
    "qwen2_vl": ("GatedQwen2VLForConditionalGeneration", "QWEN"),
    "qwen3_vl": ("GatedQwen3VLForConditionalGeneration", "QWEN"),
    "internvl": ("GatedInternS1ForConditionalGeneration", "INTERNVL"),
    "llava_onevision": ("GatedLlavaOnevisionForConditionalGeneration", "LLAVA"),
    "llava_next_video": ("GatedLlavaNextVideoForConditionalGeneration", "TAGGED"),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / name
    getattr(vllm_checkpoints, name)(checkpoint)
    gated_class, requests = MODELS[name]
    media = {"video": 1} if name == "llava_next_video" else {"video": 2, "image": 2}
    out = run_engine(tmp_path, checkpoint, requests, rounds=2, max_num_batched_tokens=64, limit_mm_per_prompt=media)
    assert out["models"][0]["class"] == gated_class
    assert out["models"][0]["gated"] == 3
    reference = Reference(checkpoint)
    assert_answers(out, reference, "dense", requests)
    with pytest.raises(AssertionError):
        assert_answers(out, reference, "ungated", requests)
