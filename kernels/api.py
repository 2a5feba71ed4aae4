"""The public operations of gated attention: validation and the choice of an implementation."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, overload

import torch

from . import validation
from .dispatch import hopper_choice, triton_refusal, triton_target
from .gates import expand_gate, fitted_gate
from .merge import merge_attention
from .reference import reference_attention
from .sdpa import sdpa_attention
from .sequences import decode_by_sequence, varlen_by_sequence

try:
    from .ops import anchored_attention_op, decode_op, varlen_op
except ModuleNotFoundError as error:  # triton has wheels for Linux only, and triton_refusal says so
    if error.name != "triton":
        raise

BACKENDS = ("auto", "triton", "hopper", "sdpa", "reference")
logger = logging.getLogger(__name__)
Outputs = tuple[torch.Tensor, torch.Tensor]

__all__ = [
    "anchored_attention",
    "anchored_attention_decode",
    "anchored_attention_varlen",
    "available_backends",
    "merge_attention",
]


@overload
def anchored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gamma_k: torch.Tensor | None = ...,
    gamma_v: torch.Tensor | None = ...,
    gamma_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    key_padding_mask: torch.Tensor | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    gate_form: str = ...,
) -> torch.Tensor: ...


@overload
def anchored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gamma_k: torch.Tensor | None = ...,
    gamma_v: torch.Tensor | None = ...,
    gamma_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    key_padding_mask: torch.Tensor | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
    gate_form: str = ...,
) -> Outputs: ...


def anchored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gamma_k: torch.Tensor | None = None,
    gamma_v: torch.Tensor | None = None,
    gamma_q: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    gate_form: str = "log-bias",
) -> torch.Tensor | Outputs:
    """softmax(scale Q K^T + log(gamma_Q gamma_K^T) + mask) (gamma_V * V): VideoAnchor's attention (arXiv 2509.25151).

    Differentiable in q, k, v, gamma_k and gamma_v, and so is the lse, in gamma_q too.

    Args:
        q: (B, Hq, Nq, D), floating.
        k, v: (B, Hkv, Nk, D) of q's dtype and device; Hq must be a multiple of Hkv.
        gamma_k, gamma_v: factors of keys and values, (N,), (B, N) or (B, Hkv, N) with N <= Nk, floating, finite,
            >= 0. Keys from N on are neutral (factor 1). A key with gamma_k = 0 is invisible, and the gradient of that
            gamma_k is 0. fp64 factors become fp32 unless q is fp64, and must fit. Values are checked where that costs
            no synchronisation, on the CPU outside torch.compile and torch.func; elsewhere a bad gamma_k gives NaN with
            "log-bias", and with "post-exp" may go unnoticed. In fp16 gamma_v * v may exceed what fp16 holds where the
            output does not; in other dtypes a value beyond theirs gives inf or NaN.
        gamma_q: factors of queries, (Nq,), (B, Nq) or (B, Hq, Nq). They cancel in the softmax and change the lse only,
            by log gamma_q.
        scale: factor of the logits, finite and > 0; None means D ** -0.5.
        causal: query i stands at key Nk - Nq + i (bottom-right alignment) and sees the keys up to its own.
        key_padding_mask: (B, Nk) bool, True where the key may be seen. Whatever k, v and the gates hold elsewhere, NaN
            included, does not reach the output.
        window: with `causal`, a query sees only the last `window` keys up to and including its own; at least 1.
        softcap: the logits become softcap * tanh(scale Q K^T / softcap), before the gate; finite and > 0.
        return_lse: also return the log-sum-exp of each row, the gates' terms included.
        backend: "triton"; "hopper", prefill for sm_90 in Gluon, which "auto" leaves alone unless VIDEOANCHOR_HOPPER=1
            is set, since it has yet to run on a GPU; "sdpa", torch's scaled_dot_product_attention, any device and
            dtype, no Nq x Nk tensor; "reference", dense fp64, for tests; "auto", the best on a GPU that can take the
            call, else sdpa. Under torch.func.grad and the like, "triton" and "hopper" cannot take a call.
        gate_form: "log-bias" takes any gamma_k >= 0. "post-exp" is cheaper in prefill, and the caller promises that
            every gamma_k is within [2**-20, 2**20]. `choose_gate_form` reads off a gate which form it allows.

    Returns:
        out (B, Hq, Nq, D) in q's dtype, or (out, lse) with lse (B, Hq, Nq) in fp32, natural logarithm. A row that sees
        no key is 0 with lse = -inf.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the backend asked for cannot
            take the call.
    """
    validation.check_tensors(
        q=q, k=k, v=v, gamma_k=gamma_k, gamma_v=gamma_v, gamma_q=gamma_q, key_padding_mask=key_padding_mask
    )
    validation.check_qkv(q, k, v, "B, H, N, D", batched=True)
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, gate_form)
    batch, query_heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    validation.check_gates(gamma_k, gamma_v, gamma_q, (batch, query_heads, queries), (batch, kv_heads, keys))
    gamma_k, gamma_v, gamma_q = (fitted_gate(gate, q.dtype) for gate in (gamma_k, gamma_v, gamma_q))
    validation.check_padding(key_padding_mask, batch, keys)
    if validation.values_are_free(q):
        validation.check_values(gamma_k, gamma_v, gamma_q, gate_form, key_padding_mask)

    post_exp = gate_form == "post-exp"
    chosen = _choose_backend(backend, q, refused=validation.autograd_only(q, k, v, gamma_k, gamma_v))
    if chosen in ("triton", "hopper"):
        features = {"padding": key_padding_mask is not None, "value_gate": gamma_v is not None}
        hopper = hopper_choice(q, k, v, asked=backend, window=window, softcap=softcap, **features)
        out, lse = anchored_attention_op(
            q, k, v, gamma_k, gamma_v, key_padding_mask, scale, causal, window, softcap, post_exp, hopper
        )
    else:
        attend = _dense(chosen, scale, causal, window, softcap, post_exp, return_lse)
        out, lse = attend(q, k, v, gamma_k, gamma_v, key_padding_mask)
    if not return_lse:
        return out
    if gamma_q is not None:
        lse = lse + expand_gate(gamma_q.float(), batch, query_heads).log()
    return out, lse


@overload
def anchored_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    gamma_k: torch.Tensor | None = ...,
    gamma_v: torch.Tensor | None = ...,
    gamma_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    gate_form: str = ...,
) -> torch.Tensor: ...


@overload
def anchored_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    gamma_k: torch.Tensor | None = ...,
    gamma_v: torch.Tensor | None = ...,
    gamma_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
    gate_form: str = ...,
) -> Outputs: ...


def anchored_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    gamma_k: torch.Tensor | None = None,
    gamma_v: torch.Tensor | None = None,
    gamma_q: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    gate_form: str = "log-bias",
) -> torch.Tensor | Outputs:
    """`anchored_attention` within each of the sequences that are packed one after the other, without padding.

    Differentiable as `anchored_attention` is. Arguments that are not named here mean what they mean there.

    Args:
        q: (Tq, Hq, D), floating.
        k, v: (Tk, Hkv, D) of q's dtype and device.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device: sequence b holds the queries cu_seqlens_q[b] up to
            cu_seqlens_q[b + 1] (exclusive), and the keys alike. They start at 0, never decrease, and end at Tq and Tk;
            a sequence may have no query, or no key. Nothing of a sequence, NaN included, reaches another one.
        max_seqlen_q, max_seqlen_k: at least the longest lengths. Like the values of cu_seqlens they are checked on the
            CPU and by "sdpa" and "reference" only; elsewhere out and lse of queries beyond max_seqlen_q (rounded up to
            a tile) are NaN, and so are their gradients and those of keys beyond max_seqlen_k; rows past the last
            sequence are 0 with lse = -inf and have no gradient.
        gamma_k, gamma_v: (Tk,) or (Tk, Hkv).
        gamma_q: (Tq,) or (Tq, Hq).
        causal, window: bottom-right aligned in each sequence by itself.
        backend: as in `anchored_attention`, without "hopper". "sdpa" and "reference" take one sequence at a time and
            read cu_seqlens on the host.

    Returns:
        out (Tq, Hq, D) in q's dtype, or (out, lse) with lse (Tq, Hq) in fp32.

    Raises:
        TypeError, ValueError: as in `anchored_attention`.
    """
    validation.check_tensors(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        gamma_k=gamma_k,
        gamma_v=gamma_v,
        gamma_q=gamma_q,
    )
    validation.check_qkv(q, k, v, "T, H, D")
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, gate_form)
    validation.check_offsets(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    validation.check_packed_gate("gamma_k", gamma_k, *k.shape[:2])
    validation.check_packed_gate("gamma_v", gamma_v, *k.shape[:2])
    validation.check_packed_gate("gamma_q", gamma_q, *q.shape[:2])
    gamma_k, gamma_v, gamma_q = (fitted_gate(gate, q.dtype) for gate in (gamma_k, gamma_v, gamma_q))
    if validation.values_are_free(q):
        validation.check_offset_values("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        validation.check_offset_values("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
        validation.check_values(gamma_k, gamma_v, gamma_q, gate_form)

    post_exp = gate_form == "post-exp"
    refused = validation.autograd_only(q, k, v, gamma_k, gamma_v)
    chosen = _choose_backend(backend, q, "packed sequences", refused, cu_seqlens_q.numel() - 1)
    if chosen == "triton":
        out, lse = varlen_op(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            gamma_k,
            gamma_v,
            scale,
            causal,
            window,
            softcap,
            post_exp,
        )
    else:
        attend = _dense(chosen, scale, causal, window, softcap, post_exp, True)
        longest = max_seqlen_q, max_seqlen_k
        out, lse = varlen_by_sequence(attend, q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, gamma_k, gamma_v)
    if not return_lse:
        return out
    if gamma_q is not None:
        lse = lse + (gamma_q if gamma_q.dim() == 2 else gamma_q[:, None]).float().log()
    return out, lse


@overload
def anchored_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = ...,
    *,
    gamma_k: torch.Tensor | None = ...,
    gamma_v: torch.Tensor | None = ...,
    gamma_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def anchored_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = ...,
    *,
    gamma_k: torch.Tensor | None = ...,
    gamma_v: torch.Tensor | None = ...,
    gamma_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> Outputs: ...


def anchored_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    *,
    gamma_k: torch.Tensor | None = None,
    gamma_v: torch.Tensor | None = None,
    gamma_q: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | Outputs:
    """`anchored_attention` of the last 1 to 16 queries of each sequence over a cache, contiguous or paged.

    On "triton" nothing is read on the host, so that a CUDA graph can hold the call while lengths, pages and gates
    change. Not differentiable there. Arguments that are not named here mean what they mean in `anchored_attention`.

    Args:
        q: (B, Hq, Nq, D), floating, Nq from 1 to 16 (more than 1 for speculative decoding).
        k_cache, v_cache: (B, Hkv, N, D); or with a block_table pages (n_pages, Hkv, page_size, D), the page size 16,
            32, 64, 128 or 256. Any strides with contiguous rows: a cache (n_pages, page_size, Hkv, D) goes in as
            `cache.transpose(1, 2)`. They hold the keys and values of q's own tokens already, ungated.
        cache_seqlens: (B,) int32 on q's device: the keys of each sequence, those of q's own tokens included. What lies
            beyond in the cache, NaN included, does not reach the output.
        block_table: (B, max_pages) int32 on q's device: the pages of each sequence in order. Entries past a sequence's
            length may be anything.
        gamma_k, gamma_v: (N',), (B, N') or (B, Hkv, N') by position in the sequence, N' up to the cache's capacity;
            keys from N' on are neutral.
        causal: query i of sequence b stands at key cache_seqlens[b] - Nq + i and sees the keys up to its own.
        backend: as in `anchored_attention`, without "hopper". "sdpa" and "reference" take one sequence at a time and
            read lengths and pages on the host.

    Lengths and pages are checked on the CPU; elsewhere a length that the cache cannot hold gives NaN, and a page that
    does not exist is read out of bounds.

    Returns:
        out (B, Hq, Nq, D) in q's dtype, or (out, lse) with lse (B, Hq, Nq) in fp32.

    Raises:
        TypeError, ValueError: as in `anchored_attention`.
    """
    validation.check_tensors(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        gamma_k=gamma_k,
        gamma_v=gamma_v,
        gamma_q=gamma_q,
    )
    validation.check_qkv(q, k_cache, v_cache, "B, H, N, D", ("k_cache", "v_cache"))
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, "log-bias")
    capacity = validation.check_cache(q, k_cache, cache_seqlens, block_table)
    batch, query_heads, queries, _ = q.shape
    pages, kv_heads, page_size, _ = k_cache.shape
    validation.check_gates(gamma_k, gamma_v, gamma_q, (batch, query_heads, queries), (batch, kv_heads, capacity))
    gamma_k, gamma_v, gamma_q = (fitted_gate(gate, q.dtype) for gate in (gamma_k, gamma_v, gamma_q))
    if validation.values_are_free(q):
        validation.check_cache_values(cache_seqlens, capacity, block_table, pages, page_size)
        validation.check_values(gamma_k, gamma_v, gamma_q, "log-bias")

    tensors = (q, k_cache, v_cache, gamma_k, gamma_v)
    refused = validation.autograd_only(*tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        refused = "an input requires grad and decode has no backward"
    chosen = _choose_backend(backend, q, "decode", refused)
    if chosen == "triton":
        out, lse = decode_op(
            q, k_cache, v_cache, cache_seqlens, block_table, gamma_k, gamma_v, scale, causal, window, softcap
        )
    else:
        attend = _dense(chosen, scale, causal, window, softcap, False, True)
        out, lse = decode_by_sequence(attend, q, k_cache, v_cache, cache_seqlens, block_table, gamma_k, gamma_v)
    if not return_lse:
        return out
    if gamma_q is not None:
        lse = lse + expand_gate(gamma_q.float(), batch, query_heads).log()
    return out, lse


def available_backends(device: torch.device | str) -> dict[str, str]:
    """One line for each backend of `anchored_attention`: what it can do on `device`."""
    device = torch.device(device)
    refusal = triton_refusal(device)
    target = triton_target(device)[0]
    return {
        "triton": f"yes, tiles for {target}" if refusal is None else f"no: {refusal}",
        "hopper": "prefill only, off unless VIDEOANCHOR_HOPPER=1" if target == "sm_90" else "no: it takes sm_90 only",
        "sdpa": "yes, any dtype and head dim",
        "reference": "yes, dense in fp64, for tests",
    }


def _dense(
    backend: str,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    positive_gate: bool,
    return_lse: bool,
) -> Callable[..., Outputs]:
    """SDPA (whose lse is None unless asked for) or the reference, with their options set."""

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gamma_k: torch.Tensor | None,
        gamma_v: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> Outputs:
        gates = {"gamma_k": gamma_k, "gamma_v": gamma_v, "key_padding_mask": key_padding_mask}
        options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        if backend == "sdpa":
            return sdpa_attention(q, k, v, **gates, **options, positive_gate=positive_gate, return_lse=return_lse)
        out, lse = reference_attention(q, k, v, **gates, **options)
        return out.to(q.dtype), lse.float()

    return attend


def _choose_backend(
    backend: str, q: torch.Tensor, no_hopper: str | None = None, refused: str | None = None, batch: int | None = None
) -> str:
    """The backend for a call. `no_hopper` names an op that "hopper" lacks, `refused` says why Triton cannot take it."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "hopper" and no_hopper:
        raise ValueError(f"backend='hopper' is for prefill and cannot take {no_hopper}; use backend='triton' or 'auto'")
    if backend in ("sdpa", "reference", "hopper"):
        return backend
    refused = refused or triton_refusal(q.device, q.dtype, q.shape[-1], q.shape[0] if batch is None else batch)
    if backend == "triton":
        if refused is not None:
            raise ValueError(f"backend='triton' cannot take this call: {refused}; use backend='sdpa' or 'auto'")
        return backend
    if q.device.type != "cuda":
        return "sdpa"
    if refused is not None and not torch.compiler.is_compiling():
        _log_fallback(no_hopper, refused)
    return "triton" if refused is None else "sdpa"


@cache
def _log_fallback(op: str | None, refusal: str) -> None:
    told = "%s on torch's scaled_dot_product_attention instead of Triton%s: %s"
    if op is None:
        logger.info(told, "attention runs", "", refusal)
    else:  # see sequences.py
        host = ", a sequence at a time with lengths read on the host, so that no CUDA graph can hold the call"
        logger.warning(told, f"{op} run" + "s" * (op == "decode"), host, refusal)
