"""Gated attention over a KV cache: validation, then the implementation that `dispatch` chooses."""

from typing import Literal, Unpack, overload

import torch

from . import validation
from .api import CacheOptions
from .dispatch import Outputs, choose_backend, torch_backend
from .gates import by_position, expand_gate, fitted_gate, key_gate, log_of
from .sequences import decode_by_sequence

try:
    from .ops_cache import decode_op
except ModuleNotFoundError as error:  # as in api.py
    if error.name != "triton":
        raise


@overload
def anchored_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[CacheOptions],
) -> torch.Tensor: ...


@overload
def anchored_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[CacheOptions],
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
    log_gamma_k: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | Outputs:
    """`anchored_attention` of the last queries of each sequence over a cache, contiguous or paged.

    On "triton" nothing is read on the host, but for the verdict on a first call (VIDEOANCHOR_SELF_CHECK), so that a
    CUDA graph can hold the call while lengths, pages and gates change. Not differentiable there. Arguments that are
    not named here mean what they mean in `anchored_attention`.

    Args:
        q: (B, Hq, Nq, D), floating, Nq at least 1: more for speculative decoding, a question on a long context or a
            chunk of a prompt.
        k_cache, v_cache: (B, Hkv, N, D); or with a block_table pages (n_pages, Hkv, page_size, D) of any size. Any
            strides with contiguous rows: a cache (n_pages, page_size, Hkv, D) goes in as `cache.transpose(1, 2)`. They
            hold the keys and values of q's own tokens already, ungated.
        cache_seqlens: (B,) int32 on q's device: the keys of each sequence, those of q's own tokens included. What lies
            beyond in the cache, NaN included, does not reach the output.
        block_table: (B, max_pages) int32 on q's device: the pages of each sequence in order. Entries past a sequence's
            length may be anything.
        gamma_k, log_gamma_k, gamma_v: (N',), (B, N'), (B, Hkv, N'), or (B, Hq, N') for each query head, by position in
            the sequence, N' up to the cache's capacity; keys from N' on are neutral. The kernel takes log_gamma_k and
            gamma_v in fp32 by their strides, slices of larger buffers included; of gamma_k the logarithm is taken in
            each call, so that who decodes many steps takes it once and gives log_gamma_k.
        causal: query i of sequence b stands at key cache_seqlens[b] - Nq + i and sees the keys up to its own.
        backend: as in `anchored_attention`, without "hopper". "sdpa" and "reference" take one sequence at a time and
            read lengths and pages on the host.

    Lengths and pages are checked on the CPU; elsewhere a length that the cache cannot hold gives NaN, and a page that
    does not exist is read out of bounds.

    Returns:
        out (B, Hq, Nq, D) in q's dtype, or (out, lse) with lse (B, Hq, Nq) in fp32.

    Raises:
        TypeError, ValueError: as in `anchored_attention`.

    See Also:
        anchored_attention: any number of queries, over keys that are no cache.

    Examples:
        One new token of each of two sequences, over a cache of three pages of 16 keys and two KV heads. The first
        sequence holds 20 keys, on pages 0 and 2; the second 7, on page 1:

        >>> import torch
        >>> import videoanchor_triton as va
        >>> q = torch.randn(2, 4, 1, 64)
        >>> k_cache, v_cache = torch.randn(2, 3, 2, 16, 64)
        >>> lengths = torch.tensor([20, 7], dtype=torch.int32)
        >>> pages = torch.tensor([[0, 2], [1, 0]], dtype=torch.int32)
        >>> gamma_k = 1 + 9.5 * torch.rand(2, 20)
        >>> va.anchored_attention_decode(q, k_cache, v_cache, lengths, pages, gamma_k=gamma_k).shape
        torch.Size([2, 4, 1, 64])
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
        log_gamma_k=log_gamma_k,
    )
    validation.check_qkv(q, k_cache, v_cache, "B, H, N, D", ("k_cache", "v_cache"))
    of_keys, log_gate = key_gate(gamma_k, log_gamma_k)
    causal = bool(causal)
    scale = validation.check_options(q.shape[-1], scale, causal, window, softcap, "log-bias")
    capacity = validation.check_cache(q, k_cache, cache_seqlens, block_table)
    batch, query_heads, queries, _ = q.shape
    pages, kv_heads, page_size, _ = k_cache.shape
    sizes = (batch, query_heads, queries), (batch, kv_heads, capacity)
    validation.check_gates(of_keys, gamma_v, gamma_q, *sizes, log_gate)
    of_keys = fitted_gate(of_keys, q.dtype, log_gate)
    gamma_v, gamma_q = (fitted_gate(gate, q.dtype) for gate in (gamma_v, gamma_q))
    if validation.values_are_free(q):
        validation.check_cache_values(cache_seqlens, capacity, block_table, pages, page_size)
        validation.check_values(of_keys, gamma_v, gamma_q, "log-bias", log_gate=log_gate)

    tensors = (q, k_cache, v_cache, of_keys, gamma_v)
    refused = validation.autograd_only(*tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        refused = "an input requires grad and decode has no backward"
    chosen = choose_backend(backend, q, "decode", refused)
    cache = q, k_cache, v_cache, cache_seqlens, block_table
    if chosen == "triton":
        of_keys = None if of_keys is None else by_position(log_of(of_keys, log_gate), batch, kv_heads)
        gamma_v = None if gamma_v is None else by_position(gamma_v.float(), batch, kv_heads)
        out, lse = decode_op(*cache, of_keys, gamma_v, scale, causal, window, softcap)
    else:
        attend = torch_backend(chosen, scale, causal, window, softcap, False, True, log_gate)
        out, lse = decode_by_sequence(attend, *cache, of_keys, gamma_v)
    if not return_lse:
        return out
    if gamma_q is not None:
        lse = lse + expand_gate(gamma_q.float(), batch, query_heads).log()
    return out, lse
