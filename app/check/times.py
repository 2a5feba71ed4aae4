"""Prefill and decode beside torch's scaled_dot_product_attention: first that it is right, then how long it takes."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...kernels.api import anchored_attention
from ...kernels.dispatch import triton_target
from ...kernels.reference import reference_attention
from ...kernels.tiles import INTERPRETER
from ...kernels.tolerance import compare_results, eager_attention, fp32_roundings

WARM_UP, RUNS = 3, 15
ROWS = 16


class Shape(NamedTuple):
    """Of a causal call: queries are the last ones of the keys."""

    batch: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        heads = f"{self.query_heads} heads over {self.kv_heads}"
        sizes = f"batch {self.batch}, {heads} of {self.head_dim}, {self.queries} x {self.keys}"
        return f"{sizes}, {str(self.dtype).removeprefix('torch.')}"


LARGE = {
    "prefill": Shape(1, 28, 4, 4096, 4096, 128, torch.bfloat16),
    "decode": Shape(8, 28, 4, 1, 8192, 128, torch.bfloat16),
}
SMALL = {
    "prefill": Shape(1, 4, 2, 256, 256, 64, torch.float32),
    "decode": Shape(1, 4, 2, 1, 1024, 64, torch.float32),
}


def beside_sdpa(name: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds of gated attention by what `backend="auto"` takes there, and by SDPA, and of ungated SDPA.

    Triton's interpreter is not timed: its times mean nothing.
    """
    compiled = triton_target(device)[0] not in (None, INTERPRETER)
    shape = (LARGE if compiled else SMALL)[name]
    random = torch.Generator().manual_seed(0)
    sizes = (shape.query_heads, shape.queries), (shape.kv_heads, shape.keys), (shape.kv_heads, shape.keys)
    q, k, v = (
        torch.randn(shape.batch, *size, shape.head_dim, generator=random).to(device, shape.dtype) for size in sizes
    )
    scores = torch.rand(shape.keys, generator=random).to(device)
    gates = {"gamma_k": 1 + 9.5 * scores, "gamma_v": 1 + 2.5 * scores, "gate_form": "post-exp"}
    found: dict[str, Any] = {"status": "right", "shape": str(shape), "milliseconds": {}}
    for backend in ("triton", "sdpa") if compiled else ("sdpa",):

        def run(backend: str = backend) -> Any:
            return anchored_attention(q, k, v, causal=True, backend=backend, **gates)

        wrong, allowed = _error(run(), q, k, v, scores)
        if wrong <= allowed:
            found["milliseconds"][f"gated {backend}"] = milliseconds(run, device)
        else:
            found |= {"status": "wrong", "what": f"{backend}: out", "error": wrong, "allowed": allowed}

    def ungated() -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=shape.queries > 1, enable_gqa=True)

    found["milliseconds"]["ungated sdpa"] = milliseconds(ungated, device)
    return found


def _error(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor
) -> tuple[float, float]:
    """(error, allowed) of the last rows of a group of heads, in fp64 on the CPU."""
    group = q.shape[1] // k.shape[1]
    mine, q, k, v = (x.cpu() for x in (out[:1, :group, -ROWS:], q[:1, :group, -ROWS:], k[:1, :1], v[:1, :1]))
    options = {"gamma_k": 1 + 9.5 * scores.cpu(), "gamma_v": 1 + 2.5 * scores.cpu(), "causal": True}
    forms = reference_attention, eager_attention, fp32_roundings
    exact, eager, roundings = (form(q, k, v, **options) for form in forms)
    _, error, allowed = compare_results((mine, exact[1].float()), exact, eager, roundings)[0]
    return error, allowed


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of `RUNS` calls after `WARM_UP`, each with its launch: by CUDA's events on a GPU, else by the clock."""
    for _ in range(WARM_UP):
        run()
    if device.type != "cuda":
        taken = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - begun))
        return median(taken)
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        marks[-1].synchronize()
    return median(first.elapsed_time(second) for first, second in pairwise(marks))
