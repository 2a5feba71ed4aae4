"""Gated attention: validation and the choice of an implementation."""

import logging
import math
from functools import cache
from typing import Literal, overload

import torch

from .dispatch import triton_refusal, triton_target
from .gates import POST_EXP_LIMIT, check_gate, check_gate_values, expand_gate
from .reference import reference_attention
from .sdpa import sdpa_attention

try:
    from .ops import anchored_attention_op
except ModuleNotFoundError as error:  # triton has wheels for Linux only, and triton_refusal says so
    if error.name != "triton":
        raise

BACKENDS = ("auto", "triton", "sdpa", "reference")
GATE_FORMS = ("log-bias", "post-exp")
logger = logging.getLogger(__name__)


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
    return_lse: Literal[True],
    backend: str = ...,
    gate_form: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


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
    return_lse: bool = False,
    backend: str = "auto",
    gate_form: str = "log-bias",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale Q K^T + log(gamma_Q gamma_K^T) + mask) (gamma_V * V): VideoAnchor's attention (arXiv 2509.25151).

    Args:
        q: (B, Hq, Nq, D), floating.
        k, v: (B, Hkv, Nk, D) of q's dtype and device; Hq must be a multiple of Hkv.
        gamma_k, gamma_v: factors of keys and values, (N,), (B, N) or (B, Hkv, N) with N <= Nk, floating, finite,
            >= 0. Keys from N on are neutral (factor 1). A key with gamma_k = 0 is invisible. Values are checked where
            that costs no synchronisation, on the CPU outside torch.compile; elsewhere a bad gamma_k gives NaN with
            "log-bias", and with "post-exp" may go unnoticed.
        gamma_q: factors of queries, (Nq,), (B, Nq) or (B, Hq, Nq). They cancel in the softmax and change the lse only,
            by log gamma_q.
        scale: factor of the logits, finite and > 0; None means D ** -0.5.
        causal: query i stands at key Nk - Nq + i (bottom-right alignment) and sees the keys up to its own.
        key_padding_mask: (B, Nk) bool, True where the key may be seen. Whatever k, v and the gates hold elsewhere, NaN
            included, does not reach the output.
        window: with `causal`, a query sees only the last `window` keys up to and including its own; at least 1.
        return_lse: also return the log-sum-exp of each row, the gates' terms included.
        backend: "triton"; "sdpa", torch's scaled_dot_product_attention, any device and dtype, differentiable, no
            Nq x Nk tensor; "reference", dense fp64, for tests; "auto", Triton where it can take the call on a
            GPU, else sdpa.
        gate_form: "log-bias" takes any gamma_k >= 0. "post-exp" is cheaper in prefill, and the caller promises that
            every gamma_k is within [2**-20, 2**20].

    Returns:
        out (B, Hq, Nq, D) in q's dtype, or (out, lse) with lse (B, Hq, Nq) in fp32, natural logarithm. A row that sees
        no key is 0 with lse = -inf.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; backend="triton" cannot take
            the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if gate_form not in GATE_FORMS:
        raise ValueError(f"gate_form must be one of {GATE_FORMS}, got {gate_form!r}")
    _check_tensors(q, k, v, gamma_k, gamma_v, gamma_q, key_padding_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    causal = bool(causal)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an int >= 1, got {window!r}")
    if window is not None and not causal:
        raise ValueError("window needs causal=True, got causal=False")
    post_exp = gate_form == "post-exp"
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (1 / POST_EXP_LIMIT, POST_EXP_LIMIT) if post_exp else (0.0, math.inf)
        _check_values("gamma_k", gamma_k, key_padding_mask, low, high)
        _check_values("gamma_v", gamma_v, key_padding_mask)
        _check_values("gamma_q", gamma_q, None)

    chosen = _choose_backend(backend, q, k, v, gamma_k, gamma_v)
    if chosen == "reference":
        out, lse = reference_attention(
            q,
            k,
            v,
            gamma_k=gamma_k,
            gamma_v=gamma_v,
            scale=scale,
            causal=causal,
            key_padding_mask=key_padding_mask,
            window=window,
        )
        out, lse = out.to(q.dtype), lse.float()
    elif chosen == "triton":
        out, lse = anchored_attention_op(q, k, v, gamma_k, gamma_v, key_padding_mask, scale, causal, window, post_exp)
    else:
        out, lse = sdpa_attention(
            q, k, v, gamma_k, gamma_v, key_padding_mask, scale, causal, window, post_exp, return_lse
        )
    if not return_lse:
        return out
    if gamma_q is not None:
        lse = lse + expand_gate(gamma_q.float(), q.shape[0], q.shape[1]).log()
    return out, lse


def available_backends(device: torch.device | str) -> dict[str, str]:
    """One line for each backend of `anchored_attention`: what it can do on `device`."""
    device = torch.device(device)
    refusal = triton_refusal(device)
    target = triton_target(device)[0]
    return {
        "triton": f"yes, tiles for {target}, forward only" if refusal is None else f"no: {refusal}",
        "sdpa": "yes, any dtype and head dim, differentiable",
        "reference": "yes, dense in fp64, for tests",
    }


def _choose_backend(backend: str, q: torch.Tensor, *others: torch.Tensor | None) -> str:
    if backend in ("sdpa", "reference"):
        return backend
    requires_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *others))
    refusal = triton_refusal(q.device, q.dtype, q.shape[-1], q.shape[0], requires_grad)
    if backend == "triton":
        if refusal is not None:
            raise ValueError(f"backend='triton' cannot take this call: {refusal}; use backend='sdpa' or 'auto'")
        return backend
    if q.device.type != "cuda":
        return "sdpa"
    if refusal is not None and not torch.compiler.is_compiling():
        _log_fallback(refusal)
    return "triton" if refusal is None else "sdpa"


@cache
def _log_fallback(refusal: str) -> None:
    logger.info("attention runs on torch's scaled_dot_product_attention instead of Triton: %s", refusal)


def _check_values(
    name: str, gate: torch.Tensor | None, visible: torch.Tensor | None, low: float = 0.0, high: float = math.inf
) -> None:
    if gate is not None:
        check_gate_values(name, gate.detach(), visible, low, high)


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    gamma_q: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
) -> None:
    named = {"q": q, "k": k, "v": v}
    optional = {"gamma_k": gamma_k, "gamma_v": gamma_v, "gamma_q": gamma_q, "key_padding_mask": key_padding_mask}
    for name, x in (named | {name: x for name, x in optional.items() if x is not None}).items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    for name, x in named.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, H, N, D), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must have shape ({batch}, Hkv, Nk, {head_dim}) to match q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if head_dim == 0 or kv_heads == 0 or query_heads == 0 or query_heads % kv_heads:
        raise ValueError(
            f"q's heads must be a multiple of k's heads and the head dim at least 1, "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if gamma_k is not None:
        check_gate("gamma_k", gamma_k, batch, kv_heads, keys)
    if gamma_v is not None:
        check_gate("gamma_v", gamma_v, batch, kv_heads, keys)
    if gamma_q is not None:
        check_gate("gamma_q", gamma_q, batch, query_heads, queries, exact=True)
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be a bool tensor, got {key_padding_mask.dtype}")
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise ValueError(f"key_padding_mask must have shape ({batch}, {keys}), got {tuple(key_padding_mask.shape)}")
