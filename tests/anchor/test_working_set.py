"""Working sets end at the optimum over all atoms, whatever their candidates were, and never claim more than they know.

The candidates are made few (3 times the rank), so that most atoms of these small problems are outside.
"""

import importlib
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.datasets import load_sample_image

from videoanchor_triton.anchor import memory, working_set
from videoanchor_triton.anchor.admm import Dictionary
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import Problem, token_features
from videoanchor_triton.anchor.solver import SelfExpression, self_expression

from .reference import objective, textbook_weights
from .test_solver import PeakMemory
from .tokens import DEVICES, planted_subspaces, vit_like

ssc_reference: Any = importlib.import_module("benchmarks.scores.helpers.reference")

RANK, N_TOKENS = 16, 151
TOLERANCE = 1e-3
CERTIFIED = 1e-7


@cache
def features(kind: str) -> torch.Tensor:
    if kind == "vit":
        tokens = vit_like(4, 38)
    elif kind == "subspaces":
        tokens, _ = planted_subspaces(8, 19, 3, noise=0.5)
    else:
        pytest.importorskip("PIL")
        pixels = load_sample_image("china.jpg")[:180, :240].astype(np.float32)
        patches = pixels.reshape(12, 15, 16, 15, 3).swapaxes(1, 2).reshape(192, -1)
        tokens = torch.from_numpy(patches)
    return token_features(tokens[:N_TOKENS], RANK)


@cache
def reference(kind: str, affine: bool, alpha_e: float) -> tuple[Any, np.ndarray, np.ndarray]:
    """The problem, tokens of it whose optimum is certified, and the lower bounds of their objectives.

    Left out are tokens inside the convex hull of others, which have no unique optimum for the reference to follow.
    """
    Y = features(kind).numpy()
    problem = ssc_reference.Problem(Y, *textbook_weights(Y, alpha_e, 800.0), affine)
    optimum = ssc_reference.certified_optimum(problem, np.arange(0, N_TOKENS, 3))
    certified = optimum.upper - optimum.lower < CERTIFIED * optimum.upper
    assert certified.mean() > 0.5
    return problem, optimum.tokens[certified], optimum.lower[certified]


def check_gaps(found: SelfExpression, kind: str, affine: bool = True, alpha_e: float = 800.0) -> None:
    """No token is farther above its optimum than its gap says."""
    problem, checked, lower = reference(kind, affine, alpha_e)
    C, gaps = found.to_dense().double().cpu().numpy(), found.gap.cpu().numpy()[checked]
    assert np.count_nonzero(C.diagonal()) == 0
    above = 1 - lower / ssc_reference.objectives(problem, C[:, checked], checked)
    assert above.min() >= -CERTIFIED
    known = np.isfinite(gaps)
    assert known.any()
    assert (above[known] <= gaps[known] + 1e-6).all()


class Calls:
    """Tokens that were brought to new candidates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sets = 0
        over = working_set._WorkingSets.over

        def count_sets(sets: Any, candidates: torch.Tensor) -> Dictionary:
            self.sets += len(candidates)
            return over(sets, candidates)

        monkeypatch.setattr(working_set._WorkingSets, "over", count_sets)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FEWEST_CANDIDATES", 0)
    monkeypatch.setattr(memory, "FEWEST_FOR_PRODUCTS", 40)
    monkeypatch.setattr(memory, "CPU_CACHE_BYTES", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def solve(Y: torch.Tensor, dtype: torch.dtype = torch.float64, progress: Any = None, **options: Any) -> SelfExpression:
    options = {"algorithm": "working-set", "tol": TOLERANCE} | options
    return self_expression(Y, SolverOptions(**options), dtype=dtype, progress=progress)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha_e", [800.0, 30.0], ids=["no-error", "error"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize("kind", ["vit", "photograph", "subspaces"])
def test_few_candidates_reach_the_optimum_over_all_atoms(
    kind: str, affine: bool, alpha_e: float, dtype: torch.dtype, device: str, calls: Calls
) -> None:
    found = solve(features(kind).to(device), dtype, affine=affine, alpha_e=alpha_e)
    assert found.converged
    assert calls.sets >= N_TOKENS
    check_gaps(found, kind, affine, alpha_e)


def test_candidates_that_miss_the_support_are_changed(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Without iterations over all atoms every state is 0, and the first candidates are any."""
    monkeypatch.setattr(working_set, "SEED_ITERATIONS", 0)
    found = solve(features("vit"))
    assert calls.sets > 2 * N_TOKENS
    assert found.converged
    check_gaps(found, "vit")


