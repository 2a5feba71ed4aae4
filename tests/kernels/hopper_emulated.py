"""The Hopper kernel in the emulator: problems, schedules, and what must hold of each run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gluon_emulator import Emulator, FaultError
from oracle import Problem, assert_as_exact_as_eager

from videoanchor_triton.kernels import hopper_kernel
from videoanchor_triton.kernels.gates import expand_gate, pad_gate
from videoanchor_triton.kernels.hopper import hopper_prefill, hopper_refusal
from videoanchor_triton.kernels.operands import Masks
from videoanchor_triton.kernels.tiles import Tile

FORMS = {"ungated": 0, "log-bias": 1, "post-exp": 2}
# the order in which partitions go on (two warpgroups and the loader), and which copies land first if they are late
SCHEDULES: dict[str, tuple[tuple[int, int, int], str | None]] = {
    "loader first, at once": ((2, 1, 0), None),
    "loader first, late": ((2, 0, 1), "newest"),
    "loader last, late": ((0, 1, 2), "oldest"),
}
SMALL = Tile(32, 16, 4, 2)
BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
MASKS = Masks(0.125, True, None, None)
BASE = Problem("causal", batch=1, query_heads=2, kv_heads=1, head_dim=64, dtype=BF16)


def gate_of(gamma_k: torch.Tensor, problem: Problem, form: str) -> torch.Tensor:
    """gamma_k as the launcher gets it: (B, heads, more than Nk) with NaN beyond the keys."""
    heads = {"per-head": problem.kv_heads, "per-query-head": problem.query_heads}.get(problem.gate, 1)
    gate = expand_gate(pad_gate(gamma_k, problem.keys), problem.batch, heads)
    gate = gate.log2() if form == "log-bias" else gate
    return pad_gate(gate, -(-(problem.keys + 5) // 16) * 16, float("nan"))


def check(problem: Problem, form: str, tile: Tile | None = SMALL, device: torch.device = CPU) -> None:
    """Raise unless the kernel is as exact as the same-precision eager form."""
    (q, k, v), options = replace(problem, gate="none" if form == "ungated" else problem.gate).make(device)
    options.pop("gamma_q", None)
    values, gate = v, None
    if form != "ungated":
        gate = gate_of(options["gamma_k"], problem, form)
        weight = options["gamma_v"] * options["gamma_k"] if form == "post-exp" else options["gamma_v"]
        heads = problem.query_heads if problem.gate == "per-query-head" else problem.kv_heads
        weight = expand_gate(pad_gate(weight, problem.keys), problem.batch, heads)
        values = (v.repeat_interleave(heads // problem.kv_heads, 1).float() * weight[..., None]).to(v.dtype)
    out = torch.full_like(q.transpose(1, 2).contiguous(), float("nan")).transpose(1, 2)
    lse = torch.full(q.shape[:3], float("nan"), device=device)
    assert hopper_refusal(q, k, values, "sm_90") is None
    masks = Masks(q.shape[-1] ** -0.5, problem.causal, None, None)
    hopper_prefill(q, k, values, gate, out, lse, masks, FORMS[form], tile)
    assert_as_exact_as_eager((out, lse), (q, k, v), options)


def check_turns(starts: list[int]) -> None:
    """Raise unless the warpgroups started their products by turns: `starts` names the warpgroup of each product.

    One product in the first visit, two in each other one, and last of all the values of the last tile, out of turn.
    """
    visits = len(starts) // 4
    in_turn = [w for i, w in enumerate(starts) if w in starts[i + 1 :]]
    if in_turn != [0, 1] + [0, 0, 1, 1] * (visits - 1):
        raise FaultError(f"the warpgroups did not take turns: {starts}")


def emulated(monkeypatch: pytest.MonkeyPatch, schedule: str, kernel: Any = hopper_kernel.hopper_kernel) -> None:
    """Let the launcher run the emulated kernel."""
    monkeypatch.setattr(hopper_kernel, "hopper_kernel", Emulator(kernel, *SCHEDULES[schedule], check_turns))
