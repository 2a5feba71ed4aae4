"""Gated attention of tensors: validation, then the implementation that `dispatch` chooses. Caches: `api_cache`."""

from typing import Literal, TypedDict, Unpack, overload

import torch

from . import validation
from .dispatch import Outputs, choose_backend, hopper_choice, torch_backend
from .gates import expand_gate, fitted_gate, key_gate
from .sequences import varlen_by_sequence

try:
    from .ops import anchored_attention_op, varlen_op
except ModuleNotFoundError as error:  # triton has wheels for Linux only, and triton_refusal says so
    if error.name != "triton":
        raise


class CacheOptions(TypedDict, total=False):
    """Keywords of `anchored_attention_decode` for type checkers. Meanings and defaults stand at the functions."""

    gamma_k: torch.Tensor | None
    gamma_v: torch.Tensor | None
    gamma_q: torch.Tensor | None
    log_gamma_k: torch.Tensor | None
    scale: float | None
    causal: bool
    window: int | None
    softcap: float | None
    backend: str


class VarlenOptions(CacheOptions, total=False):
    """Keywords of `anchored_attention_varlen`."""

    gate_form: str


class Options(VarlenOptions, total=False):
    """Keywords of `anchored_attention`."""

    key_padding_mask: torch.Tensor | None


@overload
def anchored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[Options],
) -> torch.Tensor: ...


@overload
def anchored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> Outputs: ...