def test_active_candidates_stay_and_violating_atoms_start_at_zero() -> None:
    """Even where every atom outside violates the conditions far more than a small coefficient shows in the state."""
    problem = Problem.of(features("vit"), affine=True, alpha_e=800.0, alpha_z=800.0)
    sets = working_set._WorkingSets.of(problem, SolverOptions(), problem.atoms.T.contiguous(), torch.float64)
    own = torch.arange(0, N_TOKENS, 7)
    work = torch.empty(len(own), N_TOKENS, dtype=torch.float64)
    pool = sets.first_candidates(own, work)
    for _ in range(300):
        pool.admm.advance()
    rows = torch.arange(1, len(own))
    pool.admm.step *= 1e6
    slopes = pool.slopes(sets.everything, rows, work)
    assert ((slopes > 1 / sets.everything.rho).sum(1) >= N_TOKENS - 10).all()
    there = sets.go_on(pool, rows, *sets.next_candidates(pool, rows, slopes))
    before, after = pool.admm.coefficients(rows), there.admm.coefficients(slice(0, len(rows)))
    for row, token in enumerate(own[1:].tolist()):
        old = dict(zip(pool.candidates[rows[row]].tolist(), before[row].tolist(), strict=True))
        new = dict(zip(there.candidates[row].tolist(), after[row].tolist(), strict=True))
        active = {atom for atom in old if old[atom] != 0}
        assert 0 < len(active) < 2 * (RANK + 1)
        assert active <= new.keys()
        assert len(new.keys() & old.keys()) == 2 * (RANK + 1)  # two thirds
        assert len(new) == 3 * (RANK + 1)
        assert token not in new
        np.testing.assert_allclose([new[atom] - old.get(atom, 0.0) for atom in new], 0.0, atol=1e-12)


@pytest.mark.parametrize("max_iter", [40, 150, 400])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gap_is_true_when_iterations_run_out(dtype: torch.dtype, max_iter: int) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = solve(features("vit"), dtype, max_iter=max_iter, tol=1e-6)
    assert found.n_iter == max_iter
    assert len(warned) == 1
    assert len(found.unconverged) > 0
    check_gaps(found, "vit")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_duplicate_and_zero_tokens(affine: bool) -> None:
    Y = features("vit")[:, :60]
    Y = torch.cat([Y, Y, torch.zeros(RANK, 3), Y[:, :5]], dim=1)
    found = solve(Y, affine=affine, tol=1e-3)
    blocked = solve(Y, affine=affine, tol=1e-3, algorithm="blocked")
    assert found.converged
    weights = textbook_weights(Y[:, :120].numpy(), 800.0, 800.0)
    here, there = (objective(Y.numpy(), each.to_dense().numpy(), *weights) for each in (found, blocked))
    np.testing.assert_allclose(here, there, rtol=2.1e-3, atol=1e-12)


@pytest.mark.parametrize("n_tokens", [2, 3, 17, 33])
def test_fewer_tokens_than_candidates(n_tokens: int) -> None:
    Y = features("subspaces")[:, :n_tokens]
    found, blocked = solve(Y), solve(Y, algorithm="blocked")
    assert found.converged
    weights = textbook_weights(Y.numpy(), 800.0, 800.0)
    here, there = (objective(Y.numpy(), each.to_dense().numpy(), *weights) for each in (found, blocked))
    np.testing.assert_allclose(here, there, rtol=2.1e-3)


