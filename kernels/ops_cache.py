"""Decode over a cache as a torch operator: one opaque call for compiled graphs. Without backward."""

import torch

from .decode import decode
from .dispatch import torch_backend
from .layouts import Outputs, cache_rows, decode_rows, fill, gate_rows, launch_target, outputs, rows, variant_of
from .operands import Masks
from .sampled import cache_error
from .self_check import self_checked
from .sequences import decode_by_sequence


@torch.library.custom_op("videoanchor::anchored_attention_decode", mutates_args=())
def decode_op(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    log_gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of validated last queries over a cache: out (B, Hq, Nq, D) and lse (B, Hq, Nq) fp32."""
    out, lse = outputs(q)
    if out.numel() == 0 or k_cache.shape[2] == 0 or (block_table is not None and block_table.shape[1] == 0):
        return out.zero_(), lse.fill_(float("-inf"))
    log_gamma_k, gamma_v, block_table = (gate_rows(x) for x in (log_gamma_k, gamma_v, block_table))
    tensors = rows(q), cache_rows("k_cache", k_cache), cache_rows("v_cache", v_cache)
    cache, gates = (cache_seqlens.contiguous(), block_table), (log_gamma_k, gamma_v)
    masks, target = Masks(scale, causal, window, softcap), launch_target(q)

    def launch() -> None:
        lengths, table = cache
        decode(*tensors, *gates, None, out, lse, *masks, target, cache_seqlens=lengths, block_table=table)

    def answer() -> None:
        attend = torch_backend("sdpa", *masks, False, True, log_gate=True)
        fill((out, lse), decode_by_sequence(attend, *tensors, *cache, *gates))

    page = 0 if block_table is None else k_cache.shape[2]
    with torch.cuda.device_of(q):
        self_checked(
            lambda: variant_of("cache", q, gates, masks, page, *decode_rows(q, k_cache)),
            q.device,
            launch,
            lambda: cache_error(*tensors, *cache, *gates, out, lse, masks),
            answer,
            "it reads cache_seqlens on the host",
        )
    return out, lse


@decode_op.register_fake
def _(q: torch.Tensor, *_: object) -> Outputs:
    return outputs(q)
