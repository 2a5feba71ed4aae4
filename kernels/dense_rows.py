"""A few rows of attention in fp64 beside the eager form of their own precision: what the self-check compares with.

Keys are converted a chunk at a time, so that the memory is that of (rows, keys) numbers and never that of all of K.
"""

from typing import NamedTuple

import torch

from .tolerance import allowance

DENSE_KEYS = 4096
# roundings to fp32 of a logit or of a sum, truncation in the tensor cores included
ROUNDING = 16 * torch.finfo(torch.float32).eps


class Rows(NamedTuple):
    """Queries of one sequence, q (R, D), and keys and values of one KV head, k and v (N, D).

    The gates, log gamma_k and gamma_v, are (N,) or None. `present` (N,) says which keys exist for the sequence: what
    others hold, NaN included, reaches nothing. `visible` (R, N) says which of them each query may see.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_gamma_k: torch.Tensor | None
    gamma_v: torch.Tensor | None
    present: torch.Tensor
    visible: torch.Tensor


class Expected(NamedTuple):
    """A result in fp64, what the eager form of its precision gives, and what rounding to fp32 within moves it by."""

    exact: torch.Tensor
    eager: torch.Tensor
    inside: torch.Tensor


def sum_roundings(terms: int) -> float:
    """Roundings of a sum of so many terms, tile by tile, as a random walk takes them."""
    return 1 + terms**0.5 / 16


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as fp32 and then `dtype` hold it, in fp64."""
    return x.float().to(dtype).double()


def dense_rows(rows: Rows, scale: float, softcap: float | None) -> tuple[Expected, Expected]:
    """out (R, D) and lse (R,) of a few rows: softmax(cap(scale q k^T) + log gamma_k) (gamma_v v)."""
    q, dtype = rows.q.double(), rows.q.dtype
    hidden = ~rows.present
    chunks = [slice(start, start + DENSE_KEYS) for start in range(0, rows.k.shape[0], DENSE_KEYS)]

    def gate(given: torch.Tensor | None, neutral: float) -> torch.Tensor:
        given = torch.full_like(hidden, neutral, dtype=q.dtype) if given is None else given.double()
        return given.masked_fill(hidden, neutral)

    def keys(x: torch.Tensor, chunk: slice) -> torch.Tensor:
        return x[chunk].double().masked_fill(hidden[chunk, None], 0)

    parts = [keys(rows.k, chunk) for chunk in chunks]
    scores = torch.cat([q @ k.T for k in parts], 1)
    # fp32 overflows where fp64 does not, and then no kernel can be right
    low = scores.float().double() * scale
    scores = scores * scale
    norms, log_gate = torch.cat([k.norm(dim=1) for k in parts]), gate(rows.log_gamma_k, 0.0)
    sizes = log_gate.masked_fill(log_gate == float("-inf"), 0).abs() + scale * q.norm(dim=1)[:, None] * norms
    size = sizes.masked_fill(~rows.visible, 0).amax(1)
    found = []
    for logits in (scores, low):
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        logits = (logits + log_gate).masked_fill(~rows.visible, float("-inf"))
        lse = logits.logsumexp(1)
        found.append(((logits - lse.masked_fill(lse == float("-inf"), 0)[:, None]).exp(), lse))
    (weights, lse), (low_weights, low_lse) = found
    low_weights = rounded(low_weights, dtype)
    gain = gate(rows.gamma_v, 1.0)
    out, eager, values, squares = (torch.zeros_like(q) for _ in range(4))
    for chunk in chunks:
        v = keys(rows.v, chunk) * gain[chunk, None]
        low_v = rounded(v, dtype)
        if dtype == torch.float16:  # whose kernels scale what it cannot hold
            low_v = torch.where(low_v.isfinite(), low_v, v)
        out += weights[:, chunk] @ v
        eager += low_weights[:, chunk] @ low_v
        values += weights[:, chunk] @ v.abs()
        squares += weights[:, chunk].square() @ v.square()
    roundings = ROUNDING * (sum_roundings(rows.k.shape[0]) + size)
    # weights and values are rounded, by which an eager form may be lucky to lose nothing
    inside = roundings[:, None] * values + torch.finfo(dtype).eps / 2 * squares.sqrt()
    return (
        Expected(out, rounded(eager, dtype), inside),
        Expected(lse, rounded(low_lse, torch.float32), roundings + ROUNDING * lse.abs()),
    )


def worst_error(found: torch.Tensor, expected: Expected, counted: torch.Tensor) -> torch.Tensor:
    """How many times the allowed error `found` is off, 0-dim; -1 where nothing but zeros could be compared.

    Of the largest element and of the root of the mean square, the worse. Counted are the elements of `counted`
    (broadcastable) that are finite in fp64 and in the eager form, and -inf, which must be -inf. NaN is infinitely off.
    """
    exact, eager, inside = expected
    limits = torch.finfo(found.dtype)
    dead = exact == float("-inf")
    judged = exact.isfinite() & eager.isfinite() & inside.isfinite() & (exact.abs() < 0.99 * limits.max)
    counted = counted & (dead | judged)
    error = (found.double() - exact).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    error = torch.where(dead, torch.where(found == exact, 0.0, float("inf")), error)

    def size(x: torch.Tensor) -> torch.Tensor:
        x = torch.where(counted & ~dead, x.abs(), 0.0)
        return torch.stack([x.amax(), x.square().mean().sqrt()])

    allowed = allowance(size(eager - exact), size(exact), found.dtype, size(inside))
    off = torch.where(counted, error, 0.0)
    off = torch.stack([off.amax(), off.square().mean().sqrt()])
    worst = torch.where(off > 0, off / allowed, 0.0).amax()
    return torch.where((counted & ~dead & (exact != 0)).any() | (worst > 1), worst, -1.0)
