"""Calls over a paged cache as torch operators: opaque to compiled graphs, with the results where the caller wants them.

Both write into tensors that they are given, so that a CUDA graph finds them at the same addresses. Without backward.
"""

import torch

from .dispatch import torch_backend
from .gate_pages import GatePages
from .layouts import cache_rows, launch_target, variant_of
from .operands import Masks
from .paged import paged
from .pages import paged_by_sequence
from .sampled_paged import paged_error
from .self_check import Variant, self_checked
from .tiles import paged_tile
from .validation_paged import per_token
from .write import write


@torch.library.custom_op("videoanchor::anchored_attention_paged", mutates_args=("out", "lse"))
def paged_op(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    gate_values: torch.Tensor | None,
    gate_form: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of validated packed queries over pages into out (Tq, Hq, D) and, where given, lse (Tq, Hq) fp32."""
    if q.shape[0] == 0:
        return
    q = q if q.stride(-1) == 1 else q.contiguous()
    k_pages, v_pages = cache_rows("k_pages", k_pages), cache_rows("v_pages", v_pages)
    cu_seqlens_q, seqlens_k = cu_seqlens_q.contiguous(), seqlens_k.contiguous()
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    tensors = q, k_pages, v_pages, cu_seqlens_q, seqlens_k, table, max_seqlen_q
    gate = None if gate_values is None else GatePages(gate_values, gate_form)
    factors = gate, k_scale, v_scale, sinks
    masks, target = Masks(scale, causal, window, softcap), launch_target(q)

    def launch() -> None:
        paged(
            q,
            k_pages,
            v_pages,
            out,
            lse,
            masks,
            target,
            seqlens_k=seqlens_k,
            max_seqlen_q=max_seqlen_q,
            cu_seqlens_q=cu_seqlens_q,
            block_table=table,
            gate=gate,
            k_scale=k_scale,
            v_scale=v_scale,
            sinks=sinks,
        )

    def answer() -> None:
        attend = torch_backend("sdpa", *masks, False, True, True)
        of_rows, of_lse = paged_by_sequence(attend, *tensors, *factors, torch.promote_types(q.dtype, torch.float32))
        out.copy_(of_rows)
        if lse is not None:
            lse.copy_(of_lse)

    def name() -> Variant:
        form = None if gate is None else (gate_form, gate.values.shape[1] > 1)
        stored = k_pages.dtype, per_token(k_scale)
        page, group = k_pages.shape[2], q.shape[1] // k_pages.shape[1]
        tile = paged_tile(target, q.shape[-1], q.element_size(), max(max_seqlen_q, 1) * group)
        return variant_of("paged", q, (None, None), masks, form, stored, sinks is not None, page, group, *tile)

    with torch.cuda.device_of(q):
        self_checked(
            name,
            q.device,
            launch,
            lambda: paged_error(*tensors, *factors, out, lse, masks),
            answer,
            "it reads cu_seqlens_q, seqlens_k and block_table on the host",
        )


@paged_op.register_fake
def _(*_: object) -> None:
    return None


@torch.library.custom_op(
    "videoanchor::write_pages", mutates_args=("k_pages", "v_pages", "gate_values", "k_scale", "v_scale")
)
def write_op(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    gate_values: torch.Tensor | None,
    gate_form: str,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    log_gate: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Validated keys, values and gates of a step into their slots."""
    if k.shape[0] == 0 or k_pages.shape[0] == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    gate = None if gate_values is None else GatePages(gate_values, gate_form)
    launch_target(k)
    with torch.cuda.device_of(k):
        write(
            k,
            v,
            cache_rows("k_pages", k_pages),
            cache_rows("v_pages", v_pages),
            slot_mapping.contiguous(),
            gate,
            gamma_k,
            gamma_v,
            log_gate,
            k_scale,
            v_scale,
        )


@write_op.register_fake
def _(*_: object) -> None:
    return None
