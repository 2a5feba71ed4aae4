"""Partial attention over disjoint keys, joined exactly by the log-sum-exp of each part."""

import torch


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each of them.

    lse = log(exp(lse_a) + exp(lse_b)), out = sigmoid(lse_a - lse_b) out_a + sigmoid(lse_b - lse_a) out_b: exact and, up
    to rounding, commutative and associative, so that any number of parts may be folded in any order. For contexts in
    chunks and for ring attention, where K and V arrive piece by piece. With queries and keys cut alike, the queries of
    chunk i see their own keys with causal=True, those of earlier chunks with causal=False, and later ones not at all:

        out, lse = anchored_attention(q[i], k[i], v[i], gamma_k=gamma_k[i], causal=True, return_lse=True)
        for j in range(i):
            part = anchored_attention(q[i], k[j], v[j], gamma_k=gamma_k[j], causal=False, return_lse=True)
            out, lse = merge_attention(out, lse, *part)

    gamma_q multiplies all weights of a query alike. Give it to every part, and the merged lse holds log gamma_q once;
    or to none, and add log gamma_q to the merged lse. Given to some parts only, it would weigh them against the others.

    Differentiable in all four by autograd.

    Args:
        out_a, out_b: (..., D), floating, of one shape, dtype and device.
        lse_a, lse_b: out.shape[:-1], fp32, natural logarithm. -inf marks a row whose part has no visible key; what out
            holds there is not looked at.

    Returns:
        out (..., D) in out_a's dtype and lse (...) in fp32; a row without a visible key in either part is 0 and -inf.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device.

    See Also:
        anchored_attention: gives the parts, with return_lse=True.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> q, k, v = torch.randn(3, 1, 4, 8, 16)
        >>> halves = zip(k.chunk(2, dim=2), v.chunk(2, dim=2))
        >>> first, second = (va.anchored_attention(q, *half, return_lse=True) for half in halves)
        >>> out, lse = va.merge_attention(*first, *second)
        >>> torch.allclose(out, va.anchored_attention(q, k, v), atol=1e-5)
        True
    """
    _check(out_a, lse_a, out_b, lse_b)
    dead_a, dead_b = lse_a == float("-inf"), lse_b == float("-inf")
    dead = dead_a | dead_b
    # a row with a dead part takes no part in the formulae, whose gradients would be NaN there
    safe_a, safe_b = lse_a.masked_fill(dead, 0), lse_b.masked_fill(dead, 0)
    weight_a = torch.where(dead, (~dead_a).float(), torch.sigmoid(safe_a - safe_b))
    weight_b = torch.where(dead, (~dead_b).float(), torch.sigmoid(safe_b - safe_a))
    out_a_seen = out_a.masked_fill(dead_a[..., None], 0)
    out_b_seen = out_b.masked_fill(dead_b[..., None], 0)
    out = weight_a[..., None] * out_a_seen + weight_b[..., None] * out_b_seen
    lse = torch.where(dead, torch.maximum(lse_a, lse_b), torch.logaddexp(safe_a, safe_b))
    return out.to(out_a.dtype), lse


def _check(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; call with return_lse=True")
        if x.device != out_a.device:
            raise ValueError(f"{name} must be on out_a's device {out_a.device}, got {x.device}")
    if not out_a.is_floating_point():
        raise TypeError(f"out_a must be a floating tensor, got {out_a.dtype}")
    if out_a.dim() == 0:
        raise ValueError("out_a must have shape (..., D), got ()")
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b must have out_a's dtype {out_a.dtype}, got {out_b.dtype}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b must have out_a's shape {tuple(out_a.shape)}, got {tuple(out_b.shape)}")
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name} must be fp32, as return_lse=True gives it, got {x.dtype}")
        if x.shape != out_a.shape[:-1]:
            raise ValueError(f"{name} must have shape {tuple(out_a.shape[:-1])}, out's without D, got {tuple(x.shape)}")
