"""Each backbone in vLLM, chunked and with prefix caching, against a dense gate in transformers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_checkpoints
from vllm_reference import Reference
from vllm_runs import assert_answers, run_engine

from videoanchor_triton.integrations.vllm.step_gates import detach

pytestmark = pytest.mark.timeout(900)
MODELS = {
    "qwen2_vl": ("GatedQwen2VLForConditionalGeneration", "QWEN"),
    "qwen3_vl": ("GatedQwen3VLForConditionalGeneration", "QWEN"),
    "internvl": ("GatedInternS1ForConditionalGeneration", "INTERNVL"),
    "llava_onevision": ("GatedLlavaOnevisionForConditionalGeneration", "LLAVA"),
    "llava_next_video": ("GatedLlavaNextVideoForConditionalGeneration", "TAGGED"),
}


@pytest.mark.parametrize("measuring", [False, True])
def test_items_with_a_leading_axis(measuring: bool) -> None:
    """As LLaVA-OneVision's, where videos of several lengths are encoded together."""
    from videoanchor_triton.integrations.vllm.models import Gated

    items = [torch.rand(1, 3, 4), torch.rand(2, 4)]

    class Base:
        def embed_multimodal(self, **_: object) -> list[torch.Tensor]:
            return items

    class Model(Gated, Base):
        def __init__(self) -> None:
            self.step_gates = SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
            self._layers = [SimpleNamespace(kv_cache=torch.zeros(0 if measuring else 1))]  # pyright: ignore[reportAttributeAccessIssue]

        def _score(self, item: torch.Tensor) -> torch.Tensor:
            assert item.ndim == 2
            return item[:, 0]

    for (found, scores), item in zip(map(detach, Model().embed_multimodal()), items, strict=True):
        assert torch.equal(found, item.reshape(-1, 4))
        assert torch.equal(scores, torch.zeros(len(found)) if measuring else found[:, 0])


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
