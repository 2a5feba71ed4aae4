"""Correctness of every op against the fp64 oracle, on random and adversarial inputs from the seed of a case's name.

Each distinct set of a kernel's compile-time flags costs seconds on a GPU, so that the cases share a few: flags vary at
head dim 128 in bf16, head dims and dtypes vary in one gate form.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from oracle import Problem

import videoanchor_triton as va
from benchmarks.attention.helpers.cache_checks import cache_check, caches
from benchmarks.attention.helpers.findings import Check, Finding, generator, gradient_finding, gradients, outcome
from benchmarks.attention.helpers.packed_checks import gradient_check, packed_cases, packed_check
from benchmarks.attention.helpers.paged_checks import absence, paged_cases
from benchmarks.helpers.measure import Task, full_size, judged
from benchmarks.helpers.record import SKIPPED, Row
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.hopper import gluon_refusal
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import eager_attention

FORMS = ("post-exp", "log-bias")
HEAD_DIMS = (16, 32, 64, 80, 96, 256)


def correctness(device: torch.device) -> Iterator[Task]:
    """All correctness tasks for a device: the problems are larger on a GPU."""
    large = full_size(device)
    for problem in _problems(large):
        kernel = problem.name.split(",")[0]
        for gate_form in _forms(problem) if large else _forms(problem)[-1:]:
            yield _task(problem.name, gate_form, kernel, _dense(problem, "triton", gate_form), device)
    for problem in _sizes(large):
        yield _task(problem.name, "post-exp", problem.name.split(",")[0], _dense(problem, "triton", "post-exp"), device)
    for problem in _hopper_problems():
        for gate_form in _forms(problem):
            task = _task(problem.name, gate_form, "hopper", _dense(problem, "hopper", gate_form), device)
            yield _unless(task, partial(hopper_absence, device))
    for name, case in packed_cases(large).items():
        for gate_form in FORMS if large else FORMS[:1]:
            yield _task(f"varlen, {name}", gate_form, "varlen", packed_check(name, case, gate_form), device)
    for name, cache in caches(large).items():
        yield _task(f"cache, {name}", "log-bias", "cache", cache_check(name, cache), device)
    for name, gates, check in paged_cases(large):
        yield _unless(_task(f"paged, {name}", gates, "paged", check, device), partial(absence, name, device))
    for name in ("two parts", "a part without keys"):
        yield _task(f"merge, {name}", "post-exp", "prefill", _merge(name, large), device)
    for problem in _backward_problems(large):
        for gate_form in _forms(problem) if large else _forms(problem)[:1]:
            yield _task(problem.name, gate_form, "backward", _dense_gradients(problem, gate_form), device)
    packed = packed_cases(large)["more keys than queries"]
    for gate_form in FORMS if large else FORMS[:1]:
        check = gradient_check("varlen, backward", packed, gate_form)
        yield _task("varlen, gradients", gate_form, "varlen backward", check, device)


def _forms(problem: Problem) -> tuple[str, ...]:
    return FORMS if problem.bounded else ("log-bias",)


def _task(name: str, gate_form: str, kernel: str, check: Check, device: torch.device) -> Task:
    def run(row: Row) -> Row:
        # torch.empty gives NaN, so that an element which no kernel writes is seen
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return judged(row, *check(device))
        finally:
            torch.use_deterministic_algorithms(False)

    return Task(Row("correctness", name, gate_form), kernel, run)


def _problems(large: bool) -> Iterator[Problem]:
    prefill = Problem("prefill", queries=300, keys=500, head_dim=128, dtype=torch.bfloat16)
    decode = Problem("decode", queries=1, keys=5000, head_dim=128, dtype=torch.bfloat16)
    if not large:
        prefill = replace(prefill, batch=1, queries=40, keys=50, head_dim=16)
        decode = replace(decode, batch=1, keys=90, head_dim=16)
    changes: dict[str, dict[str, Any]] = {
        "ungated": {"gate": "none"},
        "per-batch gate": {},
        "per-head gate": {"gate": "per-head"},
        "gates shorter than keys": {"gate_keys": 33},
        "gate 0 on dominating keys": {"gate": "zero"},
        "gates up to 1e6": {"gate": "huge"},
        "logits * 1000": {"logits": 1000.0},
        "softcap": {"softcap": 5.0, "logits": 10.0},
        "NaN in left padding": {"padding": "left-nan"},
        "all keys padded": {"padding": "all"},
        "window": {"window": 37},
        "not causal": {"causal": False},
        "strides of (B, N, H, D)": {"layout": "bnhd"},
        "GQA 7:1": {"query_heads": 7, "kv_heads": 1},
        "one key": {"keys": 1},
        "gated values beyond fp16": {"gate": "beyond-fp16", "dtype": torch.float16},
    }
    for base in (prefill, decode):
        for name, change in changes.items():
            yield replace(base, name=f"{base.name}, {name}", **change)
    yield replace(prefill, name="prefill, rows without a key", queries=prefill.keys, keys=prefill.queries)
    yield replace(decode, name="decode, 4 rows", queries=4)
    # up to some hundred queries go to the kernel that splits the keys
    yield replace(decode, name="decode, 30 rows", queries=30)
    yield replace(decode, name="decode, 16 rows, window and softcap", queries=16, window=37, softcap=5.0)
    if large:
        yield replace(decode, name="decode, fewer blocks than splits", keys=130)


def _sizes(large: bool) -> Iterator[Problem]:
    for kernel, queries, keys in (("prefill", 300, 500), ("decode", 1, 5000)) if large else ():
        base = Problem(kernel, queries=queries, keys=keys, head_dim=128, dtype=torch.bfloat16)
        for head_dim in HEAD_DIMS:
            yield replace(base, name=f"{kernel}, D={head_dim}", head_dim=head_dim)
        for dtype in (torch.float16, torch.float32):
            yield replace(base, name=f"{kernel}, {str(dtype)[6:]}", dtype=dtype)


def _hopper_problems() -> Iterator[Problem]:
    base = Problem("hopper", queries=600, keys=1100, head_dim=128, dtype=torch.bfloat16)
    changes: dict[str, dict[str, Any]] = {
        "causal": {},
        "not causal": {"causal": False},
        "ungated": {"gate": "none"},
        "square": {"keys": 600},
        "rows without a key": {"keys": 200},
        "one query tile": {"queries": 17, "keys": 17},
        "many tiles": {"queries": 2048, "keys": 4096},
        "per-head gate": {"gate": "per-head"},
        "gates shorter than keys": {"gate_keys": 33},
        "gate 0 on dominating keys": {"gate": "zero"},
        "logits * 1000": {"logits": 1000.0},
        "strides of (B, N, H, D)": {"layout": "bnhd"},
        "GQA 7:1": {"query_heads": 7, "kv_heads": 1},
        "D=64": {"head_dim": 64},
        "D=64, not causal": {"head_dim": 64, "causal": False},
        "fp16": {"dtype": torch.float16, "gate": "none"},  # it has no gamma_v there
    }
    for name, change in changes.items():
        yield replace(base, name=f"hopper, {name}", **change)


def _unless(task: Task, absence: Callable[[], str]) -> Task:
    """The task, skipped where there is a reason to when it is run."""

    def run(row: Row) -> Row:
        reason = absence()
        return replace(row, status=SKIPPED, reason=reason) if reason else task.run(row)

    return replace(task, run=run)


def hopper_absence(device: torch.device) -> str:
    """Why the Hopper path cannot run on a device, or an empty string."""
    if triton_target(device)[0] != "sm_90":
        return "the Hopper path needs a GPU of sm_90"
    return gluon_refusal() or ""


def _dense(problem: Problem, backend: str, gate_form: str) -> Check:
    def check(device: torch.device) -> Finding:
        tensors, options = problem.make(device)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return va.anchored_attention(*tensors, **options, backend=backend, gate_form=gate_form, return_lse=True)

        found = run()
        # what moves between runs is a race, which the interpreter cannot have
        if device.type == "cuda" and not all(
            torch.equal(first, second) for first, second in zip(found, run(), strict=True)
        ):
            raise RuntimeError("two runs on the same inputs differ, or a result is NaN")
        return outcome(found, tensors, options)

    return check


def _merge(name: str, large: bool) -> Check:
    problem = Problem(name, queries=300, keys=500, head_dim=128, dtype=torch.bfloat16)
    if not large:
        problem = replace(problem, queries=20, keys=40, head_dim=16)

    def check(device: torch.device) -> Finding:
        (q, k, v), options = problem.make(device)
        first = problem.keys - problem.queries if name == "two parts" else 0
        parts = []
        for keys, causal in ((slice(0, first), False), (slice(first, None), True)):
            gates = {key: options[key][:, keys] for key in ("gamma_k", "gamma_v")}
            gates |= {"gamma_q": options["gamma_q"], "causal": causal, "gate_form": "post-exp"}
            part = va.anchored_attention(q, k[:, :, keys], v[:, :, keys], **gates, return_lse=True, backend="triton")
            parts += list(part)
        return outcome(va.merge_attention(*parts), (q, k, v), options)

    return check


def _backward_problems(large: bool) -> Iterator[Problem]:
    base = Problem("backward", queries=200, keys=300, head_dim=128, dtype=torch.bfloat16)
    if not large:
        base = replace(base, queries=20, keys=30, head_dim=16, batch=1)
    changes: dict[str, dict[str, Any]] = {
        "causal": {},
        "not causal": {"causal": False},
        "ungated": {"gate": "none"},
        "window and softcap": {"window": 11, "softcap": 5.0},
        "NaN in left padding": {"padding": "left-nan", "causal": False},
        "per-head gate, GQA 7:1": {"query_heads": 7, "kv_heads": 1, "gate": "per-head"},
        "gates up to 1e6": {"gate": "huge"},
    }
    for name, change in changes.items():
        yield replace(base, name=f"backward, {name}", **change)
    if large:
        yield replace(base, name="backward, one query", queries=1)
        yield replace(base, name="backward, D=80", head_dim=80)
        yield replace(base, name="backward, float16", dtype=torch.float16)


def _dense_gradients(problem: Problem, gate_form: str) -> Check:
    def check(device: torch.device) -> Finding:
        tensors, options = problem.make(device)
        random = generator(problem.name + " upstream")
        shape = tensors[0].shape
        upstream = tuple(torch.randn(s, generator=random).to(device, tensors[0].dtype) for s in (shape, shape[:3]))

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
            return va.anchored_attention(q, k, v, **given, backend="triton", gate_form=gate_form, return_lse=True)

        found, eager, exact = (
            gradients(attend, tensors, options, upstream) for attend in (ours, eager_attention, reference_attention)
        )
        return gradient_finding(found, eager, exact)

    return check
