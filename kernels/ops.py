"""The Triton kernels as torch operators with autograd, so that compiled graphs see one opaque call each."""

from typing import Any

import torch

from .backward import backward
from .dense_backward import Operands, dense_backward, operands
from .dispatch import torch_backend
from .gates import log_of, per_query_head
from .hopper import hopper_prefill
from .layouts import (
    Outputs,
    fill,
    gate_rows,
    launch_target,
    outputs,
    packed_gate,
    packed_outputs,
    packed_rows,
    rows,
    variant_of,
)
from .operands import Masks, PositionGate
from .paged import paged
from .prefill import prefill
from .prescale import prescale
from .sampled import dense_error, packed_error
from .sampled_backward import backward_error
from .self_check import Variant, self_checked
from .sequences import varlen_by_sequence
from .tiles import paged_tile, takes_few_queries


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
    softcap: float | None,
    post_exp: bool,
    log_gate: bool,
    hopper: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of validated inputs by the paged kernel (few queries) or prefill: out (B, Hq, Nq, D) and lse, fp32.

    With `log_gate` gamma_k holds log gamma_k.
    """
    out, lse = outputs(q)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if not hopper:
        q, k, v = rows(q), rows(k), rows(v)
    key_padding_mask = gate_rows(key_padding_mask)
    tensors = q, k, v, gamma_k, gamma_v, key_padding_mask
    masks, target = Masks(scale, causal, window, softcap), launch_target(q)
    small = takes_few_queries(target, q.shape[-1], q.shape[2], k.shape[2])
    kernel = "hopper" if hopper else "paged" if small else "prefill"

    def launch() -> None:
        if hopper:
            form, gated, gate, _ = prescale(v, gamma_k, gamma_v, None, post_exp, log_gate=log_gate)
            hopper_prefill(q, k, gated, gate, out, lse, masks, form)
        elif small:
            log_gamma_k = None if gamma_k is None else log_of(gamma_k, log_gate)
            gate = None if log_gamma_k is gamma_v is None else PositionGate(log_gamma_k, gamma_v)
            options = {"seqlens_k": None, "max_seqlen_q": q.shape[2], "gate": gate, "seen": key_padding_mask}
            paged(q, k, v, out, lse, masks, target, **options)
        else:
            prefill(*tensors, out, lse, masks, post_exp, target, log_gate=log_gate)

    def answer() -> None:
        fill((out, lse), torch_backend("sdpa", *masks, post_exp, True, log_gate)(*tensors))

    def name() -> Variant:
        group = q.shape[1] // k.shape[1]
        tile = paged_tile(target, q.shape[-1], q.element_size(), q.shape[2] * group)
        form = (group, *tile) if kernel == "paged" else (post_exp, log_gate)
        form = *form, *(per_query_head(gate, k.shape[1]) for gate in (gamma_k, gamma_v))
        return variant_of(kernel, q, (gamma_k, gamma_v), masks, key_padding_mask is not None, *form)

    with torch.cuda.device_of(q):
        self_checked(name, q.device, launch, lambda: dense_error(*tensors, out, lse, masks, log_gate), answer)
    return out, lse


@anchored_attention_op.register_fake
def _(q: torch.Tensor, *_: object) -> Outputs:
    return outputs(q)


@torch.library.custom_op("videoanchor::anchored_attention_varlen", mutates_args=())
def varlen_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    post_exp: bool,
    log_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of validated packed inputs: out (Tq, Hq, D) and lse (Tq, Hq) fp32.

    With `log_gate` gamma_k holds log gamma_k.
    """
    out, lse = packed_outputs(q)
    # no program writes the rows of no sequence
    out.zero_(), lse.fill_(float("-inf"))
    if out.numel() == 0 or k.shape[0] == 0:
        return out, lse
    tensors, masks, target = (q, k, v), Masks(scale, causal, window, softcap), launch_target(q)
    offsets, gates = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()), (gamma_k, gamma_v)

    def launch() -> None:
        heads_first = packed_rows(q), packed_rows(k), packed_rows(v)
        prefill(
            *heads_first,
            packed_gate(gamma_k),
            packed_gate(gamma_v),
            None,
            packed_rows(out),
            lse.T[None],
            masks,
            post_exp,
            target,
            log_gate=log_gate,
            cu_seqlens=(*offsets, max_seqlen_q),
        )

    def answer() -> None:
        attend = torch_backend("sdpa", *masks, post_exp, True, log_gate)
        fill((out, lse), varlen_by_sequence(attend, *tensors, *offsets, max_seqlen_q, max_seqlen_k, *gates))

    def name() -> Variant:
        alone = (per_query_head(packed_gate(gate), k.shape[1]) for gate in gates)
        return variant_of("packed", q, gates, masks, post_exp, log_gate, *alone)

    with torch.cuda.device_of(q):
        self_checked(
            name,
            q.device,
            launch,
            lambda: packed_error(*tensors, *offsets, max_seqlen_q, *gates, out, lse, masks, log_gate),
            answer,
            "it reads cu_seqlens on the host",
        )
    return out, lse


