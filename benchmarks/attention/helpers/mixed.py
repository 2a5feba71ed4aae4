"""The mixed batches that are timed: their sequences, a paged cache with gates by slot, the rows that are checked."""

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.attention.helpers.findings import worst
from benchmarks.helpers.measure import full_size, judged
from benchmarks.helpers.record import Row
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import allowed_error, eager_attention, error

SAMPLED_SEQUENCES = 3


@dataclass(frozen=True)
class Batch:
    """Queries and keys of each sequence, in bf16, causal; `unit` says what its work is counted in."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    unit: str = "TB/s"
    heads: tuple[int, int] = (28, 4)
    head_dim: int = 128
    page: int = 256  # the smallest that flash-attn takes

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    @property
    def cache_bytes(self) -> int:
        """K and V in 16 bits."""
        return 4 * sum(self.keys) * self.heads[1] * self.head_dim

    @property
    def work(self) -> float:
        """Bytes of K and V, or operations of the two products over visible pairs."""
        if self.unit == "TB/s":
            return float(self.cache_bytes)
        pairs = sum(n * (keys - (n - 1) / 2) for n, keys in zip(self.queries, self.keys, strict=True))
        return 4 * self.heads[0] * self.head_dim * pairs

    @property
    def equal(self) -> int:
        """The queries of every sequence where they are as many, else 0."""
        return self.queries[0] if len({*self.queries}) == 1 else 0

    def row(self, contender: str) -> Row:
        """An empty row; queries and keys are those of the longest sequence."""
        return Row(
            "mixed", self.name, contender, len(self.keys), *self.heads, self.head_dim, True, max(self.queries),
            max(self.keys),
        )  # fmt: skip


@cache
def batches(large: bool) -> dict[str, Batch]:
    """By a short name: decodes of all lengths, one long among short ones, one alone, with chunks, a question."""
    if not large:
        small: dict[str, Any] = {"heads": (4, 2), "head_dim": 16, "page": 32}
        return {
            "b": Batch("one decode of 150", (1,), (150,), **small),
            "c": Batch("2 decodes of 70, a chunk of 20 on 90", (1, 1, 20), (70, 70, 90), "TFLOP/s", **small),
            "d": Batch("5 tokens on 100", (5,), (100,), "TFLOP/s", **small),
        }
    k, drawn = 1024, random.Random(0)
    lengths = tuple(int(2 ** drawn.uniform(10, 17)) for _ in range(64))
    return {
        "a": Batch("64 decodes of 1k to 128k", (1,) * 64, lengths),
        "a2": Batch("a decode of 128k, 63 of 1k", (1,) * 64, (128 * k, *[k] * 63)),
        "b": Batch("one decode of 128k", (1,), (128 * k,)),
        "c": Batch(
            "32 decodes of 8k, 4 chunks of 2k on 64k",
            (1,) * 32 + (2 * k,) * 4,
            (8 * k,) * 32 + (64 * k,) * 4,
            "TFLOP/s",
        ),
        "d": Batch("30 tokens on 128k", (30,), (128 * k,)),
        "e": Batch("8 decodes of 2k", (1,) * 8, (2 * k,) * 8),
    }


class Held(NamedTuple):
    """What K and V are kept in: a dtype of 8 bits, with a scale for each token and head or one for the tensor."""

    dtype: torch.dtype
    per_token: bool


class MixedInputs:
    """q (Tq, Hq, D), a cache whose slots hold random K and V, halves of one tensor, and gates by slot, alike for heads.

    What lies in a slot is V where a call takes gates apart or none, and V' = gK gV V where it takes them written: the
    same numbers, read in two ways.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        torch.manual_seed(0)
        self.batch, self.device = batch, device
        query_heads, self.kv_heads = batch.heads
        self.slots = batch.page * sum(-(-n // batch.page) for n in batch.keys)
        bf16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.q = torch.randn(sum(batch.queries), query_heads, batch.head_dim, **bf16)
        self.cache = torch.randn(self.slots, self.kv_heads, 2 * batch.head_dim, **bf16)
        self.gamma_k = 1 + 9.5 * torch.rand(self.slots, device=device)
        self.gamma_v = 1 + 2.5 * torch.rand(self.slots, device=device)
        offsets = torch.tensor([0, *batch.queries]).cumsum(0)
        self.first = offsets.tolist()
        self.cu_seqlens_q = offsets.to(device, torch.int32)
        self.seqlens_k = torch.tensor(batch.keys, dtype=torch.int32, device=device)
        self._tables: dict[int, torch.Tensor] = {}
        self._expected: dict[Any, list[tuple[torch.Tensor, float]]] = {}

    def table(self, page: int) -> torch.Tensor:
        """(B, pages of the longest) int32: each sequence's pages, in random order."""
        if page not in self._tables:
            counts = [-(-n // page) for n in self.batch.keys]
            order = torch.randperm(self.slots // page, device=self.device)[: sum(counts)].int()
            self._tables[page] = pad_sequence(list(order.split(counts)), batch_first=True)
        return self._tables[page]

    def pages(self, page: int, cache: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """K and V (P, Hkv, page, D), views of the cache."""
        cache = self.cache if cache is None else cache
        return cache.view(-1, page, self.kv_heads, 2 * self.batch.head_dim).transpose(1, 2).chunk(2, -1)

    def slots_of(self, sequence: int, page: int, end: int) -> torch.Tensor:
        """The slots (end,) of a sequence's first keys."""
        used = self.table(page)[sequence, : -(-end // page), None].long()
        return (used * page + torch.arange(page, device=self.device)).flatten()[:end]

    def keys_and_values(self, sequence: int, page: int) -> tuple[torch.Tensor, ...]:
        """A sequence's K and V (1, Hkv, N, D), gathered."""
        slots = self.slots_of(sequence, page, self.batch.keys[sequence])
        return self.cache[slots].transpose(0, 1)[None].chunk(2, -1)

    def quantised(self, held: Held) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The cache in 8 bits (slots, Hkv, 2 D), and the scales of K and V: (1,), or (slots, Hkv)."""
        codes = torch.empty_like(self.cache, dtype=held.dtype)
        largest = 127.0 if held.dtype == torch.int8 else 448.0
        scales = []
        for x, of_x in zip(self.cache.chunk(2, -1), codes.chunk(2, -1), strict=True):
            most = x.abs().amax(-1).float() if held.per_token else x.abs().amax().float()[None]
            scales.append(most / largest)
            scaled = x.float() / (scales[-1][..., None] if held.per_token else scales[-1])
            of_x.copy_(scaled.round() if held.dtype == torch.int8 else scaled)
        return codes, scales[0], scales[1]

    def samples(self) -> list[tuple[int, int]]:
        """(sequence, query) of the rows that are checked: of the longest, the first and the last sequence."""
        longest = max(range(len(self.batch.keys)), key=self.batch.keys.__getitem__)
        chosen = list(dict.fromkeys([longest, 0, len(self.batch.keys) - 1]))[:SAMPLED_SEQUENCES]
        return [(b, i) for b in chosen for i in sorted({0, self.batch.queries[b] // 2, self.batch.queries[b] - 1})]

    def judge(
        self, row: Row, out: torch.Tensor, gate: str, page: int, held: Held | None = None, softcap: float | None = None
    ) -> Row:
        """The row with error, allowed error and status of the sampled row of `out` (Tq, Hq, D) that is worst."""
        key = gate, page, held, softcap
        if key not in self._expected:
            self._expected[key] = self._rows(gate, page, held, softcap)
        findings = []
        for (b, i), (exact, allowed) in zip(self.samples(), self._expected[key], strict=True):
            mine = out[self.first[b] + i]
            findings.append((error(mine, exact) if mine.isfinite().all() else math.inf, allowed))
        return judged(row, *worst(findings))

    def _rows(self, gate: str, page: int, held: Held | None, softcap: float | None) -> list[tuple[torch.Tensor, float]]:
        codes, *scales = (self.cache,) if held is None else self.quantised(held)
        found = []
        for b, i in self.samples():
            end = self.batch.keys[b] - self.batch.queries[b] + i + 1
            slots = self.slots_of(b, page, end)
            k, v = (x.transpose(0, 1)[None] for x in codes[slots].chunk(2, -1))
            if held is not None:
                k, v = (
                    x.float() * (scale[slots].T[None, :, :, None] if held.per_token else scale)
                    for x, scale in zip((k, v), scales, strict=True)
                )
            gamma_k, gamma_v = self.gamma_k[slots][None], self.gamma_v[slots][None]
            gates: dict[str, Any] = {} if gate == "none" else {"gamma_k": gamma_k}
            if gate == "apart":
                gates["gamma_v"] = gamma_v
            elif gate == "written":  # the row sum takes gK, which V' holds already
                v = v.double() / gamma_k[:, None, :, None]
            q = self.q[self.first[b] + i].view(1, self.kv_heads, self.batch.group, -1)
            exact = reference_attention(q, k, v, **gates, softcap=softcap)[0]
            eager = eager_attention(q, k.to(q.dtype), v.to(q.dtype), **gates, softcap=softcap)[0]
            found.append((exact.view(self.batch.heads[0], -1), allowed_error(exact, error(eager, exact), q.dtype)))
        return found


def batch_list(device: torch.device) -> dict[str, Batch]:
    return batches(full_size(device))
