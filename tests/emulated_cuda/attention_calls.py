"""One call of each form of the attention's operators, the same numbers on every device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import videoanchor_triton as va

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Of the tensors: `queries` and `keys` of a prefill; caches and packed sequences hold as many keys."""

    queries: int = 20
    keys: int = 24
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    page: int = 16


class Inputs:
    """Random tensors on a device, the same ones for the same sizes whatever the device."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device, generator = sizes, device, torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, sizes.dtype)

        def gate(*shape: int) -> torch.Tensor:
            return (torch.rand(*shape, generator=generator) + 0.5).to(device)

        batch, kv_heads, head_dim = sizes.batch, sizes.kv_heads, sizes.head_dim
        self.q = normal(batch, sizes.heads, sizes.queries, head_dim)
        self.k, self.v = (normal(batch, kv_heads, sizes.keys, head_dim) for _ in range(2))
        self.gates = {"gamma_k": gate(batch, sizes.keys), "gamma_v": gate(batch, sizes.keys)}
        self.mask = (torch.rand(batch, sizes.keys, generator=generator) < 0.8).to(device)
        self.lengths = torch.tensor([sizes.keys, sizes.keys // 2], dtype=torch.int32).to(device)
        used = -(-sizes.keys // sizes.page)
        self.table = torch.arange(batch * used, dtype=torch.int32).flip(0).view(batch, used).to(device)
        self.k_pages, self.v_pages = (normal(batch * used, kv_heads, sizes.page, head_dim) for _ in range(2))
        self.packed_q = normal(sizes.queries, sizes.heads, head_dim)
        self.packed_k, self.packed_v = (normal(sizes.queries, kv_heads, head_dim) for _ in range(2))
        self.packed_gates = {"gamma_k": gate(sizes.queries), "gamma_v": gate(sizes.queries, kv_heads)}
        self.offsets = torch.tensor([0, 7, sizes.queries], dtype=torch.int32).to(device)
        # a chunk and a single query; the rows after them are padding
        self.mixed = torch.tensor([0, 7, 8], dtype=torch.int32).to(device)
        n_pages = batch * used
        pair = gate(n_pages, 1, sizes.page, 2)
        self.slot_gates = {"written": va.GatePages(pair[..., 0], "written"), "apart": va.GatePages(pair, "apart")}
        self.scales = {f"{name}_scale": gate(n_pages, kv_heads, sizes.page) / 16 for name in "kv"}
        self.codes = [(16 * x).round().to(torch.int8) for x in (self.k_pages, self.v_pages)]
        self.sinks = gate(sizes.heads)
        slots = torch.randperm(n_pages * sizes.page, generator=generator)[: sizes.queries]
        self.slots = slots.index_fill(0, torch.tensor([3]), -1).to(device)

    def attend(self, queries: int | None = None, **options: Any) -> Outputs:
        return va.anchored_attention(self.q[:, :, :queries], self.k, self.v, return_lse=True, **options)

    def attend_strided(self, **options: Any) -> Outputs:
        """q, k and v laid out as (B, N, H, D)."""
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.q, self.k, self.v))
        return va.anchored_attention(q, k, v, return_lse=True, **self.gates, **options)

    def cache(self, **options: Any) -> Outputs:
        q = self.q[:, :, :1]
        return va.anchored_attention_decode(q, self.k, self.v, self.lengths, return_lse=True, **self.gates, **options)

    def pages(self, **options: Any) -> Outputs:
        arguments = self.q[:, :, :2], self.k_pages, self.v_pages, self.lengths, self.table
        return va.anchored_attention_decode(*arguments, return_lse=True, causal=True, **self.gates, **options)

    def packed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Outputs:
        longest = self.sizes.queries
        offsets = self.offsets, self.offsets, longest, longest
        return va.anchored_attention_varlen(q, k, v, *offsets, causal=True, return_lse=True, **options)

    def varlen(self, **options: Any) -> Outputs:
        return self.packed(self.packed_q, self.packed_k, self.packed_v, **self.packed_gates, **options)

    def paged(self, form: str, **options: Any) -> Outputs:
        return self._paged(self.k_pages, self.v_pages, gate_pages=self.slot_gates[form], **options)

    def quantised(self, **options: Any) -> Outputs:
        return self._paged(*self.codes, **self.scales, sinks=self.sinks, **options)

    def _paged(self, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Outputs:
        longest, tables = 7, {"seqlens_k": self.lengths, "block_table": self.table, "cu_seqlens_q": self.mixed}
        return va.anchored_attention_paged(
            self.packed_q, k, v, **tables, max_seqlen_q=longest, return_lse=True, **options
        )

    def write(self, form: str, **options: Any) -> Outputs:
        """What the pages hold then."""
        k, v, values = (x.clone() for x in (self.k_pages, self.v_pages, self.slot_gates[form].values))
        gates = {name: gate.T[-1] if gate.dim() == 2 else gate for name, gate in self.packed_gates.items()}
        va.write_pages(self.packed_k, self.packed_v, k, v, self.slots, va.GatePages(values, form), **gates, **options)
        return k, v, values

    def backward(self, **options: Any) -> Outputs:
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, *self.gates.values())]
        gates = dict(zip(self.gates, leaves[3:], strict=True))
        out, lse = va.anchored_attention(*leaves[:3], causal=True, return_lse=True, **gates, **options)
        return torch.autograd.grad(out.float().sum() + lse.sum(), leaves)

    def packed_backward(self, **options: Any) -> Outputs:
        tensors = self.packed_q, self.packed_k, self.packed_v, *self.packed_gates.values()
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = self.packed(*leaves[:3], gamma_k=leaves[3], gamma_v=leaves[4], **options)
        return torch.autograd.grad(out.float().sum() + lse.sum(), leaves)

    def merge(self) -> Outputs:
        return va.merge_attention(self.q, self.q[..., 0].float(), 2 * self.q, self.q[..., 1].float())


# by "operator: form"; each takes the inputs and the keyword backend, which means nothing to the merge
CALLS: dict[str, Callable[..., Outputs]] = {
    "prefill: log-bias": lambda x, **o: x.attend(causal=True, **x.gates, **o),
    "prefill: post-exp": lambda x, **o: x.attend(causal=True, gate_form="post-exp", **x.gates, **o),
    "prefill: ungated": lambda x, **o: x.attend(**o),
    "prefill: padding, window, softcap": lambda x, **o: x.attend(
        causal=True, window=9, softcap=5.0, key_padding_mask=x.mask, **x.gates, **o
    ),
    "prefill: strided": Inputs.attend_strided,
    "decode: one query": lambda x, **o: x.attend(1, **x.gates, **o),
    "decode: 16 queries": lambda x, **o: x.attend(16, causal=True, key_padding_mask=x.mask, **x.gates, **o),
    "cache: one query": Inputs.cache,
    "pages: two queries": Inputs.pages,
    "paged: written gates": lambda x, **o: x.paged("written", **o),
    "paged: gates apart, window, softcap": lambda x, **o: x.paged("apart", window=9, softcap=5.0, **o),
    "paged: int8, sinks": Inputs.quantised,
    "write: written gates": lambda x, **o: x.write("written", **o),
    "write: gates apart": lambda x, **o: x.write("apart", **o),
    "varlen: packed": Inputs.varlen,
    "backward: gates": Inputs.backward,
    "packed backward: gates": Inputs.packed_backward,
    "merge: two parts": lambda x, **_: x.merge(),
}


def operator(call: str) -> str:
    return call.partition(":")[0]