def anchored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gamma_k: torch.Tensor | None = None,
    gamma_v: torch.Tensor | None = None,
    gamma_q: torch.Tensor | None = None,
    log_gamma_k: torch.Tensor | None = None,
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

    Differentiable in q, k, v, gamma_k or log_gamma_k, and gamma_v, and so is the lse, in gamma_q too.

    Args:
        q: (B, Hq, Nq, D), floating.
        k, v: (B, Hkv, Nk, D) of q's dtype and device; Hq must be a multiple of Hkv.
        gamma_k, gamma_v: factors of keys and values, (N,), (B, N), (B, Hkv, N), or (B, Hq, N) for each query head,
            N <= Nk, floating, finite, >= 0. Keys from N on are neutral (factor 1). A key with gamma_k = 0 is invisible,
            and the gradient of that gamma_k is 0. fp64 factors become fp32 unless q is fp64, and must fit. Values are
            checked where that costs no synchronisation, on the CPU outside torch.compile and torch.func; elsewhere a
            bad gamma_k gives NaN with "log-bias", and with "post-exp" may go unnoticed. In fp16 gamma_v * v may exceed
            what fp16 holds where the output does not; in other dtypes a value beyond theirs gives inf or NaN.
        gamma_q: factors of queries, (Nq,), (B, Nq) or (B, Hq, Nq). They cancel in the softmax and change the lse only,
            by log gamma_q.
        log_gamma_k: instead of gamma_k its natural logarithm, of the same shapes: any bias of keys, finite and at most
            `2**126` in size, or -inf for a key that is invisible. Logits are fp32: a bias of size b rounds its logit by
            about `2**-23 * b`. A constant of a head cancels in the output: shift what is large where weights are.
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
            every gamma_k (exp(log_gamma_k)) is within `[2**-20, 2**20]`. `choose_gate_form` reads off a gate which form
            it allows.

    Returns:
        out (B, Hq, Nq, D) in q's dtype, or (out, lse) with lse (B, Hq, Nq) in fp32, natural logarithm. A row that sees
        no key is 0 with lse = -inf.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the backend asked for cannot
            take the call.

    See Also:
        anchored_attention_varlen: packed sequences, without padding.
        anchored_attention_decode: the last queries over a cache, contiguous or paged.
        merge_attention: joins the attention over parts of the keys.
        choose_gate_form: the cheapest `gate_form` that a gate allows.
        available_backends: what each `backend` can do on a device.

    Examples:
        A key with gamma_k = 3 counts as three equal keys do:

        >>> import torch
        >>> import videoanchor_triton as va
        >>> q, k, v = torch.randn(3, 1, 4, 2, 16)  # (batch, heads, tokens, head dim) each
        >>> out = va.anchored_attention(q, k, v, gamma_k=torch.tensor([1.0, 3.0]))
        >>> expected = va.anchored_attention(q, k[:, :, [0, 1, 1, 1]], v[:, :, [0, 1, 1, 1]])
        >>> torch.allclose(out, expected, atol=1e-5)
        True
        >>> out, lse = va.anchored_attention(q, k, v, causal=True, return_lse=True)
        >>> lse.shape
        torch.Size([1, 4, 2])

        As a bias of the logits, of each query head its own: ALiBi, whose slopes times the distance are, but for a
        constant of each row, slopes times the key's position.

        >>> slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        >>> bias = slopes[:, None] * torch.arange(2)
        >>> out = va.anchored_attention(q, k, v, causal=True, log_gamma_k=bias[None])
    """
    validation.check_tensors(
        q=q,
        k=k,
        v=v,
        gamma_k=gamma_k,
        gamma_v=gamma_v,
        gamma_q=gamma_q,
        log_gamma_k=log_gamma_k,
        key_padding_mask=key_padding_mask,
    )
    validation.check_qkv(q, k, v, "B, H, N, D", batched=True)
    of_keys, log_gate = key_gate(gamma_k, log_gamma_k)
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, gate_form)
    batch, query_heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    sizes = (batch, query_heads, queries), (batch, kv_heads, keys)
    validation.check_gates(of_keys, gamma_v, gamma_q, *sizes, log_gate)
    of_keys = fitted_gate(of_keys, q.dtype, log_gate)
    gamma_v, gamma_q = (fitted_gate(gate, q.dtype) for gate in (gamma_v, gamma_q))
    validation.check_padding(key_padding_mask, batch, keys)
    if validation.values_are_free(q):
        validation.check_values(of_keys, gamma_v, gamma_q, gate_form, key_padding_mask, log_gate)

    post_exp = gate_form == "post-exp"
    chosen = choose_backend(backend, q, refused=validation.autograd_only(q, k, v, of_keys, gamma_v))
    if chosen in ("triton", "hopper"):
        features = {"padding": key_padding_mask is not None, "value_gate": gamma_v is not None}
        hopper = hopper_choice(q, k, v, asked=backend, window=window, softcap=softcap, **features)
        out, lse = anchored_attention_op(
            q, k, v, of_keys, gamma_v, key_padding_mask, scale, causal, window, softcap, post_exp, log_gate, hopper
        )
    else:
        attend = torch_backend(chosen, scale, causal, window, softcap, post_exp, return_lse, log_gate)
        out, lse = attend(q, k, v, of_keys, gamma_v, key_padding_mask)
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
    return_lse: Literal[False] = ...,
    **options: Unpack[VarlenOptions],
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
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
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
    log_gamma_k: torch.Tensor | None = None,
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
        gamma_k, log_gamma_k, gamma_v: (Tk,), (Tk, Hkv), or (Tk, Hq) for each query head.
        gamma_q: (Tq,) or (Tq, Hq).
        causal, window: bottom-right aligned in each sequence by itself.
        backend: as in `anchored_attention`, without "hopper". "sdpa" and "reference" take one sequence at a time and
            read cu_seqlens on the host.

    Returns:
        out (Tq, Hq, D) in q's dtype, or (out, lse) with lse (Tq, Hq) in fp32.

    Raises:
        TypeError, ValueError: as in `anchored_attention`.

    See Also:
        anchored_attention: sequences of one length, or padded.
        anchored_attention_decode: the last queries over a cache.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> q, k, v = torch.randn(3, 7, 4, 16)  # 7 tokens of two sequences, of 2 and of 5
        >>> offsets = torch.tensor([0, 2, 7], dtype=torch.int32)
        >>> out = va.anchored_attention_varlen(q, k, v, offsets, offsets, 5, 5, causal=True)
        >>> out.shape
        torch.Size([7, 4, 16])
        >>> second = (x[2:].transpose(0, 1)[None] for x in (q, k, v))
        >>> alone = va.anchored_attention(*second, causal=True)
        >>> torch.allclose(out[2:], alone[0].transpose(0, 1), atol=1e-5)
        True
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
        log_gamma_k=log_gamma_k,
    )
    validation.check_qkv(q, k, v, "T, H, D")
    of_keys, log_gate = key_gate(gamma_k, log_gamma_k)
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, gate_form)
    offsets = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    validation.check_offsets(*offsets)
    heads = k.shape[1], q.shape[1]
    validation.check_packed_gate("log_gamma_k" if log_gate else "gamma_k", of_keys, k.shape[0], heads)
    validation.check_packed_gate("gamma_v", gamma_v, k.shape[0], heads)
    validation.check_packed_gate("gamma_q", gamma_q, q.shape[0], heads[1:])
    of_keys = fitted_gate(of_keys, q.dtype, log_gate)
    gamma_v, gamma_q = (fitted_gate(gate, q.dtype) for gate in (gamma_v, gamma_q))
    if validation.values_are_free(q):
        tokens, longest = (q.shape[0], k.shape[0]), (max_seqlen_q, max_seqlen_k)
        validation.check_offset_values(cu_seqlens_q, cu_seqlens_k, tokens, longest)
        validation.check_values(of_keys, gamma_v, gamma_q, gate_form, log_gate=log_gate)

    post_exp = gate_form == "post-exp"
    refused = validation.autograd_only(q, k, v, of_keys, gamma_v)
    chosen = choose_backend(backend, q, "packed sequences", refused, cu_seqlens_q.numel() - 1)
    if chosen == "triton":
        out, lse = varlen_op(q, k, v, *offsets, of_keys, gamma_v, scale, causal, window, softcap, post_exp, log_gate)
    else:
        attend = torch_backend(chosen, scale, causal, window, softcap, post_exp, True, log_gate)
        out, lse = varlen_by_sequence(attend, q, k, v, *offsets, of_keys, gamma_v)
    if not return_lse:
        return out
    if gamma_q is not None:
        lse = lse + (gamma_q if gamma_q.dim() == 2 else gamma_q[:, None]).float().log()
    return out, lse
