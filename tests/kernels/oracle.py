"""Attention problems by name, and assertions by the rule of kernels/tolerance.py."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import (
    Result,
    Tensors,
    compare_results,
    eager_attention,
    fp32_roundings,
)

LOG_BIAS_ONLY = ("zero", "all-zero", "some-zero", "huge", "log", "log-per-query-head")


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
            heads = {"per-head": self.kv_heads, "log-bounded": self.kv_heads}
            heads |= {"per-query-head": self.query_heads, "log-per-query-head": self.query_heads}
            leading = (self.batch, heads[self.gate]) if self.gate in heads else (self.batch,)
            leading = () if self.gate == "shared" else leading
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
            if self.gate.startswith("log"):
                log_gamma_k = options.pop("gamma_k").log()
                if self.gate != "log-bounded":  # up to exp(100), and hidden keys
                    log_gamma_k = 200 * torch.rand(log_gamma_k.shape, generator=generator).to(device) - 100
                    log_gamma_k[..., 5::7] = float("-inf")
                options["log_gamma_k"] = log_gamma_k
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
                for name in options.keys() & {"gamma_k", "log_gamma_k", "gamma_v"}:
                    seen = hidden[:, None, :n] if options[name].dim() == 3 else hidden[:, :n]
                    options[name] = options[name].masked_fill(seen, float("nan"))
            options["key_padding_mask"] = mask.to(device)
        return (q, k, v), options


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
