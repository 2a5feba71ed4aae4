"""Checks of packed sequences of several lengths, 0 among them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

import videoanchor_triton as va
from benchmarks.attention.helpers.findings import Check, Finding, generator, gradient_finding, gradients, outcome, worst
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import Tensors, eager_attention


@dataclass(frozen=True)
class Packed:
    """Lengths of packed sequences, and options of the op."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    options: dict[str, Any]
    gated: bool = True
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 128

    def make(self, name: str, device: torch.device) -> tuple[Tensors, dict[str, torch.Tensor]]:
        """q (Tq, Hq, D), k and v (Tk, Hkv, D) in bf16, and the gates: gamma_k (Tk, Hkv), gamma_v (Tk,), gamma_q."""
        random = generator(name)

        def draw(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, self.head_dim, generator=random).to(device, torch.bfloat16)

        tensors = tuple(draw(sum(n), h) for n, h in ((self.queries, self.heads[0]), *[(self.keys, self.heads[1])] * 2))
        gates = {
            "gamma_k": 1 + 9.5 * torch.rand(sum(self.keys), self.heads[1], generator=random),
            "gamma_v": 1 + 2.5 * torch.rand(sum(self.keys), generator=random),
            "gamma_q": 1 + 4 * torch.rand(sum(self.queries), generator=random),
        }
        return tensors, {key: gate.to(device) for key, gate in gates.items()} if self.gated else {}  # pyright: ignore[reportReturnType]

    def call(self, tensors: Tensors, gates: dict[str, torch.Tensor], gate_form: str) -> tuple[torch.Tensor, Any]:
        """out (Tq, Hq, D) and lse (Tq, Hq) of the op."""
        cu_q, cu_k = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=tensors[0].device)
            for lengths in (self.queries, self.keys)
        )
        options: dict[str, Any] = gates | self.options
        return va.anchored_attention_varlen(
            *tensors, cu_q, cu_k, max(self.queries), max(self.keys), **options, backend="triton", gate_form=gate_form,
            return_lse=True,
        )  # fmt: skip

    def entries(self, tensors: Tensors, gates: dict[str, torch.Tensor]) -> Iterator[tuple[slice, Tensors, dict]]:
        """For each sequence its rows of q, and its tensors and options in the layout of the dense op."""
        first_q = first_k = 0
        for n_q, n_k in zip(self.queries, self.keys, strict=True):
            rows, keys = slice(first_q, first_q + n_q), slice(first_k, first_k + n_k)
            q, k, v = (x[part].transpose(0, 1)[None] for x, part in zip(tensors, (rows, keys, keys), strict=True))
            own = {name: gate[rows if name == "gamma_q" else keys] for name, gate in gates.items()}
            own = {name: gate.T[None] if gate.dim() == 2 else gate for name, gate in own.items()}
            yield rows, (q, k, v), own | self.options
            first_q, first_k = rows.stop, keys.stop


def packed_cases(large: bool) -> dict[str, Packed]:
    queries, keys = ((300, 0, 1, 65, 0, 129), (300, 70, 17, 40, 0, 500)) if large else ((9, 0, 1, 5), (9, 7, 6, 3))
    causal = Packed(queries, keys, {"causal": True}, head_dim=128 if large else 16)
    window = {"causal": True, "window": 5, "softcap": 5.0}
    return {
        "causal": causal,
        "not causal": replace(causal, options={"causal": False}),
        "window and softcap": replace(causal, options=window),
        "ungated": replace(causal, gated=False),
        "a sequence without keys": replace(causal, keys=(*keys[:-1], 0)),
        "more keys than queries": replace(causal, keys=tuple(n + 7 for n in queries)),
    }


def packed_check(name: str, case: Packed, gate_form: str) -> Check:
    def check(device: torch.device) -> Finding:
        tensors, gates = case.make(name, device)
        out, lse = case.call(tensors, gates, gate_form)
        return worst(
            [
                outcome((out[rows].transpose(0, 1)[None], lse[rows].T[None]), own, options)
                for rows, own, options in case.entries(tensors, gates)
            ]
        )

    return check


def gradient_check(name: str, case: Packed, gate_form: str) -> Check:
    def check(device: torch.device) -> Finding:
        tensors, gates = case.make(name, device)
        random = generator(name + " upstream")
        shape = tensors[0].shape
        upstream = tuple(torch.randn(s, generator=random).to(device, torch.bfloat16) for s in (shape, shape[:2]))

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
            return case.call((q, k, v), given, gate_form)

        def by_entry(attend: Callable[..., Any]) -> Callable[..., Any]:
            def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
                entries = case.entries((q, k, v), given)
                parts = [attend(*own, **options) for rows, own, options in entries if rows.stop > rows.start]
                out = torch.cat([part[0][0].transpose(0, 1) for part in parts])
                return out, torch.cat([part[1][0].T for part in parts])

            return run

        found, eager, exact = (
            gradients(attend, tensors, gates, upstream)
            for attend in (ours, by_entry(eager_attention), by_entry(reference_attention))
        )
        return gradient_finding(found, eager, exact)

    return check
