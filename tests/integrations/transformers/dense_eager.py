"""An eager attention that materialises the gate, written from the paper's formula, to compare generate() with."""

from typing import Any

import tiny_models
import torch
import torch.nn.functional as F
from tiny_models import IMAGE, SUPPRESSED, VIDEO
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ALPHA_Q, ALPHA_K, ALPHA_V = 0.9, 1.7, 1.3
TOLERANCE = 1e-4
GENERATE = {
    "max_new_tokens": 6,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": SUPPRESSED,
}
state: dict[str, Any] = {"scores": None, "decode": "persist"}


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """softmax(scale * Q K^T + log(gamma_Q gamma_K^T) + mask) (gamma_V * V), scores of cache positions from `state`.
    Sinks are one more logit of each head, with a value of 0."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    n_queries, n_keys = query.shape[2], key.shape[2]
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask[..., :n_keys]
    causal = is_causal if is_causal is not None else module.is_causal
    scores: Tensor | None = state["scores"]
    if causal and scores is not None and not (state["decode"] == "prefill" and n_queries == 1):
        # `n_positions` positions are in the cache after this call, and a sliding-window layer sees the last `n_keys`.
        total = state["n_positions"] if state.get("n_positions") else n_keys
        s = F.pad(scores, (0, max(total - scores.shape[1], 0)))[:, total - n_keys : total]
        gamma_q, gamma_k, gamma_v = 1 + ALPHA_Q * s[:, n_keys - n_queries :], 1 + ALPHA_K * s, 1 + ALPHA_V * s
        logits = logits + torch.log(gamma_q[:, None, :, None] * gamma_k[:, None, None, :])
        value = (value * gamma_v[:, None, :, None]).to(value.dtype)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1, dtype=torch.float32).to(value.dtype)[..., :n_keys]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_eager", dense_attention)
AttentionMaskInterface.register("dense_eager", eager_mask)


def pseudo_scores(tokens: Tensor) -> Tensor:
    """(N, D) -> (N,) in [0, 1]: depends on every token's features and, through the normalisation, on the whole set."""
    y = torch.sin(1000 * tokens.float().sum(-1))
    return (y - y.min()) / (y.max() - y.min() + 1e-5)


def merged_embeddings(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, D), what goes into the decoder: text and the features of the video."""
    merged: list[Tensor] = []
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: merged.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return merged[0]


def merged_scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) scores from the merged embeddings, taken without the hooks under test."""
    embeds = merged_embeddings(model, batch)
    visual = torch.isin(batch["input_ids"], torch.tensor([IMAGE, VIDEO]))
    scores = torch.zeros(visual.shape)
    for row in range(len(scores)):
        if visual[row].any():
            scores[row, visual[row]] = pseudo_scores(embeds[row, visual[row]])
    return scores


def plain_attention(model: Any) -> str:
    """What transformers would run itself."""
    return "sdpa" if model.base_model.language_model._supports_sdpa else "eager"


def generate_dense(
    model: Any, batch: dict[str, Tensor], scores: Tensor, decode: str = "persist", **options: Any
) -> Any:
    """generate() with the dense gate."""
    model.set_attn_implementation("dense_eager")
    state.update(scores=scores, decode=decode)
    try:
        return model.generate(**batch, **{**GENERATE, **options})
    finally:
        state["scores"] = None
        model.set_attn_implementation(plain_attention(model))


def build(name: str, **options: Any) -> Any:
    """A tiny model on SDPA."""
    model = tiny_models.build(name, **options)
    model.set_attn_implementation("sdpa")
    return model


def assert_same(out: Any, expected: Any) -> None:
    """The same tokens, and logits within `TOLERANCE`."""
    assert torch.equal(out.sequences, expected.sequences)
    assert len(out.logits) == len(expected.logits)
    for ours, dense in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, dense, atol=TOLERANCE, rtol=0)