@varlen_op.register_fake
def _(q: torch.Tensor, *_: object) -> Outputs:
    return packed_outputs(q)


@torch.library.custom_op("videoanchor::anchored_attention_backward", mutates_args=())
def backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    log_gate: bool,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v (contiguous, in their dtypes) and of the gates (fp32, empty where there is no gate).

    With `log_gate` gamma_k holds log gamma_k, of which the gradient is.
    """
    q, k, v = (rows(x) if cu_seqlens_q is None else packed_rows(x)[0].transpose(0, 1) for x in (q, k, v))
    masks, target = Masks(scale, causal, window, softcap), launch_target(q)
    tensors = q, k, v, gamma_k, gamma_v, key_padding_mask, out, lse, d_out, d_lse
    offsets, packed = (cu_seqlens_q, cu_seqlens_k), cu_seqlens_q is not None
    grads: tuple[torch.Tensor | None, ...] = ()

    def launch() -> None:
        nonlocal grads
        longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        of_packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, **longest}
        grads = backward(*tensors, masks, target, log_gate=log_gate, **of_packed)

    def given() -> Operands:
        return operands(*tensors, *offsets, log_gate)

    def compare() -> torch.Tensor:
        return backward_error(given(), gamma_k, gamma_v, masks, offsets, max_seqlen_k, grads, log_gate)

    def answer() -> None:
        nonlocal grads
        grads = dense_backward(given(), gamma_k, gamma_v, masks, packed, log_gate)

    def name() -> Variant:
        heads_first = (packed_gate(gate) if packed else gate for gate in (gamma_k, gamma_v))
        form = log_gate, *(per_query_head(gate, k.shape[1]) for gate in heads_first)
        return variant_of("backward", q, (gamma_k, gamma_v), masks, key_padding_mask is not None, packed, *form)

    with torch.cuda.device_of(q):
        if q.numel() == 0 or k.numel() == 0:
            launch()
        else:
            self_checked(name, q.device, launch, compare, answer)
    d_q, d_k, d_v, d_gamma_k, d_gamma_v = (q.new_empty(0, dtype=torch.float32) if x is None else x for x in grads)
    return d_q, d_k, d_v, d_gamma_k, d_gamma_v


@backward_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    gates = (q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (gamma_k, gamma_v))
    return *(outputs(x)[0] if x.dim() == 4 else x.new_empty(x.shape) for x in (q, k, v)), *gates


def _gradients(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor, *packed: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, gamma_k, gamma_v, key_padding_mask, out, lse, *offsets = ctx.saved_tensors
    d_q, d_k, d_v, d_gamma_k, d_gamma_v = backward_op(
        q,
        k,
        v,
        gamma_k,
        gamma_v,
        key_padding_mask,
        out,
        lse,
        d_out,
        d_lse,
        *ctx.options,
        ctx.log_gate,
        *(offsets or (None, None)),
        *(packed or (None, None)),
    )
    gates = (
        None if gate is None else d_gate.to(gate.dtype) for gate, d_gate in ((gamma_k, d_gamma_k), (gamma_v, d_gamma_v))
    )
    return d_q, d_k, d_v, *gates


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, gamma_k, gamma_v, key_padding_mask, *options = inputs
    ctx.save_for_backward(q, k, v, gamma_k, gamma_v, key_padding_mask, *output)
    *ctx.options, _, ctx.log_gate = options[:6]


def _backward(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients(ctx, d_out, d_lse), *(None,) * 8


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, gamma_k, gamma_v, *options = inputs
    ctx.save_for_backward(q, k, v, gamma_k, gamma_v, None, *output, cu_seqlens_q, cu_seqlens_k)
    *ctx.options, _, ctx.log_gate = options[:6]
    ctx.longest = max_seqlen_q, max_seqlen_k


def _backward_packed(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    d_q, d_k, d_v, d_gamma_k, d_gamma_v = _gradients(ctx, d_out, d_lse, *ctx.longest)
    return d_q, d_k, d_v, *(None,) * 4, d_gamma_k, d_gamma_v, *(None,) * 6


anchored_attention_op.register_autograd(_backward, setup_context=_save)
varlen_op.register_autograd(_backward_packed, setup_context=_save_packed)