@pytest.mark.parametrize("block", [16, 57, 151])
def test_blocks_and_progress_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens are counted once, in whatever portions they come."""
    monkeypatch.setattr(memory, "FEWEST_FOR_PRODUCTS", block)
    counts: list[int] = []
    monkeypatch.setattr("videoanchor_triton.anchor.timing.time.monotonic", iter(range(10_000)).__next__)
    found = solve(features("vit"), torch.float32, lambda _stage, count, _total: counts.append(count))
    assert counts[-1] == N_TOKENS
    assert found.converged
    check_gaps(found, "vit")


def test_blocks_that_are_done_at_once_do_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FEWEST_FOR_PRODUCTS", 16)
    assert solve(features("vit"), tol=0.99).converged


def test_a_second_run_is_the_same_to_the_bit() -> None:
    first, second = (solve(features("vit"), torch.float32) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.gap, second.gap)


def test_what_float32_does_not_resolve_is_solved_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so little noise allowed, the rounding of float32 alone is a larger misfit. Memory is that of float32."""
    solve_in_one_precision, bytes_of_a_column = working_set._WorkingSets.solve, []

    def spy(sets: Any, own: torch.Tensor, found: Any, max_iter: int, block: int, done: Any) -> torch.Tensor:
        bytes_of_a_column.append(sets.everything.factor.dtype.itemsize * block)
        return solve_in_one_precision(sets, own, found, max_iter, block, done)

    monkeypatch.setattr(working_set._WorkingSets, "solve", spy)
    options = {"alpha_z": 1e10, "max_iter": 2500}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, blocked = (
            solve(features("vit"), torch.float32, algorithm=name, **options) for name in ("working-set", "blocked")
        )
    assert bytes_of_a_column == [4 * 40, 8 * 20]
    assert len(blocked.unconverged) == N_TOKENS
    assert len(found.unconverged) < 2 * N_TOKENS // 3
    assert found.values.dtype == torch.float32
    Y = features("vit").numpy()
    problem = ssc_reference.Problem(Y, *textbook_weights(Y, 800.0, options["alpha_z"]), True)
    solved = np.setdiff1d(np.arange(N_TOKENS), found.unconverged.numpy())[::5]
    rows = np.vstack([Y, np.ones(N_TOKENS)])
    for token, value in zip(
        solved, ssc_reference.objectives(problem, found.to_dense().double().numpy()[:, solved], solved), strict=True
    ):
        others = np.delete(rows, token, axis=1)
        exact = linprog(np.ones(2 * others.shape[1]), A_eq=np.hstack([others, -others]), b_eq=rows[:, token])
        assert value <= (1 + TOLERANCE) * exact.fun


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_overflow_of_float64_is_an_error_and_not_a_result(dtype: torch.dtype) -> None:
    with pytest.raises(FloatingPointError, match=r"left the range of float64.*alpha_z=1e\+308"):
        solve(features("vit"), dtype, alpha_z=1e308)
    with pytest.raises(FloatingPointError, match="left the range of float64"):
        solve(torch.full((3, 40), torch.nan), dtype)


def test_memory_grows_with_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens take about twice the memory, which stays within one N x N array in float64."""
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 3_000)
    monkeypatch.setattr(memory, "FEWEST_FOR_PRODUCTS", 16)
    monkeypatch.setattr(working_set, "SEED_ITERATIONS", 4)
    peaks = []
    for n_tokens in (152, 304):
        Y = token_features(vit_like(8, n_tokens // 8), 8)
        with warnings.catch_warnings(), PeakMemory() as used:
            warnings.simplefilter("ignore")
            solve(Y, torch.float32, tol=0.6, max_iter=25)
        peaks.append(used.peak)
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 8 * 304**2
