"""Attention problems by name, and the tolerance that the error of a same-precision eager form sets."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from videoanchor_triton.kernels.gates import expand_gate, pad_gate
from videoanchor_triton.kernels.reference import reference_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor]
LOG_BIAS_ONLY = ("zero", "all-zero", "some-zero", "huge")


@dataclass(frozen=True)
class Problem:
    """A named attention problem; `make` draws its tensors from a seed of its name."""

    name: str
    batch: int = 2
    query_heads: int = 4
    kv_heads: int = 2
    queries: int = 37
    keys: int = 70
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    gate: str = "per-batch"
    gate_keys: int | None = None
    padding: str | None = None
    layout: str = "bhnd"
    logits: float = 1.0
    softcap: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def bounded(self) -> bool:
        """Whether the gate is within what the post-exp form is promised."""
        return self.gate not in LOG_BIAS_ONLY

    def make(self, device: torch.device) -> tuple[Tensors, dict[str, Any]]:
        """(q, k, v) and the keyword arguments of `anchored_attention`."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def draw(heads: int, length: int) -> torch.Tensor:
            if self.layout == "bnhd":
                x = torch.randn(self.batch, length, heads, self.head_dim, generator=generator).transpose(1, 2)
            elif self.layout == "fused":
                x = torch.randn(self.batch, length, heads, 3 * self.head_dim, generator=generator).transpose(1, 2)
                x = x[..., self.head_dim : 2 * self.head_dim]
            elif self.layout == "column":
                x = torch.randn(self.batch, heads, self.head_dim, length, generator=generator).transpose(2, 3)
            else:
                x = torch.randn(self.batch, heads, length, self.head_dim, generator=generator)
            return x.to(device, self.dtype)

        q, k, v = (draw(h, n) for h, n in [(self.query_heads, self.queries)] + [(self.kv_heads, self.keys)] * 2)
        q = q * self.logits
        options: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        n = self.keys if self.gate_keys is None else self.gate_keys
        if self.gate != "none":
            leading = {"shared": (), "per-head": (self.batch, self.kv_heads)}.get(self.gate, (self.batch,))
            gamma_k = 1 + 9.5 * torch.rand(*leading, n, generator=generator)
            gamma_v = 1 + 2.5 * torch.rand(*leading, n, generator=generator)
            if self.gate == "wide":
                gamma_k = 2.0 ** (40 * torch.rand(*leading, n, generator=generator) - 20)
            elif self.gate == "huge":
                gamma_k = 10.0 ** (6 * torch.rand(*leading, n, generator=generator))
            elif self.gate == "zero":
                gamma_k[..., ::2] = 0
                k[:, :, :n:2] *= 100
            elif self.gate == "some-zero":
                gamma_k[0, : n // 2] = 0
            elif self.gate == "all-zero":
                gamma_k.zero_()
            elif self.gate == "beyond-fp16":  # gV V beyond 65504, of small weights that make it finite again
                gamma_k[..., 2::3] *= 1e-3
                gamma_v[..., 2::3] *= 100
                v[:, :, 2:n:3] *= 500
            elif self.gate == "huge-value":
                gamma_v = 1e5 * gamma_v
                v = v * 1e-3
            elif self.gate == "strided":
                gamma_k, gamma_v = (torch.stack([x.T, -x.T], -1)[..., 0].T for x in (gamma_k, gamma_v))
            options |= {"gamma_k": gamma_k.to(device), "gamma_v": gamma_v.to(device)}
            options["gamma_q"] = (1 + 4 * torch.rand(self.batch, self.queries, generator=generator)).to(device)
        if self.padding is not None:
            mask = torch.ones(self.batch, self.keys, dtype=torch.bool)
            if self.padding.startswith("left"):
                for b in range(self.batch):
                    mask[b, : (3 + 25 * b) % self.keys] = False
            elif self.padding == "scattered":
                mask = torch.rand(self.batch, self.keys, generator=generator) > 0.4
            elif self.padding == "all":
                mask[0] = False
            if self.padding.endswith("nan"):
                hidden = ~mask.to(device)
                k, v = (x.masked_fill(hidden[:, None, :, None], float("nan")) for x in (k, v))
                for name in ("gamma_k", "gamma_v"):
                    options[name] = options[name].masked_fill(hidden[:, :n], float("nan"))
            options["key_padding_mask"] = mask.to(device)
        return (q, k, v), options


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

    def gate_of_heads(gate: torch.Tensor) -> torch.Tensor:
        gate = expand_gate(pad_gate(gate, keys), batch, kv_heads)
        if key_padding_mask is not None:
            gate = gate.masked_fill(~key_padding_mask[:, None], 1)
        return gate.repeat_interleave(group, 1)

    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = Scores.apply(q, k) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if gamma_k is not None:
        scores = scores + gate_of_heads(gamma_k).to(precise).log()[:, :, None]
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
    is the lse, whose own size rounds as often; an output moves by so much of sum weights * |gamma_v v|.
    """
    _, lse = reference_attention(q, k, v, **options, gamma_q=gamma_q)
    values, _ = reference_attention(q, k, v.abs(), **options)
    gate = options.get("gamma_k")
    if gate is not None:
        options["gamma_k"] = torch.where(gate == 0, 0, torch.maximum(gate, 1 / gate))
    options.pop("softcap", None)
    _, logits = reference_attention(q.abs(), k.abs(), v, **options)
    logits, lse = (x.nan_to_num(neginf=0).abs() for x in (logits, lse))
    roundings = 2 * torch.finfo(torch.float32).eps
    return roundings * values * (1 + logits[..., None]), roundings * (logits + lse)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, where both are finite."""
    difference = (found.double() - exact.double())[exact.isfinite()]
    return difference.abs().max().item() if difference.numel() else 0.0


def largest(x: torch.Tensor) -> float:
    """Largest finite absolute value."""
    return x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0


def compare_results(found: Result, exact: Result, eager: Result, roundings: Result) -> list[tuple[str, float, float]]:
    """(name, error, allowed error) of out and lse against fp64; NaN or wrongly infinite rows are an infinite error.

    Allowed is twice the eager form's error, a rounding of the largest element, and what `fp32_roundings` names.
    """
    results = []
    for name, mine, theirs, true, inside in zip(("out", "lse"), found, eager, exact, roundings, strict=True):
        allowed = 2 * error(theirs, true) + torch.finfo(mine.dtype).eps * largest(true) + largest(inside)
        same_rows = not mine.isnan().any() and torch.equal(mine == float("-inf"), true == float("-inf"))
        results.append((name, error(mine, true) if same_rows else float("inf"), allowed))
    return results


def compare(found: Result, tensors: Tensors, options: dict[str, Any]) -> list[tuple[str, float, float]]:
    """`compare_results` for a call of `anchored_attention` with these tensors and options."""
    forms = reference_attention, eager_attention, fp32_roundings
    return compare_results(found, *(form(*tensors, **options) for form in forms))


def assert_results_as_exact_as_eager(found: Result, exact: Result, eager: Result, roundings: Result) -> None:
    """Raise unless `found` has the eager form's dtypes and shapes, and `compare_results` allows its errors."""
    assert found[0].dtype == eager[0].dtype
    assert found[0].shape == eager[0].shape
    assert found[1].dtype == torch.float32
    assert found[1].shape == eager[1].shape
    for name, wrong, allowed in compare_results(found, exact, eager, roundings):
        assert wrong <= allowed, f"{name}: error {wrong:.3g}, allowed {allowed:.3g}"


def assert_as_exact_as_eager(found: Result, tensors: Tensors, options: dict[str, Any]) -> None:
    """`assert_results_as_exact_as_eager` for a call of `anchored_attention` with these tensors and options."""
    forms = reference_attention, eager_attention, fp32_roundings
    assert_results_as_exact_as_eager(found, *(form(*tensors, **options) for form in forms))
