"""`attn_implementation="videoanchor_triton"`: what transformers calls in each attention layer and for each mask.

Nothing here builds a tensor of query length x key length: a plain causal mask, padding and sliding windows go to the
kernel as numbers and as a (batch, keys) vector. Only masks that cannot be described so (packed sequences, a caller's
own 4-D mask, a model that changes its mask) take `_dense_attention`.
"""

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from ...kernels.api import anchored_attention

IMPLEMENTATION = "videoanchor_triton"
GATE_ARGUMENT = "videoanchor_gate"
"""The keyword by which the gate travels from the language model's forward to each attention layer."""

DECODERS_WITH_SINKS = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa"})
"""Text model types whose attention sinks are all that their attention has beyond softmax(QK)V. Others with sinks add
keys of their own (DeepSeek-V4)."""
CHANGE_NOTHING = frozenset(
    """
    aftercnn_lens attention_mask audio_feature_lengths batch_num_images cache_position deepstack_visual_embeds
    feature_attention_mask feature_lens grid_thw image_grid_thw image_merge_sizes image_position_ids image_sizes
    image_sizes_videos input_features input_features_mask input_ids inputs_embeds interpolate_pos_encoding labels
    logits_to_keep max_length_k max_length_q merge_sizes mm_encoder_outputs mm_token_type_ids moe_mm_token_type_ids
    num_frames_per_video num_items_in_batch output_hidden_states output_router_logits past_key_values per_layer_inputs
    pixel_attention_mask pixel_mask pixel_position_ids pixel_values pixel_values_images pixel_values_videos position_ids
    return_dict rope_deltas second_per_grid_ts seq_idx spatial_shapes token_type_ids use_audio_in_video use_cache
    video_compression_mask video_grid_thw video_merge_sizes video_position_ids video_second_per_grid
    vision_aspect_ratio vision_feature_layer vision_feature_layers vision_feature_select_strategy visual_pos_masks
    """.split()  # noqa: SIM905
)
"""Keywords of models' forwards that leak to their attention layers, whose own attention functions ignore them. What
else arrives may change the attention, and is refused."""

_PADDING = torch.uint8
"""The type of a 4-D mask that says which keys are padding and nothing else. No other attention takes one, so that it
cannot be taken for a caller's."""

