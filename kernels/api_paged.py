"""Calls over a paged cache as a serving engine makes them: validation, then the implementation `dispatch` chooses."""

from typing import Literal, TypedDict, Unpack, overload

import torch

from . import validation, validation_paged
from .dispatch import Outputs, choose_backend, torch_backend, triton_target
from .gate_pages import GatePages
from .gates import fitted_gate, key_gate
from .pages import paged_by_sequence, write_slots
from .tiles import E4M3_TARGETS

try:
    from .ops_paged import paged_op, write_op
except ModuleNotFoundError as error:  # as in api.py
    if error.name != "triton":
        raise

HEAD_DIMS = 16, 256


class PagedOptions(TypedDict, total=False):
    """Keywords of `anchored_attention_paged` for type checkers. Meanings and defaults stand at the function."""

    gate_pages: GatePages | None
    scale: float | None
    causal: bool
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    out: torch.Tensor | None
    backend: str


@overload
def anchored_attention_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    return_lse: Literal[False] = ...,
    **options: Unpack[PagedOptions],
) -> torch.Tensor: ...


@overload
def anchored_attention_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    return_lse: Literal[True],
    **options: Unpack[PagedOptions],
) -> Outputs: ...


def anchored_attention_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    gate_pages: GatePages | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | Outputs:
    """Gated attention of packed queries over a paged cache: a step of a serving engine, prefills and decodes mixed.

    One call a layer. Sequence b has the queries cu_seqlens_q[b] up to cu_seqlens_q[b + 1], which are the last of its
    seqlens_k[b] keys; a whole prompt, a chunk of one, a few drafted tokens or a single one may stand side by side. On
    "triton" nothing is read on the host, but for the verdict on a first call (VIDEOANCHOR_SELF_CHECK), so that a CUDA
    graph can hold the call while lengths, pages and gates change. Not differentiable. Arguments that are not named here
    mean what they mean in `anchored_attention`.

    Args:
        q: (Tq, Hq, D), floating.
        k_pages, v_pages: (P, Hkv, page, D), any page size, of q's dtype, float8_e4m3fn or int8, with equal strides and
            contiguous rows: the halves of one tensor go in as they are, a cache (P, page, Hkv, D) as
            `cache.transpose(1, 2)`. They hold the keys and values of q's own tokens already (`write_pages`).
        cu_seqlens_q: (B + 1,) int32 on q's device, from 0. Rows of q from cu_seqlens_q[B] on belong to no sequence:
            their out is 0, their lse -inf.
        seqlens_k: (B,) int32 on q's device: the keys of each sequence, those of q's own tokens included. What lies
            beyond in its pages, NaN included, does not reach the output.
        block_table: (B, max_pages) int32 on q's device: the pages of each sequence in order. Entries past a sequence's
            length may be anything.
        max_seqlen_q: at least the longest sequence of queries; all that the host has to know of the lengths.
        gate_pages: gates beside the pages, from `va.gate_pages`; None: ungated, over a cache that holds plain values.
        causal: query i of sequence b stands at key seqlens_k[b] - (its queries) + i and sees the keys up to its own.
        sinks: (Hq,), floating: one more logit for each query head, with the value 0.
        k_scale, v_scale: what a quantised cache's numbers are multiplied with, fp32: one element, or one a slot and
            head, (P, Hkv, page). They must be given where the cache is quantised.
        out: where the result goes, as q, rows contiguous; it must not share memory with q. None: a new tensor.
        backend: "auto", "triton", "sdpa" or "reference". The last two take one sequence at a time, and read lengths and
            pages on the host.

    Lengths and pages are checked on the CPU, and elsewhere with the environment variable VIDEOANCHOR_DEBUG=1, which
    waits for the device. Without it a length that the block table cannot hold gives NaN, and a page that does not exist
    is read out of bounds.

    Returns:
        out (Tq, Hq, D) in q's dtype, or (out, lse) with lse (Tq, Hq) in fp32. A row that sees no key is 0, its lse
        -inf (with sinks: the sink).

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or gates of another form than their
            shape; q or the cache requires grad.

    See Also:
        write_pages: fills the cache. gate_pages: makes the gates. anchored_attention_varlen: packed keys, backward.

    Examples:
        A sequence of 20 keys, of which 5 are a chunk of its prompt, beside one that decodes its 7th token, over three
        pages of 16 slots and two KV heads:

        >>> import torch
        >>> import videoanchor_triton as va
        >>> k_pages, v_pages = torch.zeros(2, 3, 2, 16, 64)
        >>> gates = va.gate_pages(3, 16, "cpu")
        >>> slots = torch.cat([torch.arange(32, 48), torch.arange(4), torch.arange(16, 23)])
        >>> k, v = torch.randn(2, 27, 2, 64)
        >>> va.write_pages(k, v, k_pages, v_pages, slots, gates, gamma_k=1 + torch.rand(27))
        >>> va.anchored_attention_paged(
        ...     torch.randn(6, 4, 64),
        ...     k_pages,
        ...     v_pages,
        ...     cu_seqlens_q=torch.tensor([0, 5, 6], dtype=torch.int32),
        ...     seqlens_k=torch.tensor([20, 7], dtype=torch.int32),
        ...     block_table=torch.tensor([[2, 0], [1, -1]], dtype=torch.int32),
        ...     max_seqlen_q=5,
        ...     gate_pages=gates,
        ... ).shape
        torch.Size([6, 4, 64])
    """
    validation.check_tensors(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        cu_seqlens_q=cu_seqlens_q,
        seqlens_k=seqlens_k,
        block_table=block_table,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
    validation_paged.check_rows("q", q)
    validation_paged.check_pages("q", q, k_pages, v_pages)
    validation_paged.check_heads(q, k_pages, sinks, out)
    validation_paged.check_scales(k_pages, k_scale, v_scale)
    validation_paged.check_gate_pages(gate_pages, k_pages, v_scale)
    validation_paged.check_batch(cu_seqlens_q, seqlens_k, block_table, max_seqlen_q)
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, "log-bias")
    _refuse_gradients("anchored_attention_paged", q=q, k_pages=k_pages, v_pages=v_pages, sinks=sinks, out=out)
    if validation_paged.values_are_wanted(q):
        pages, _, page_size, _ = k_pages.shape
        validation_paged.check_batch_values(
            cu_seqlens_q, seqlens_k, block_table, q.shape[0], max_seqlen_q, pages, page_size
        )

    chosen = _choose(backend, q, k_pages)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if chosen == "triton" and seqlens_k.numel() > 0:
        if return_lse:
            lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32).T
        values, form = (None, "") if gate_pages is None else gate_pages
        paged_op(
            q,
            k_pages,
            v_pages,
            cu_seqlens_q,
            seqlens_k,
            block_table,
            max_seqlen_q,
            values,
            form,
            k_scale,
            v_scale,
            sinks,
            out,
            lse,
            scale,
            causal,
            window,
            softcap,
        )
    else:
        precise = torch.float64 if chosen == "reference" else torch.promote_types(q.dtype, torch.float32)
        attend = torch_backend(
            "sdpa" if chosen == "triton" else chosen, scale, causal, window, softcap, False, True, True
        )
        batch = cu_seqlens_q, seqlens_k, block_table, max_seqlen_q
        found, lse = paged_by_sequence(
            attend, q, k_pages, v_pages, *batch, gate_pages, k_scale, v_scale, sinks, precise
        )
        out.copy_(found)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    gate_pages: GatePages | None = None,
    gamma_k: torch.Tensor | None = None,
    gamma_v: torch.Tensor | None = None,
    log_gamma_k: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Write keys, values and gates of a step's tokens into their slots of a paged cache, in one launch.

    On "triton" nothing is read on the host, so that a CUDA graph can hold the call. Not differentiable.

    Args:
        k, v: (T, Hkv, D), floating.
        k_pages, v_pages: (P, Hkv, page, D), as in `anchored_attention_paged`, of k's dtype, float8_e4m3fn or int8.
            Numbers that a quantised cache cannot hold become the largest that it can.
        slot_mapping: (T,) int32 or int64 on k's device: token t goes to row `slot % page` of page `slot // page`. A
            negative slot: the token is left out, whatever its row holds. No slot may be named twice.
        gate_pages: from `va.gate_pages`. Every token that is written gets a gate, a neutral one where none is given:
            a slot may hold that of another sequence. None: the cache is ungated.
        gamma_k, gamma_v, log_gamma_k: (T,) or (T, heads of gate_pages), floating, any strides; log_gamma_k is the
            natural logarithm of gamma_k, one of the two may be given. "written" takes gamma_k within `2**-20` and
            `2**20`, "apart" every one from 0 on (log_gamma_k = -inf hides a key). None: neutral.
        k_scale, v_scale: for a quantised cache, fp32: one element, which k and v are divided by; or (P, Hkv, page),
            which get a scale for each token and head, its largest absolute number over 448 (float8_e4m3fn) or 127
            (int8).
        backend: as in `anchored_attention_paged`; "sdpa" and "reference" are torch's indexing, which waits for the
            device.

    Slots, gates and, for int8, NaN and infinities are checked on the CPU, and elsewhere with the environment variable
    VIDEOANCHOR_DEBUG=1. Without it tokens of slots beyond the cache are left out, and a gate that its form cannot hold
    leaves NaN in the slot, so that whoever reads the key gets NaN.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or gates are given without pages
            to keep them in; k, v or the cache requires grad.

    See Also:
        anchored_attention_paged: reads what is written, with an example of both. gate_pages: makes the gates.

    Examples:
        Two tokens into slots 17 and 3, the row of padding between them into none:

        >>> import torch
        >>> import videoanchor_triton as va
        >>> k_pages, v_pages = torch.zeros(2, 4, 1, 16, 64)
        >>> gates = va.gate_pages(4, 16, "cpu")
        >>> k, v = torch.ones(2, 3, 1, 64)
        >>> va.write_pages(k, v, k_pages, v_pages, torch.tensor([17, -1, 3]), gates, gamma_k=torch.tensor([2.0, 1, 4]))
        >>> gates.values[1, 0, 1], v_pages[0, 0, 3, 0]
        (tensor(2.), tensor(4.))
    """
    validation.check_tensors(
        k=k,
        v=v,
        k_pages=k_pages,
        v_pages=v_pages,
        slot_mapping=slot_mapping,
        gamma_k=gamma_k,
        gamma_v=gamma_v,
        log_gamma_k=log_gamma_k,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    validation_paged.check_rows("k", k)
    validation_paged.check_pages("k", k, k_pages, v_pages)
    if v.shape != k.shape or v.dtype != k.dtype or k.shape[1] != k_pages.shape[1]:
        raise ValueError(
            f"k and v must be ({k.shape[0]}, {k_pages.shape[1]}, {k_pages.shape[3]}) of one dtype to match k_pages, "
            f"got {tuple(k.shape)} of {k.dtype} and {tuple(v.shape)} of {v.dtype}"
        )
    validation_paged.check_scales(k_pages, k_scale, v_scale)
    validation_paged.check_gate_pages(gate_pages, k_pages, v_scale)
    validation_paged.check_slots(slot_mapping, k.shape[0])
    of_keys, log_gate = key_gate(gamma_k, log_gamma_k)
    validation_paged.check_gammas(gate_pages, k.shape[0], gamma_k, gamma_v, log_gamma_k)
    gates = {"gamma_k": gamma_k, "gamma_v": gamma_v, "log_gamma_k": log_gamma_k}
    _refuse_gradients("write_pages", k=k, v=v, k_pages=k_pages, v_pages=v_pages, **gates)
    gates_of_step = fitted_gate(of_keys, torch.float32, log_gate), fitted_gate(gamma_v, torch.float32), log_gate
    if validation_paged.values_are_wanted(k):
        validation_paged.check_written_values(k, v, k_pages, slot_mapping, gate_pages, *gates_of_step)
    if _choose(backend, k, k_pages) == "triton":
        values, form = (None, "") if gate_pages is None else gate_pages
        write_op(k, v, k_pages, v_pages, slot_mapping, values, form, *gates_of_step, k_scale, v_scale)
    else:
        write_slots(k, v, k_pages, v_pages, slot_mapping, gate_pages, *gates_of_step, k_scale, v_scale)


def _refuse_gradients(name: str, **tensors: torch.Tensor | None) -> None:
    if validation.autograd_only(*tensors.values()) is not None:
        raise ValueError(f"{name} has no derivative: call it outside of torch.func.grad and jvp, without dual tensors")
    for of_tensor, x in tensors.items():
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(f"{name} has no backward, and {of_tensor} requires grad: call it under torch.no_grad()")


def _choose(backend: str, x: torch.Tensor, k_pages: torch.Tensor) -> str:
    """`choose_backend` for a cache."""
    refused = None
    least, most = HEAD_DIMS
    if not least <= x.shape[-1] <= most:
        refused = f"the head dim is {x.shape[-1]}, the kernels over pages take {least} to {most}"
    elif k_pages.dtype == torch.float8_e4m3fn:
        target, _ = triton_target(x.device)
        if target is not None and target not in E4M3_TARGETS:
            refused = f"{target} has no conversions of float8_e4m3fn"
    return choose_backend(backend, x, "calls over pages", refused, paged=True)
