"""Checks of decoding over caches, contiguous and paged, with lengths on the device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import videoanchor_triton as va
from benchmarks.attention.helpers.findings import Check, Finding, generator, outcome, worst

GARBAGE = -(2**30)


@dataclass(frozen=True)
class Cache:
    """A batch of caches by their lengths; page_size None is a contiguous one. `replayed` changes the lengths."""

    lengths: tuple[int, ...]
    queries: int = 1
    page_size: int | None = None
    replayed: tuple[int, ...] | None = None
    options: dict[str, Any] | None = None
    gated: bool = True
    head_dim: int = 128


def caches(large: bool) -> dict[str, Cache]:
    lengths = (1000, 0, 1, 37, 4097) if large else (21, 0, 1)
    base = Cache(lengths, head_dim=128 if large else 16)
    grown = tuple(reversed(lengths))
    cases = {"contiguous": base, "ungated": replace(base, gated=False)}
    cases |= {f"contiguous, {n} rows": replace(base, queries=n) for n in (2, 4, 16)}
    cases["6 rows, not causal"] = replace(base, queries=6, options={"causal": False})
    cases["window and softcap"] = replace(base, queries=4, options={"window": 9, "softcap": 5.0})
    cases |= {f"page size {n}": replace(base, page_size=n) for n in (16, 64, 256)}
    cases["page size 64, 5 rows, window and softcap"] = replace(
        base, queries=5, page_size=64, options={"window": 9, "softcap": 5.0}
    )
    cases["contiguous, CUDA graph"] = replace(base, replayed=grown)
    cases["page size 16, CUDA graph"] = replace(base, page_size=16, queries=3, replayed=grown)
    return cases


def cache_check(name: str, case: Cache) -> Check:
    def check(device: torch.device) -> Finding:
        random = generator(name)
        batch, most, heads = len(case.lengths), max(case.lengths) + 3, (4, 2)

        def draw(n_heads: int, length: int) -> torch.Tensor:
            x = torch.randn(batch, n_heads, length, case.head_dim, generator=random)
            return x.to(device, torch.bfloat16)

        q, k, v = draw(heads[0], case.queries), draw(heads[1], most), draw(heads[1], most)
        options: dict[str, Any] = {"causal": True} | (case.options or {})
        if case.gated:
            options["gamma_k"] = (1 + 9.5 * torch.rand(batch, most - 7, generator=random)).to(device)
            options["gamma_v"] = (1 + 2.5 * torch.rand(batch, heads[1], most, generator=random)).to(device)
            options["gamma_q"] = (1 + 4 * torch.rand(case.queries, generator=random)).to(device)
        used = [max(pair) for pair in zip(case.lengths, case.replayed or case.lengths, strict=True)]
        table, (k_cache, v_cache) = None, _poisoned((k, v), used)
        if case.page_size is not None:
            table, k_cache, v_cache = _paged(k, v, used, case.page_size, random)
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        run = _captured(
            lambda: va.anchored_attention_decode(
                q, k_cache, v_cache, lengths, table, **options, backend="triton", return_lse=True
            ),
            device if case.replayed else torch.device("cpu"),
        )
        run()
        if case.replayed:
            lengths.copy_(torch.tensor(case.replayed, dtype=torch.int32))
        out, lse = run()
        findings = []
        for b, n in enumerate(lengths.tolist()):
            own = options | {
                key: gate[b : b + 1, ..., :n] for key, gate in options.items() if key in ("gamma_k", "gamma_v")
            }
            tensors = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            findings.append(outcome((out[b : b + 1], lse[b : b + 1]), tensors, own))
        return worst(findings)

    return check


def _poisoned(tensors: tuple[torch.Tensor, ...], used: list[int]) -> list[torch.Tensor]:
    """Copies with NaN beyond the used length of each batch entry."""
    copies = [x.clone() for x in tensors]
    for x in copies:
        for b, n in enumerate(used):
            x[b, :, n:] = float("nan")
    return copies


def _paged(
    k: torch.Tensor, v: torch.Tensor, used: list[int], size: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block table (B, pages) and caches (pages, Hkv, size, D) in shuffled pages; NaN and garbage where nothing is."""
    batch, heads, length, head_dim = k.shape
    pages = -(-length // size)
    order = torch.randperm(batch * pages + 3, generator=random)[: batch * pages].view(batch, pages)
    table = torch.full((batch, pages), GARBAGE, dtype=torch.int32)
    caches = [x.new_full((batch * pages + 3, heads, size, head_dim), float("nan")) for x in (k, v)]
    for b, n in enumerate(used):
        for i in range(-(-n // size)):
            table[b, i] = order[b, i]
            here = min(size, n - i * size)
            for cache, x in zip(caches, (k, v), strict=True):
                cache[order[b, i], :, :here] = x[b, :, i * size : i * size + here]
    return table.to(k.device), *caches  # pyright: ignore[reportReturnType]


def _captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` as a CUDA graph that is replayed; on the CPU `run` itself."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> Any:
        graph.replay()
        return results

    return replay
