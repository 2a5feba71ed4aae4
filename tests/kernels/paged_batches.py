"""Mixed batches over paged caches by name, and what fp64 and the eager form make of them, a sequence at a time."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from oracle import assert_results_as_exact_as_eager

from videoanchor_triton.kernels.gate_pages import GatePages, gate_pages
from videoanchor_triton.kernels.pages import write_slots
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import Result, eager_attention, fp32_roundings

NAN, INF = float("nan"), float("inf")
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
GARBAGE = (-1, 2**31 - 1, -(2**31))


@dataclass(frozen=True)
class Batch:
    """Named batch; `make` draws the arguments of `anchored_attention_paged` from a seed of the name.

    NaN lies wherever no sequence may look, garbage in the unused entries of the block table.
    """

    name: str
    queries: tuple[int, ...] = (1, 12, 5)
    keys: tuple[int, ...] = (45, 12, 40)
    page_size: int = 16
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None
    per_token: bool = False
    form: str | None = "written"
    gate_heads: int = 1
    extreme: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    spare: int = 0
    shared: int = 0
    layout: str = "halves"

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        tokens, size = sum(self.keys), self.page_size
        most = max(-(-max(self.keys, default=0) // size), 1) + 1
        pages = sum(-(-n // size) for n in self.keys) + 3
        k, v = (torch.randn(tokens, self.kv_heads, self.head_dim, generator=generator).to(self.dtype) for _ in "kv")
        table, slots = self._places(pages, most, generator)

        shape = pages, self.kv_heads, size, self.head_dim
        sizes = {"halves": (*shape[:3], 2 * shape[3]), "rows": (pages, size, self.kv_heads, 2 * self.head_dim)}
        whole = torch.full(sizes[self.layout], 77.0 if self.cache == INT8 else NAN).to(self.cache or self.dtype)
        k_pages, v_pages = (whole if self.layout == "halves" else whole.transpose(1, 2)).split(self.head_dim, -1)
        gates, gamma_k, gamma_v = None, None, None
        if self.form is not None:
            gates = gate_pages(pages, size, "cpu", self.form, self.gate_heads)
            gates.values.fill_(NAN)
            heads = [self.gate_heads] if self.gate_heads > 1 else []
            gamma_k = 1 + 9.5 * torch.rand(tokens, *heads, generator=generator)
            gamma_v = 1 + 2.5 * torch.rand(tokens, *heads, generator=generator)
            if self.extreme:
                odd = torch.tensor([0.0, 1e-30, 1e30, 1.0])[torch.randint(0, 4, gamma_k.shape, generator=generator)]
                gamma_k = torch.where(torch.rand(gamma_k.shape, generator=generator) < 0.3, odd, gamma_k)
        scales = [None, None]
        if self.cache is not None:
            top = 448.0 if self.cache == E4M3 else 127.0
            bound = 4 * (26 if self.form == "written" else 1)
            scales = [torch.full(shape[:3], NAN) if self.per_token else torch.tensor(x / top) for x in (4, bound)]
        write_slots(k, v, k_pages, v_pages, slots, gates, gamma_k, gamma_v, False, *scales)

        lengths = torch.tensor([0, *self.queries]).cumsum(0).int()
        q = torch.randn(sum(self.queries) + self.spare, self.query_heads, self.head_dim, generator=generator)
        given: dict[str, Any] = {
            "q": q.to(self.dtype),
            "k_pages": k_pages,
            "v_pages": v_pages,
            "cu_seqlens_q": lengths,
            "seqlens_k": torch.tensor(self.keys, dtype=torch.int32),
            "block_table": table.int(),
            "k_scale": scales[0],
            "v_scale": scales[1],
            "sinks": 2 * torch.randn(self.query_heads, generator=generator) if self.sinks else None,
        }
        given = {name: x.to(device) if x is not None else x for name, x in given.items()}
        # a copy would not be halves of one tensor
        if device.type != "cpu":
            whole = whole.to(device)
            halves = (whole if self.layout == "halves" else whole.transpose(1, 2)).split(self.head_dim, -1)
            given["k_pages"], given["v_pages"] = halves
        return given | {
            "max_seqlen_q": max(self.queries, default=0),
            "gate_pages": None if gates is None else GatePages(gates.values.to(device), gates.form),
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
        }

    def _places(self, pages: int, most: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The block table, and the slots of all keys; -1 for those of the first `shared` pages of other sequences."""
        order = torch.randperm(pages, generator=generator).tolist()
        table = torch.tensor([[GARBAGE[(b + i) % 3] for i in range(most)] for b in range(len(self.keys))])
        slots = []
        for b, length in enumerate(self.keys):
            for n in range(length):
                i, row = divmod(n, self.page_size)
                old = b > 0 and i < self.shared
                if row == 0:
                    table[b, i] = table[0, i] if old else order.pop()
                slots.append(-1 if old else int(table[b, i]) * self.page_size + row)
        return table.reshape(len(self.keys), most), torch.tensor(slots, dtype=torch.int64)


