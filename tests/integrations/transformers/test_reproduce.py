"""reproduce(): the gate in the authors' arithmetic against a dense one written from their description."""

from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE, pseudo_scores
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import videoanchor_triton as va

ALPHA_Q, ALPHA_K, ALPHA_V = 4.0, 9.5, 2.5
TOLERANCE = 1e-4
state: dict[str, Tensor | None] = {"scores": None}


def authors_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    is_causal: bool | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Factors in bfloat16, 1e-6 in each logarithm, the gate off for a single query; one prompt at a time."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[2]]
    scores = state["scores"]
    if (is_causal if is_causal is not None else module.is_causal) and scores is not None and query.shape[2] > 1:
        scores = scores[0].bfloat16()
        logits = logits + torch.log((1.0 + ALPHA_Q * scores) + 1e-6).view(1, 1, -1, 1)
        logits = logits + torch.log((1.0 + ALPHA_K * scores) + 1e-6).view(1, 1, 1, -1)
        value = value * (1.0 + ALPHA_V * scores).view(1, 1, -1, 1)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("authors", authors_attention)
AttentionMaskInterface.register("authors", eager_mask)


def scores_of(name: str, batch: dict[str, Tensor], scores: Tensor) -> Tensor:
    placed = torch.zeros(batch["input_ids"].shape)
    token = tiny.IMAGE if name == "internvl" else tiny.VIDEO
    placed[batch["input_ids"] == token] = scores
    return placed


@pytest.mark.parametrize("scorer", ["ssc", pseudo_scores], ids=["ssc", "function"])
@pytest.mark.parametrize("name", tiny.BACKBONES)
def test_logits_are_the_authors(name: str, scorer: Any) -> None:
    model = tiny.build(name)
    model.set_attn_implementation("sdpa")
    batch = tiny.inputs(name, [[3, 4, "V", 5, 6]])
    exact = va.VideoAnchorConfig.preset("internvl2-8b", scorer=scorer, n_clusters=3, pca_rank=6)
    with va.enable(model, exact.reproduce()) as handle:
        out = model.generate(**batch, **GENERATE)
    with va.enable(model, exact):
        other = model.generate(**batch, **GENERATE)
    assert handle.last[0] is not None
    state["scores"] = scores_of(name, batch, handle.last[0].scores)
    model.set_attn_implementation("authors")
    try:
        expected = model.generate(**batch, **GENERATE)
    finally:
        state["scores"] = None
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)
    difference = (other.logits[0] - out.logits[0]).abs().max()
    assert difference > 10 * TOLERANCE, "the arithmetic shows, so the comparison can fail"


@pytest.mark.parametrize("reproduce", [False, True])
def test_only_the_video_of_a_prompt_with_both(reproduce: bool) -> None:
    model = tiny.build("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", [[3, tiny.VISION_START, *[tiny.IMAGE] * 4, tiny.VISION_END, "V", 5]])
    batch["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    config = va.VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, scorer=pseudo_scores)
    with va.enable(model, config.reproduce() if reproduce else config) as handle:
        model.generate(**batch, **GENERATE)
    assert handle.last[0] is not None
    assert len(handle.last[0].scores) == tiny.FRAMES * 4 + (0 if reproduce else 4)
