"""What is timed and how: shapes, inputs, the check of sampled rows, CUDA events, the two ceilings."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import quantiles
from typing import Any

import torch

from benchmarks.helpers.record import OK, SKIPPED, WRONG, Row
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import allowed_error, eager_attention, error

REPETITION_MS = 60.0
LEAST_RUNS, MOST_RUNS = 3, 50
FLUSH_BYTES = 2**28
# Keeps the device busy while the host queues a run, so that the events see no launch gaps: about 1 ms.
HEAD_START_CYCLES = 2_000_000
MEMORY_SHARE = 0.4

small = False  # the tiny sizes of a CPU on a GPU too, to see in a minute or two whether everything runs


def full_size(device: torch.device) -> bool:
    """Whether tasks have the sizes that are worth timing."""
    return device.type == "cuda" and not small


@dataclass(frozen=True)
class Task:
    """A row to be filled in. Tasks run by `rank`; those of a `kernel` that hung are not run again."""

    row: Row
    kernel: str
    run: Callable[[Row], Row]
    rank: int = 0


@dataclass(frozen=True)
class Shape:
    """A timed problem in bf16."""

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    causal: bool

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def cache_bytes(self) -> int:
        """K and V."""
        return 2 * 2 * self.batch * self.kv_heads * self.keys * self.head_dim

    @property
    def flop(self) -> float:
        """Of the two products of the forward pass, over visible pairs only."""
        pairs = self.queries * (self.keys - (self.queries - 1) / 2 if self.causal else self.keys)
        return 4 * self.batch * self.query_heads * self.head_dim * pairs

    def visible_keys(self, query: int) -> int:
        return query + self.keys - self.queries + 1 if self.causal else self.keys

    def row(self, section: str, contender: str) -> Row:
        """An empty row."""
        heads = f"B={self.batch} Hq={self.query_heads} Hkv={self.kv_heads} D={self.head_dim}"
        mask = ("causal " if self.causal else "full ") if self.queries > 1 else ""
        few = f"Nq={self.queries} " if 1 < self.queries < self.keys else ""
        case = f"{heads} {mask}{few}N={self.keys}"
        return Row(
            section, case, contender, self.batch, self.query_heads, self.kv_heads, self.head_dim, self.causal,
            self.queries, self.keys,
        )  # fmt: skip


class Inputs:
    """Random q (B, Hq, Nq, D), k and v (B, Hkv, Nk, D) in bf16, gamma_k and gamma_v (B, Nk) in fp32 of a shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape = shape

        def draw(heads: int, length: int) -> torch.Tensor:
            return torch.randn(shape.batch, heads, length, shape.head_dim, device=device, dtype=torch.bfloat16)

        self.q = draw(shape.query_heads, shape.queries)
        self.k, self.v = draw(shape.kv_heads, shape.keys), draw(shape.kv_heads, shape.keys)
        self.gamma_k = 1 + 9.5 * torch.rand(shape.batch, shape.keys, device=device)
        self.gamma_v = 1 + 2.5 * torch.rand(shape.batch, shape.keys, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v

    @property
    def samples(self) -> list[tuple[int, int]]:
        """(batch entry, query) of the rows that are checked against fp64."""
        batch, queries = self.shape.batch, self.shape.queries
        rows = sorted({0, queries // 3, queries // 2, queries - 1})
        return [(b, i) for b in sorted({0, batch - 1}) for i in rows]

    def rows_as_group(self, b: int, i: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """One query position as (1, Hkv, group, D) against its visible keys, and their gates: no head is repeated."""
        shape = self.shape
        end = shape.visible_keys(i)
        q = self.q[b, :, i].view(1, shape.kv_heads, shape.group, shape.head_dim)
        tensors = (q, self.k[b : b + 1, :, :end], self.v[b : b + 1, :, :end])
        return tensors, {"gamma_k": self.gamma_k[b : b + 1, :end], "gamma_v": self.gamma_v[b : b + 1, :end]}

    @cached_property
    def _expected(self) -> dict[bool, tuple[torch.Tensor, torch.Tensor]]:
        return {gated: self._expected_rows(gated) for gated in (False, True)}

    def _expected_rows(self, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The sampled rows (samples, Hq, D) in fp64, and the error that each may have."""
        rows, allowed = [], []
        for b, i in self.samples:
            tensors, gates = self.rows_as_group(b, i)
            exact = reference_attention(*tensors, **(gates if gated else {}))[0]
            eager = eager_attention(*tensors, **(gates if gated else {}))[0]
            allowed.append(allowed_error(exact, error(eager, exact), eager.dtype))
            rows.append(exact.reshape(self.shape.query_heads, self.shape.head_dim))
        return torch.stack(rows), torch.tensor(allowed, dtype=torch.float64)

    def judge(self, row: Row, out: torch.Tensor, gated: bool) -> Row:
        """The row with error, allowed error and status of the sampled row of `out` (B, Hq, Nq, D) that is worst."""
        exact, allowed = self._expected[gated]
        found = torch.stack([out[b, :, i] for b, i in self.samples])
        errors = (found.double() - exact).abs().amax((1, 2)).cpu().nan_to_num(nan=math.inf)
        worst = int((errors / allowed).argmax())
        return judged(row, errors[worst].item(), allowed[worst].item())


def judged(row: Row, wrong: float, allowed: float) -> Row:
    """The row with its error, which is None where the result is not finite."""
    if not math.isfinite(wrong):
        return replace(row, allowed=allowed, status=WRONG, reason="wrong result: not finite where it should be")
    status, reason = (OK, "") if wrong <= allowed else (WRONG, "wrong result")
    return replace(row, error=wrong, allowed=allowed, status=status, reason=reason)


def skip_for_memory(row: Row, needed: float, device: torch.device) -> Row | None:
    """A skipped row if `needed` bytes are more than MEMORY_SHARE of what is free."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if needed <= MEMORY_SHARE * free:
        return None
    reason = f"needs {needed / 1e9:.3g} GB, more than {MEMORY_SHARE:.0%} of the {free / 1e9:.3g} GB that are free"
    return replace(row, status=SKIPPED, reason=reason)


def with_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """The result of a run, and the MiB that it held at its peak beyond inputs and result (None without a GPU)."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    results = result if isinstance(result, tuple) else (result,)
    return result, (torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)) / 2**20


def timed(row: Row, run: Callable[[], Any], work: float, unit: str, device: torch.device) -> Row:
    """The row with median, p20 and p80 of CUDA events around `run`, L2 flushed before each run, and work over median.

    A row that is not right is returned as it is, and so is every row without a GPU. REPETITION_MS of runs by the time
    of the first, between LEAST_RUNS and MOST_RUNS. `run` has been called before, so nothing is compiled here.
    """
    if row.status != OK or device.type != "cuda":
        return row
    flush = torch.empty(FLUSH_BYTES if full_size(device) else 1, dtype=torch.int8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    wanted = LEAST_RUNS
    while len(times) < wanted:
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if len(times) == 1:
            wanted = max(LEAST_RUNS, min(MOST_RUNS, int(REPETITION_MS / times[0])))
    tenths = quantiles(times, n=10, method="inclusive")
    p20, p50, p80 = tenths[1], tenths[4], tenths[7]
    return replace(row, ms=p50, ms_p20=p20, ms_p80=p80, rate=work / p50 / 1e9, unit=unit)


def ceiling_tasks(device: torch.device) -> Iterator[Task]:
    """A large bf16 matrix product (TFLOP/s) and a large copy on the device (bytes read plus written, TB/s)."""
    size, length = (16384, 2**30) if full_size(device) else (64, 2**10)

    def product(row: Row) -> Row:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        return _ceiling(row, lambda: a @ b, 2.0 * size**3, "TFLOP/s", device)

    def copy(row: Row) -> Row:
        source = torch.randn(length, device=device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        return _ceiling(row, lambda: target.copy_(source), 2.0 * source.nbytes, "TB/s", device)

    yield Task(Row("ceiling", f"bf16 product of {size} x {size}", "torch.matmul"), "torch.matmul", product)
    yield Task(Row("ceiling", f"copy of {2 * length} bytes", "torch.Tensor.copy_"), "torch.Tensor.copy_", copy)


def _ceiling(row: Row, run: Callable[[], Any], work: float, unit: str, device: torch.device) -> Row:
    run()
    row = replace(row, status=OK, unit=unit)
    return timed(row, run, work, unit, device)
