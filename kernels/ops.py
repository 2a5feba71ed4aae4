"""The Triton kernels as one torch operator, so that compiled graphs see a single opaque call."""

import torch

from .decode import MAX_QUERIES, decode
from .dispatch import triton_target
from .prefill import prefill

MAX_ROW_STRIDE = 2**23


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, head_dim = q.shape
    # the layout in which a model's output projection reads the heads
    out = q.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Make rows contiguous, and near enough to one another that a tile's offsets fit in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(-2) < MAX_ROW_STRIDE else x.contiguous()


@torch.library.custom_op("videoanchor::anchored_attention", mutates_args=())
def anchored_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    post_exp: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of validated inputs by decode (few queries) or prefill: out (B, Hq, Nq, D) and lse (B, Hq, Nq) fp32."""
    out, lse = _outputs(q)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = _rows(q), _rows(k), _rows(v)
    gamma_k, gamma_v, key_padding_mask = (
        None if x is None else x.contiguous() for x in (gamma_k, gamma_v, key_padding_mask)
    )
    if window is not None:
        window = min(window, k.shape[2])
    target, _ = triton_target(q.device)
    assert target is not None
    with torch.cuda.device_of(q):
        if q.shape[2] <= MAX_QUERIES:
            decode(q, k, v, gamma_k, gamma_v, key_padding_mask, out, lse, scale, causal, window, target)
        else:
            prefill(q, k, v, gamma_k, gamma_v, key_padding_mask, out, lse, scale, causal, window, post_exp, target)
    return out, lse


@anchored_attention_op.register_fake
def _(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(q)
