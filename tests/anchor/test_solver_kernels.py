"""The solver's kernels of a GPU: what they compute, in the interpreter; how many launches; and that they compile."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from videoanchor_triton.anchor import iterates as iterating
from videoanchor_triton.anchor import newton_kernel, slopes_kernel
from videoanchor_triton.anchor.admm_start import Admm, Start
from videoanchor_triton.anchor.atoms import Atoms, all_slopes, objective
from videoanchor_triton.anchor.iterates import Iterates, swap_candidates
from videoanchor_triton.anchor.memory import candidate_atoms
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import Problem
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.kernels.aot import TARGETS

N_TOKENS = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def iterates(rank: int, n_atoms: int, *, affine: bool, dtype: torch.dtype, alpha_e: float = 800.0) -> Iterates:
    """N_TOKENS tokens at the start of the solver."""
    problem = Problem.of(normal(rank, n_atoms), affine=affine, alpha_e=alpha_e, alpha_z=800.0)
    atoms = Atoms.of(problem, dtype)
    target, own = atoms.exact[:N_TOKENS], torch.arange(N_TOKENS)
    k = candidate_atoms(rank + affine, n_atoms - 1)
    admm = Admm(Start.of(atoms, k), atoms, target, own)
    admm.advance(admm.start.n_iter)
    x, candidates, coefficients, _ = admm.point(k)
    x *= 0.98 / all_slopes(atoms, x, own)[1].clamp_min(0.98)
    return Iterates(atoms, target, own, candidates, x, coefficients)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().amax() / expected.abs().amax())


CASES = [
    pytest.param(1, 20, True, 800.0, 0, id="r1-affine"),
    pytest.param(8, 60, True, 800.0, 0, id="r8-affine"),
    pytest.param(8, 61, False, 800.0, 0, id="r8-linear"),
    pytest.param(5, 60, True, 0.05, 0, id="r5-affine-errors"),
    pytest.param(17, 130, True, 800.0, 0, id="r17-affine"),
    pytest.param(7, 60, True, 800.0, 3, id="r7-affine-least-centring"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("rank", "n_atoms", "affine", "alpha_e", "n_before"), CASES)
def test_newton_step(
    rank: int,
    n_atoms: int,
    affine: bool,
    alpha_e: float,
    n_before: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = iterates(rank, n_atoms, affine=affine, dtype=torch.float64, alpha_e=alpha_e)
    for _ in range(n_before):
        exact.advance()
    start = {name: getattr(exact, name).clone() for name in ("x", "u", "v", "g", "candidates")}
    rounded = iterates(rank, n_atoms, affine=affine, dtype=dtype, alpha_e=alpha_e)
    monkeypatch.setattr(iterating, "_runs_triton", lambda _: True)
    ours = iterates(rank, n_atoms, affine=affine, dtype=dtype, alpha_e=alpha_e)
    for it in (rounded, ours):
        for name, value in start.items():
            setattr(it, name, value.clone())
        it.matrix = it.atoms.rows[it.candidates]
    together = rank == 8
    least = max(torch.finfo(dtype).eps, 1e-11)  # one rounding, which the eager form may be spared by chance
    c, primal = exact.advance(together=together)
    (c_rounded, primal_rounded), (c_ours, primal_ours) = (it.advance(together=together) for it in (rounded, ours))
    for name in ("x", "u", "v", "g"):
        error = largest_difference(getattr(rounded, name), getattr(exact, name))
        assert largest_difference(getattr(ours, name), getattr(exact, name)) <= 4 * error + least, name
    assert largest_difference(c_ours, c) <= 4 * largest_difference(c_rounded, c) + least
    of_c, of_ours, of_rounded = (
        objective(exact.atoms, torch.bmm(found[:, None], exact.matrix)[:, 0], found, exact.target)
        for found in (c, c_ours, c_rounded)
    )
    torch.testing.assert_close(primal, of_c, rtol=1e-12, atol=0)
    assert largest_difference(primal_ours, of_ours) <= 4 * largest_difference(primal_rounded, of_rounded) + least
    assert ours.objectives is not None
    assert ours.weights is not None
    torch.testing.assert_close(ours.objectives[:, 1], ours.dual(), rtol=1e-12, atol=0)
    weights = torch.maximum(ours.u / (1 - ours.g), ours.v / (1 + ours.g))[:, : c.shape[1]]
    torch.testing.assert_close(ours.weights, weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("rank", "n_atoms", "affine"), [(6, 150, True), (7, 131, False), (17, 300, True)])
def test_violators_take_the_place_of_the_lightest(
    rank: int, n_atoms: int, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = iterates(rank, n_atoms, affine=affine, dtype=torch.float64)
    monkeypatch.setattr(iterating, "_runs_triton", lambda _: True)
    monkeypatch.setattr("videoanchor_triton.anchor.slopes_kernel.GROUPS", 10**6)  # of 4 atoms, the smallest
    monkeypatch.setattr(iterating, "GROUPS", -(-n_atoms // 4))
    ours = iterates(rank, n_atoms, affine=affine, dtype=torch.float64)
    # The torch form groups atoms that lie apart, the kernel those side by side: one violator a group makes them equal.
    violators = torch.arange(0, n_atoms, 8)
    for it in (expected, ours):
        keep = torch.isin(it.candidates, violators, invert=True)
        assert keep.any()
        _, primal = it.advance()
        it.x = it.x * 1.3
        it.objectives = torch.stack([primal, it.dual()], 1) if it.scalars is not None else None
        room = torch.empty(N_TOKENS, n_atoms, dtype=torch.float64)
        swap_candidates(it, primal, 1e-3, room)
    assert (ours.candidates.sort(1).values.diff(dim=1) > 0).all()
    assert (ours.candidates != ours.own[:, None]).all()  # pyright: ignore[reportOptionalSubscript]
    torch.testing.assert_close(ours.x, expected.x, rtol=1e-9, atol=0)
    slopes, _ = all_slopes(ours.atoms, ours.x, ours.own)
    inside = 1 - iterating.PART_OF_GAP * 1e-3 + 1e-6
    outside = slopes.scatter(1, ours.candidates, -1.0)
    assert (outside <= 1).all()
    swapped = (ours.candidates[:, :, None] != expected.candidates[:, None]).all(2).sum()
    assert swapped <= 0.2 * ours.candidates.numel()
    assert (ours.g.abs()[:, : ours.candidates.shape[1]] <= inside).all()
    taken = torch.zeros(N_TOKENS, n_atoms, dtype=torch.uint8).scatter_(1, ours.candidates, 1)
    taken.scatter_(1, ours.own[:, None], 1)  # pyright: ignore[reportOptionalSubscript]
    torch.testing.assert_close(ours.taken, taken)


def test_tokens_that_have_ended_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterating, "_runs_triton", lambda _: True)
    it = iterates(6, 150, affine=True, dtype=torch.float32)
    room = torch.empty(N_TOKENS, 150)
    swap_candidates(it, it.advance()[1], 1e-3, room)  # makes what is made once
    it.open[1] = 0
    names = ("x", "u", "v", "g", "candidates", "taken")
    before = {name: getattr(it, name).clone() for name in names}
    _, primal = it.advance()
    before["x"][1] += (moved := normal(N_TOKENS, 7, seed=3))[1]  # for which other atoms have the largest slopes
    it.x += moved
    swap_candidates(it, primal, 1e-3, room)
    for name, value in before.items():
        assert torch.equal(getattr(it, name)[1], value[1]), name
        assert not any(torch.equal(getattr(it, name)[i], value[i]) for i in (0, 2)), name


@pytest.mark.parametrize(
    ("rank", "n_atoms", "tol", "affine"),
    [(8, 200, 1e-3, True), (8, 200, 1e-5, True), (4, 120, 1e-3, False), (32, 300, 1e-4, True)],
    ids=["fp32", "fp64", "linear", "fp32-fine"],
)
def test_solves(rank: int, n_atoms: int, tol: float, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, tokens = normal(rank, n_atoms), normal(rank, N_TOKENS, seed=1)
    options = SolverOptions(tol=tol, affine=affine)
    expected = self_expression(tokens, options, atoms=atoms)
    monkeypatch.setattr(iterating, "_runs_triton", lambda _: True)
    ours = self_expression(tokens, options, atoms=atoms)
    assert ours.converged
    assert ours.n_iter <= expected.n_iter + 3
    torch.testing.assert_close(ours.to_dense(), expected.to_dense(), rtol=0, atol=10 * tol)


class Operators(TorchDispatchMode):
    """Counts torch's operators, of which each is a launch on a GPU at most, views none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket is not torch.ops.aten.empty:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands in for a kernel, and counts its launches."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, _: Any) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        self.count += 1


