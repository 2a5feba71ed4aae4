"""`attn_implementation="videoanchor_triton"`: what transformers calls in each attention layer and for each mask.

Nothing here builds a tensor of query length x key length: a plain causal mask, padding and sliding windows go to the
kernel as numbers and as a (batch, keys) vector. Only masks that cannot be described so (packed sequences, a caller's
own 4-D mask) take `_dense_attention`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from ..kernels.api import anchored_attention

IMPLEMENTATION = "videoanchor_triton"
GATE_ARGUMENT = "videoanchor_gate"
"""The keyword by which the gate travels from the language model's forward to each attention layer."""

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class LayerGate:
    """The gate of one forward pass, shared by all layers.

    Args:
        gamma_k: (B, T) fp32 factors of keys at cache positions 0..T-1, or None for an ungated pass. Later keys have 1.
        gamma_v: (B, T) fp32 gains of values, likewise.
        gate_form: the form for `anchored_attention`.
        n_positions: cache positions filled after this pass; None where only the device knows (static caches).
    """

    gamma_k: Tensor | None = None
    gamma_v: Tensor | None = None
    gate_form: Literal["log-bias", "post-exp"] = "log-bias"
    n_positions: int | None = None
    _moved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def factors(self, batch: int, n_keys: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """gamma_k and gamma_v, (batch, at most n_keys), for a layer whose keys are the last `n_keys` positions."""
        return self._rows("gamma_k", batch, n_keys, device), self._rows("gamma_v", batch, n_keys, device)

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers' `AttentionInterface` defines it.

    Args:
        query: (B, Hq, M, D); key and value: (B, Hkv, N, D) as they stand in the cache.
        attention_mask: None, (B, N) bool with True for keys that may be seen (what `attention_mask_forward` makes), or
            4-D.

    Returns:
        (B, M, Hq, D) and None (no attention weights exist).

    Raises:
        ValueError: for attention dropout or a position bias, which the gated kernel does not have; for soft-capping
            under a 4-D mask; for sequences packed by cu_seq_lens, as continuous batching does.
    """
    gate: LayerGate | None = kwargs.pop(GATE_ARGUMENT, None)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal and gate is None:  # vision towers
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
    dense = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
    for name, has in (("position_bias", False), ("softcap", dense is None)):
        if kwargs.get(name) is not None and not has:
            under = " under a 4-D mask" if name == "softcap" else ""
            raise ValueError(
                f"{IMPLEMENTATION} has no {name}{under}, which {type(module).__name__} needs: use another attention"
            )
    if dropout:
        raise ValueError(f"{IMPLEMENTATION} has no attention dropout, got {dropout}: call model.eval() or set it to 0")
    if kwargs.get("cu_seq_lens_q") is not None and dense is None:
        raise ValueError(
            f"{IMPLEMENTATION} takes no continuous batching (generate_batch, transformers serve) and no sequences "
            f"packed by cu_seq_lens: use generate(), or tell packed sequences apart by position_ids"
        )
    if gate is None:
        logger.warning_once(
            f"attn_implementation={IMPLEMENTATION!r} runs ungated: no scores until "
            f"videoanchor_triton.enable(model, config)."
        )
        gate = LayerGate()

    batch, n_queries = query.shape[0], query.shape[2]
    if dense is not None:
        gamma_k, gamma_v = gate.factors(batch, key.shape[2], query.device)
        out = _dense_attention(query, key, value, dense, scaling, gamma_k, gamma_v)
    else:
        if attention_mask is not None and attention_mask.shape[1] < key.shape[2]:  # the unfilled end of a static cache
            key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
        gamma_k, gamma_v = gate.factors(batch, key.shape[2], query.device)
        out = anchored_attention(
            query,
            key,
            value,
            gamma_k=gamma_k,
            gamma_v=gamma_v,
            scale=scaling,
            causal=causal and (n_queries > 1 or sliding_window is not None),
            key_padding_mask=attention_mask,
            window=sliding_window,
            softcap=kwargs.get("softcap"),
            gate_form=gate.gate_form,
        )
    return out.transpose(1, 2).contiguous(), None


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    gamma_k: Tensor | None,
    gamma_v: Tensor | None,
) -> Tensor:
    """SDPA under a caller's (B, 1 or Hq, M, N) mask: the mask is that large already, the gate is added to it, rounded
    to the query's dtype. A row without a visible key is 0."""
    n_keys = key.shape[2]
    mask = mask[..., :n_keys]
    dead = None if mask.dtype != torch.bool else ~mask.any(-1, keepdim=True)
    if gamma_k is not None:
        bias = F.pad(gamma_k.log(), (0, n_keys - gamma_k.shape[1]))[:, None, None].to(query.dtype)
        mask = torch.where(mask, bias, torch.finfo(query.dtype).min) if mask.dtype == torch.bool else mask + bias
    if gamma_v is not None:
        value = (value * F.pad(gamma_v, (0, n_keys - gamma_v.shape[1]), value=1.0)[:, None, :, None]).to(value.dtype)
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
        None where nothing is hidden but the future, else (B, kv_length or less) bool, True for keys that may be seen; a
        4-D mask only where the mask is neither plain causal nor a causal sliding window.
    """
    sliding = local_size is not None and allow_is_causal_skip
    if mask_function is not causal_mask_function and not sliding:
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            attention_mask=attention_mask,
            mask_function=mask_function,
            local_size=local_size,
            allow_is_causal_skip=False,
            **kwargs,
        )
    # n_filled: cache positions filled after this pass. A static cache has more keys than that.
    n_filled: int | Tensor
    if "cache_position" in kwargs:  # transformers 4.57
        position: Tensor = kwargs["cache_position"]
        q_length, n_filled, device = position.shape[0], position[-1] + 1, position.device
    else:
        q_length, n_filled, device = kwargs["q_length"], kwargs["q_offset"] + kwargs["q_length"], kwargs["device"]
    visible = None if attention_mask is None else attention_mask[:, -kv_length:]
    if q_length == 1:  # one step of decoding: no look at values on the device, which would wait for it
        if visible is not None:
            return F.pad(visible, (0, kv_length - visible.shape[1]))
        if isinstance(n_filled, int) and kv_length <= n_filled:
            return None
        return torch.lt(torch.arange(kv_length, device=device), n_filled).expand(batch_size, -1)
    if not torch.compiler.is_compiling():
        n_filled = int(n_filled)
        if kv_length > n_filled:  # queries end where the filled part ends, not where the cache does
            filled = torch.ones(batch_size, n_filled, dtype=torch.bool, device=device)
            return filled if visible is None else visible[:, :n_filled]
        if visible is not None and visible.shape[1] == kv_length and bool(visible.all()):
            return None
    return visible


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask_forward)
