"""Decode over a cache as a torch operator: one opaque call for compiled graphs. Without backward."""

import torch

from .dispatch import torch_backend
from .gates import per_query_head
from .layouts import Outputs, cache_rows, fill, gate_rows, launch_target, outputs, rows, variant_of
from .operands import Masks, PositionGate
from .paged import paged
from .sampled import cache_error
from .self_check import Variant, self_checked
from .sequences import decode_by_sequence
from .tiles import paged_tile


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
    """Attention of validated last queries over a cache: out (B, Hq, Nq, D) and lse (B, Hq, Nq) fp32.

    log_gamma_k and gamma_v are (B, Hkv, N') or (B, Hq, N') fp32 of any strides.
    """
    out, lse = outputs(q)
    if out.numel() == 0 or k_cache.shape[2] == 0 or (block_table is not None and block_table.shape[1] == 0):
        return out.zero_(), lse.fill_(float("-inf"))
    tensors = rows(q), cache_rows("k_cache", k_cache), cache_rows("v_cache", v_cache)
    cache, gates = (cache_seqlens.contiguous(), gate_rows(block_table)), (log_gamma_k, gamma_v)
    masks, target = Masks(scale, causal, window, softcap), launch_target(q)

    def launch() -> None:
        gate = None if log_gamma_k is gamma_v is None else PositionGate(*gates)
        options = {"seqlens_k": cache[0], "block_table": cache[1], "max_seqlen_q": q.shape[2], "gate": gate}
        paged(*tensors, out, lse, masks, target, **options)

    def answer() -> None:
        attend = torch_backend("sdpa", *masks, False, True, log_gate=True)
        fill((out, lse), decode_by_sequence(attend, *tensors, *cache, *gates))

    def name() -> Variant:
        page, group = 0 if block_table is None else k_cache.shape[2], q.shape[1] // k_cache.shape[1]
        alone = (per_query_head(gate, k_cache.shape[1]) for gate in gates)
        tile = paged_tile(target, q.shape[-1], q.element_size(), q.shape[2] * group)
        return variant_of("cache", q, gates, masks, page, group, *tile, *alone)

    with torch.cuda.device_of(q):
        self_checked(
            name,
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