def test_launches_of_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels, two selections of the largest, and what the host decides by: below 20."""
    monkeypatch.setattr(iterating, "_runs_triton", lambda _: True)
    launches = Launches()
    it = iterates(4, 120, affine=True, dtype=torch.float32)
    room = torch.empty(N_TOKENS, 120)
    swap_candidates(it, it.advance()[1], 1e-3, room)  # makes what is made once
    monkeypatch.setattr(newton_kernel, "newton_kernel", launches)
    monkeypatch.setattr(slopes_kernel, "slopes_kernel", launches)
    monkeypatch.setattr(slopes_kernel, "swap_kernel", launches)
    with Operators() as operators:
        _, primal = it.advance()
        swap_candidates(it, primal, 1e-3, room)
    assert launches.count == 3
    assert operators.count + launches.count < 20, operators.count


COMPILE = """
import json, sys, torch
from videoanchor_triton.anchor import newton_kernel, slopes_kernel
from videoanchor_triton.anchor.atoms import Atoms
from videoanchor_triton.anchor.memory import candidate_atoms
from videoanchor_triton.anchor.problem import Problem
from videoanchor_triton.kernels.aot import compiling
from videoanchor_triton.kernels.compiled import report
for target, name, rank, dtype in json.loads(sys.argv[1]):
    problem = Problem.of(torch.randn(rank, 1024), affine=True, alpha_e=800.0, alpha_z=800.0)
    atoms = Atoms.of(problem, getattr(torch, dtype))
    k = candidate_atoms(rank + 1, 1024)
    candidates, x = torch.zeros(8, k, dtype=torch.int64), torch.zeros(8, rank + 1, dtype=torch.float64)
    state = [torch.zeros(8, k + rank, dtype=torch.float64) for _ in range(3)]
    numbers, open_ = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.uint8)
    with compiling(target, name) as compiled:
        if name == "newton_kernel":
            newton_kernel.newton_step(atoms, open_, candidates, x, x.clone(), *state, numbers)
        else:
            taken, pairs = torch.zeros(8, 1024, dtype=torch.uint8), torch.zeros(8, 2, dtype=torch.float64)
            weights = torch.zeros(8, k, dtype=torch.float64)
            slopes_kernel.take_in_violators(
                *(atoms, open_, candidates, taken, x, *state, weights, pairs, numbers),
                n_swaps=rank // 2,
                tf32=dtype == "float32",
            )
    used = report(name, target, rank, dtype, compiled[0])
    print(json.dumps([used.shared <= used.limit, used.tensor_core, used.spills]))
"""
COMPILED = [
    *((target, "newton_kernel", 16, "float32") for target in TARGETS),
    *((target, name, 64, "float32") for target in TARGETS for name in ("slopes_kernel", "swap_kernel")),
    *(("sm_90", "newton_kernel", rank, dtype) for rank, dtype in ((64, "float32"), (16, "float64"))),
    ("sm_90", "slopes_kernel", 64, "float64"),
]


def test_compile_for_every_target() -> None:
    """From another process: the interpreter, which this one may run under, replaces the compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, json.dumps(COMPILED)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(found) == len(COMPILED)
    for case, line in zip(COMPILED, found, strict=True):
        fits, tensor_core, spills = json.loads(line)
        assert fits, case
        assert spills <= 8, (case, spills)  # none that matter inside loops
        if case[0].startswith("sm_"):  # TF32 of slopes alone; AMD's matrix cores multiply whole float32
            assert (tensor_core > 0) == (case[1] == "slopes_kernel" and case[3] == "float32"), case