ENABLED: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
"""The configs, by id, of language models whose every pass has a gate."""

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class LayerGate:
    """The gate of one forward pass, shared by all layers.

    Args:
        log_gamma_k: (B, T) fp32 logarithms of the factors of keys at cache positions 0..T-1, taken once for all layers
            and steps, or None for an ungated pass. Later keys have 0.
        gamma_v: (B, T) fp32 gains of values, likewise; later ones have 1.
        gate_form: the form for `anchored_attention`.
        n_positions: cache positions filled after this pass; None where only the device knows (static caches).
        gamma_q: (B, T) fp32 factors of queries, likewise. They cancel but where a layer has attention sinks.
        taken: [whether a layer took the gate].
    """

    log_gamma_k: Tensor | None = None
    gamma_v: Tensor | None = None
    gate_form: Literal["log-bias", "post-exp"] = "log-bias"
    n_positions: int | None = None
    gamma_q: Tensor | None = None
    taken: list[bool] = field(default_factory=lambda: [False], repr=False)
    _moved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def factors(self, batch: int, n_keys: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """log gamma_k and gamma_v, (batch, at most n_keys), for a layer whose keys are the last `n_keys` positions:
        views, which the kernels read as they lie."""
        return self._rows("log_gamma_k", batch, n_keys, device), self._rows("gamma_v", batch, n_keys, device)

    def query_factors(self, batch: int, n_queries: int, device: torch.device) -> Tensor | None:
        """gamma_q, (batch, n_queries), of the last positions; None where all are 1."""
        if self.n_positions is None:  # a decoding step: past the scored positions
            return None
        gamma = self._rows("gamma_q", batch, n_queries, device)
        return None if gamma is None else F.pad(gamma, (0, n_queries - gamma.shape[1]), value=1.0)

    def _rows(self, name: str, batch: int, n_keys: int, device: torch.device) -> Tensor | None:
        gamma: Tensor | None = getattr(self, name)
        if gamma is None:
            return None
        if gamma.device != device:  # a model spread over devices: one copy to each
            if (name, device) not in self._moved:
                self._moved[name, device] = gamma.to(device)
            gamma = self._moved[name, device]
        # A sliding-window layer keeps the last positions only.
        first = 0 if self.n_positions is None else max(self.n_positions - n_keys, 0)
        gamma = gamma[:, first : first + n_keys]
        if gamma.shape[0] != batch:
            raise ValueError(
                f"the cache holds VideoAnchor scores of {gamma.shape[0]} rows, the batch has {batch}: expected as "
                f"many. Repeat or choose rows by the cache's own methods, or start from a new cache."
            )
        return gamma


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers' `AttentionInterface` defines it.

    Args:
        query: (B, Hq, M, D); key and value: (B, Hkv, N, D) as they stand in the cache.
        attention_mask: None; (B, N) bool or (B, 1, 1, N) uint8, true for keys that may be seen (what
            `attention_mask_forward` makes); or any other 4-D mask, as for SDPA.
        softcap: the logits become softcap * tanh(logits / softcap), before the gate.
        s_aux, sinks: (Hq,) one more logit of each head, ungated, with a value of 0 (attention sinks): gpt-oss has them.

    Returns:
        (B, M, Hq, D) and None (no attention weights exist).

    Raises:
        ValueError: for any other keyword that is not known to change nothing, such as a position bias or the keys that
            sparse attention picks; for attention dropout; for soft-capping under a 4-D mask; for sequences packed by
            cu_seq_lens, as continuous batching does.
    """
    gate: LayerGate | None = kwargs.pop(GATE_ARGUMENT, None)
    sinks = s_aux if sinks is None else sinks
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal and gate is None and sinks is None:  # vision towers
        options = {"dropout": dropout, "scaling": scaling, "is_causal": False, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    padding, dense, sliding_window = _read_mask(attention_mask, query, key, sliding_window)
    _check_keywords(module, kwargs, dense=dense is not None)
    if dropout:
        raise ValueError(f"{IMPLEMENTATION} has no attention dropout, got {dropout}: call model.eval() or set it to 0")
    if softcap is not None and dense is not None:
        raise ValueError(
            f"{IMPLEMENTATION} has no softcap under a 4-D mask, which {type(module).__name__} needs: use another "
            f"attention"
        )
    if sinks is not None:
        _check_sinks(module, sinks, query.shape[1])
    if gate is None:
        if id(getattr(module, "config", None)) in ENABLED:
            raise RuntimeError(
                f"{type(module).__name__} got no gate although VideoAnchor is enabled: call the whole model, not a "
                "part of it and not its forward, which runs no hooks"
            )
        logger.warning_once(
            f"attn_implementation={IMPLEMENTATION!r} runs ungated: no scores until "
            f"videoanchor_triton.enable(model, config)."
        )
        gate = LayerGate()
    gate.taken[0] = True

    batch, n_queries = query.shape[0], query.shape[2]
    if padding is not None and padding.shape[1] < key.shape[2]:  # the unfilled end of a static cache
        key, value = (x[:, :, : padding.shape[1]] for x in (key, value))
    log_gamma_k, gamma_v = gate.factors(batch, key.shape[2], query.device)
    gamma_q = None if sinks is None else gate.query_factors(batch, n_queries, query.device)
    if dense is not None:
        out = _dense_attention(query, key, value, dense, scaling, log_gamma_k, gamma_v, gamma_q, sinks)
        return out.transpose(1, 2).contiguous(), None
    attend = functools.partial(
        anchored_attention,
        query,
        key,
        value,
        log_gamma_k=log_gamma_k,
        gamma_v=gamma_v,
        gamma_q=gamma_q,
        scale=scaling,
        causal=causal and (n_queries > 1 or sliding_window is not None),
        key_padding_mask=padding,
        window=sliding_window,
        softcap=softcap,
        gate_form=gate.gate_form,
    )
    if sinks is None:
        out = attend(return_lse=False)
    else:
        out, lse = attend(return_lse=True)
        # A row without keys has lse -inf, which a sink of -inf would turn into NaN.
        kept = torch.sigmoid(lse.clamp(min=torch.finfo(lse.dtype).min) - sinks[:, None].to(lse.dtype))
        out = (out * kept[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _read_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, window: int | None
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """The mask as key padding (B, N) bool or as a dense one (B, 1 or Hq, M, N), and the sliding window that remains."""
    if mask is None or (mask.ndim == 2 and mask.dtype == torch.bool):
        return mask, None, window
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask: expected None, (batch, keys) bool or (batch, heads, queries, keys), got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    if mask.dtype == _PADDING:
        return mask.view(torch.bool).flatten(1), None, window
    n_keys = key.shape[2]
    one_query = query.shape[2] == 1 and mask.shape[:3] == (query.shape[0], 1, 1)
    if one_query and mask.dtype == torch.bool and mask.shape[3] >= n_keys:
        return mask[..., :n_keys].flatten(1), None, None  # it sees what the mask says, in a sliding window too
    return None, mask, None


def _check_keywords(module: nn.Module, keywords: dict[str, Any], *, dense: bool) -> None:
    """Nothing that changes the attention is dropped in silence."""
    given = {name for name, value in keywords.items() if value is not None}
    if "cu_seq_lens_q" in given and not dense:
        raise ValueError(
            f"{IMPLEMENTATION} takes no continuous batching (generate_batch, transformers serve) and no sequences "
            f"packed by cu_seq_lens: use generate(), or tell packed sequences apart by position_ids"
        )
    if keywords.get("output_attentions"):
        logger.warning_once(
            f"{IMPLEMENTATION!r} attention does not support `output_attentions=True`: no attention weights exist, and "
            f"`attentions` will be empty. Set attn_implementation='eager' for them, which takes no gate."
        )
    unknown = given - CHANGE_NOTHING - {"output_attentions", "cu_seq_lens_q", "cu_seq_lens_k"}
    if unknown:
        raise ValueError(
            f"{IMPLEMENTATION} has no {', '.join(sorted(unknown))}, which {type(module).__name__} gives to its "
            f"attention: use another attention for this model, or leave the argument out if you gave it"
        )


def _check_sinks(module: nn.Module, sinks: Tensor, n_heads: int) -> None:
    decoder = getattr(getattr(module, "config", None), "model_type", None)
    if decoder is not None and decoder not in DECODERS_WITH_SINKS:
        raise ValueError(
            f"{IMPLEMENTATION} was never compared with the attention sinks of {type(module).__name__} ({decoder}), "
            f"only with those of {', '.join(sorted(DECODERS_WITH_SINKS))}: use another attention"
        )
    if sinks.shape != (n_heads,):
        raise ValueError(
            f"{IMPLEMENTATION} takes attention sinks of shape ({n_heads},), one a head, got {tuple(sinks.shape)} from "
            f"{type(module).__name__}: use another attention"
        )


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    log_gamma_k: Tensor | None,
    gamma_v: Tensor | None,
    gamma_q: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """SDPA under a caller's (B, 1 or Hq, M, N) mask: the mask is that large already, the gate is added to it, rounded
    to the query's dtype. A row without a visible key is 0. Sinks are one more key, and a mask for each head."""
    if query.dtype == torch.float16 and gamma_v is not None:  # fp16 cannot hold gamma_v * value where that is large
        query, key, value, mask = (x if x.dtype == torch.bool else x.float() for x in (query, key, value, mask))
        return _dense_attention(query, key, value, mask, scale, log_gamma_k, gamma_v, gamma_q, sinks).half()
    n_keys = key.shape[2]
    mask = mask[..., :n_keys]
    dead = None if mask.dtype != torch.bool else ~mask.any(-1, keepdim=True)
    if mask.dtype == torch.bool and any(one is not None for one in (log_gamma_k, gamma_q, sinks)):
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if log_gamma_k is not None:
        mask = mask + F.pad(log_gamma_k, (0, n_keys - log_gamma_k.shape[1]))[:, None, None].to(query.dtype)
    if gamma_q is not None:
        mask = mask + gamma_q.log()[:, None, :, None].to(query.dtype)
    if gamma_v is not None:
        value = (value * F.pad(gamma_v, (0, n_keys - gamma_v.shape[1]), value=1.0)[:, None, :, None]).to(value.dtype)
    if sinks is not None:
        shape = (mask.shape[0], query.shape[1], query.shape[2])
        last = sinks.to(mask.dtype)[None, :, None, None].expand(*shape, 1)
        mask = torch.cat([mask.expand(*shape, n_keys), last], -1)
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out if dead is None else out.masked_fill(dead, 0)


def attention_mask_forward(
    *,
    batch_size: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    mask_function: Any = causal_mask_function,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one layer type, as transformers' `AttentionMaskInterface` defines it.

    Returns:
        None where nothing is hidden but the future, else (B, 1, 1, kv_length or less) uint8, 1 for keys that may be
        seen (transformers 4.57: (B, kv_length or less) bool, from which its models read padding). A bool mask of
        queries x keys only where it is neither plain causal nor a causal sliding window, where the model builds on it
        (`allow_is_causal_skip=False`), or for a single query.
    """
    # n_filled: cache positions filled after this pass. A static cache has more keys than that.
    n_filled: int | Tensor
    before_5 = "cache_position" in kwargs
    if before_5:
        position: Tensor = kwargs["cache_position"]
        q_length, n_filled, device = position.shape[0], position[-1] + 1, position.device
    else:
        q_length, n_filled, device = kwargs["q_length"], kwargs["q_offset"] + kwargs["q_length"], kwargs["device"]
    sliding = local_size is not None and allow_is_causal_skip
    built_upon = not allow_is_causal_skip and not before_5 and q_length > 1
    if built_upon or (mask_function is not causal_mask_function and not sliding):
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            attention_mask=attention_mask,
            mask_function=mask_function,
            local_size=local_size,
            allow_is_causal_skip=False,
            **kwargs,
        )
    visible = None if attention_mask is None else attention_mask[:, -kv_length:]
    if q_length == 1:  # one step of decoding: no look at values on the device, which would wait for it
        if visible is not None:
            visible = F.pad(visible, (0, kv_length - visible.shape[1]))
        elif not isinstance(n_filled, int) or kv_length > n_filled:
            visible = torch.lt(torch.arange(kv_length, device=device), n_filled).expand(batch_size, -1)
    elif not torch.compiler.is_compiling():
        n_filled = int(n_filled)
        if kv_length > n_filled:  # queries end where the filled part ends, not where the cache does
            filled = torch.ones(batch_size, n_filled, dtype=torch.bool, device=device)
            visible = filled if visible is None else visible[:, :n_filled]
        elif visible is not None and visible.shape[1] == kv_length == q_length and bool(visible.all()):
            visible = None  # looked up for a prompt, not for each chunk of it or step of assisted decoding: that waits
    if visible is None or before_5:
        return visible
    whole = q_length == 1 and not sliding
    return (visible if whole else visible.view(_PADDING))[:, None, None]


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask_forward)
