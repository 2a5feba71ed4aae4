"""How far a result may be from the exact one: one rule for the suite, the sanity check and the benchmarks.

Two right kernels differ: they round their results, and add in another order. The rule allows twice the error that the
eager form of the same precision makes on the same inputs, one rounding of the largest element to the result's dtype,
and what fp32 rounds within (`fp32_roundings`): an eager form that was lucky, or added in a luckier order, does not make
a right result wrong. It is about 1% of a bf16 result's largest element, and less in every other dtype.
"""

from typing import Any, TypeVar

import torch

from .gates import expand_gate, grouped_gate, key_gate, log_of, pad_gate
from .reference import reference_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor]
Size = TypeVar("Size", float, torch.Tensor)


class Scores(torch.autograd.Function):
    """q k^T in fp32 (fp64 for fp64), whose gradient is rounded to q's dtype and multiplied in it."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k)
        precise = torch.promote_types(q.dtype, torch.float32)
        return q.to(precise) @ k.to(precise).transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, d_scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore
        q, k = ctx.saved_tensors
        d_scores = d_scores.to(q.dtype)
        return d_scores @ k, d_scores.transpose(-1, -2) @ q


def eager_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model computes in q's dtype: dense scores plus log gates, softmax in fp32, weights times gated values.

    Scores are fp32 (fp64 for fp64) from the product on, as in the fused kernels: rounded to 16 bits they would hide any
    backend that rounds them. Gradients go through the product in q's dtype. Gated values that q's dtype cannot hold are
    not rounded to it, since infinity measures nothing.
    """
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = query_heads // kv_heads
    position = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        visible = visible & (key > position - window)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None]
        k, v = (x.masked_fill(~key_padding_mask[:, None, :, None], 0) for x in (k, v))

    def gate_of_heads(gate: torch.Tensor, neutral: float = 1.0) -> torch.Tensor:
        gate = grouped_gate(pad_gate(gate, keys, neutral), batch, kv_heads).expand(-1, -1, group, -1).flatten(1, 2)
        return gate if key_padding_mask is None else gate.masked_fill(~key_padding_mask[:, None], neutral)

    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = Scores.apply(q, k) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    gate, log_gate = key_gate(gamma_k, log_gamma_k)
    if gate is not None:
        scores = scores + log_of(gate_of_heads(gate, float(not log_gate)), log_gate).to(precise)[:, :, None]
    if gamma_v is not None:
        gated = v * gate_of_heads(gamma_v)[..., None]
        v = gated.to(q.dtype) if gated.to(q.dtype).isfinite().all() else gated
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp().to(q.dtype)
    if gamma_q is not None:
        lse = lse + expand_gate(gamma_q, batch, query_heads).log()
    return (weights.to(v.dtype) @ v).to(q.dtype), lse.float()


def fp32_roundings(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, gamma_q: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding to fp32 within the computation moves out and lse by, in the shapes of both.

    A logit of terms t is off by a rounding of sum |t| + |log gamma_k| in the product, and by another one in base 2. So
    is the lse, whose own size rounds as often; an output moves by so much of sum weights * |gamma_v v|. A softcap's
    tanh is exact to a rounding of the cap where q has 16 bits.
    """
    _, lse = reference_attention(q, k, v, **options, gamma_q=gamma_q)
    values, _ = reference_attention(q, k, v.abs(), **options)
    gate, log_gate = key_gate(options.pop("gamma_k", None), options.get("log_gamma_k"))
    if gate is not None:
        gate = log_of(gate, log_gate)
        options["log_gamma_k"] = torch.where(gate == float("-inf"), gate, gate.abs())
    cap = options.pop("softcap", None) or 0.0
    _, logits = reference_attention(q.abs(), k.abs(), v, **options)
    logits, lse = (x.nan_to_num(neginf=0).abs() for x in (logits, lse))
    logits = logits + (cap if q.element_size() < 4 else 0.0)
    roundings = 2 * torch.finfo(torch.float32).eps
    return roundings * values * (1 + logits[..., None]), roundings * (logits + lse)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, where both are finite."""
    difference = (found.double() - exact.double())[exact.isfinite()]
    return difference.abs().max().item() if difference.numel() else 0.0


def largest(x: torch.Tensor) -> float:
    """Largest finite absolute value."""
    return x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0


def allowed_error(exact: torch.Tensor, eager_error: float, dtype: torch.dtype, inside: float = 0.0) -> float:
    """Largest allowed absolute error of a result in `dtype`.

    `exact` is the result in fp64, `eager_error` what the eager form of the same precision is off by, and `inside` what
    rounding to fp32 within the computation moves it by (the largest of `fp32_roundings`). A rounding of x is at most
    eps / 2 * |x|.
    """
    return allowance(eager_error, largest(exact), dtype, inside)


def allowance(eager_error: Size, largest: Size, dtype: torch.dtype, inside: Size) -> Size:
    """The rule of `allowed_error` for sizes that are there: numbers, or tensors that stay where they are."""
    return 2 * eager_error + torch.finfo(dtype).eps / 2 * largest + inside


def compare_results(found: Result, exact: Result, eager: Result, roundings: Result) -> list[tuple[str, float, float]]:
    """(name, error, allowed error) of out and lse against fp64; NaN or wrongly infinite rows are an infinite error.

    Allowed is `allowed_error`; `roundings` are those of `fp32_roundings`.
    """
    results = []
    for name, mine, theirs, true, inside in zip(("out", "lse"), found, eager, exact, roundings, strict=True):
        allowed = allowed_error(true, error(theirs, true), mine.dtype, largest(inside))
        same_rows = not mine.isnan().any() and torch.equal(mine == float("-inf"), true == float("-inf"))
        results.append((name, error(mine, true) if same_rows else float("inf"), allowed))
    return results


def compare(found: Result, tensors: Tensors, options: dict[str, Any]) -> list[tuple[str, float, float]]:
    """`compare_results` for a call of `anchored_attention` with these tensors and options."""
    forms = reference_attention, eager_attention, fp32_roundings
    return compare_results(found, *(form(*tensors, **options) for form in forms))