def of_sequence(given: dict[str, Any], b: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """(Hkv, N, D) keys, values and (Hkv, N) gates of a sequence in fp64, slot by slot from its pages."""
    size, kv_heads = given["k_pages"].shape[2], given["k_pages"].shape[1]
    table, length = given["block_table"][b].tolist(), int(given["seqlens_k"][b])
    places = [(table[n // size], n % size) for n in range(length)]

    def read(x: torch.Tensor) -> torch.Tensor:
        x = x.cpu()
        rows = [x[page, :, row].double() for page, row in places]
        return torch.stack(rows, 1) if rows else x[0, :, :0].double()

    k, v = (read(given[f"{name}_pages"]) for name in "kv")
    gates: GatePages | None = given["gate_pages"]
    apart = gates is not None and gates.form == "apart"
    for name in "kv":
        scale = given[f"{name}_scale"]
        if scale is None or (name == "v" and apart and scale.dim() == 3):
            continue
        factor = read(scale)[..., None] if scale.dim() == 3 else scale.cpu().double()
        k, v = (k * factor, v) if name == "k" else (k, v * factor)
    options: dict[str, Any] = {}
    if gates is not None:
        values = read(gates.values)
        values = values.expand(kv_heads, *values.shape[1:])
        gamma_k, gamma_v = (values[..., 0].exp2(), values[..., 1]) if apart else (values, 1 / values)
        options = {"gamma_k": gamma_k[None], "gamma_v": gamma_v[None]}
    return torch.stack([k, v])[:, None], options


def each_alone(form: Callable[..., Result], given: dict[str, Any], dtype: torch.dtype) -> Result:
    """out and lse of the rows of sequences by a dense form, with keys and values in `dtype`."""
    masks = {name: given[name] for name in ("causal", "window", "softcap")}
    outs, lses = [given["q"][:0].cpu().to(dtype)], [torch.empty(0, given["q"].shape[1]).double()]
    for b, (first, last) in enumerate(pairwise(given["cu_seqlens_q"].tolist())):
        (k, v), gates = of_sequence(given, b)
        if form is not reference_attention:
            gates = {name: gate.float() for name, gate in gates.items()}
            if "gamma_v" in gates and given["gate_pages"].form == "written":
                v = v * gates.pop("gamma_v").double()[..., None]
        rows = given["q"][first:last].cpu().transpose(0, 1)[None]
        out, lse = form(rows.to(dtype), k.to(dtype), v.to(dtype), **gates, **masks)
        if given["sinks"] is not None and form is not fp32_roundings:
            with_sink = torch.logaddexp(lse.double(), given["sinks"].cpu().double()[:, None])
            out = (out.double() * (lse.double() - with_sink).exp()[..., None]).to(out.dtype)
            lse = with_sink.to(lse.dtype)
        outs.append(out[0].transpose(0, 1).to(outs[0].dtype))
        lses.append(lse[0].T.double())
    return torch.cat(outs), torch.cat(lses)


def assert_as_exact(found: Result, given: dict[str, Any]) -> None:
    """Raise unless rows of sequences are as near to fp64 as the rule allows, and other rows are 0 and -inf."""
    out, lse = (x.cpu() for x in found)
    rows = int(given["cu_seqlens_q"][-1])
    assert not out[rows:].any(), "rows of no sequence"
    assert (lse[rows:] == -INF).all(), "rows of no sequence"
    exact = each_alone(reference_attention, given, torch.float64)
    eager_out, eager_lse = each_alone(eager_attention, given, out.dtype)
    inside = each_alone(fp32_roundings, given, torch.float64)
    assert_results_as_exact_as_eager((out[:rows], lse[:rows]), exact, (eager_out, eager_lse.float()), inside)
