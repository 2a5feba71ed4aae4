"""A token's gap is a true bound, at any tolerance: its coefficients are never farther from the optimum than it says."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import penalty_weights, token_features
from videoanchor_triton.anchor.solver import self_expression

from .reference import CERTIFIED, check_claims, coefficients, optimum, textbook_weights
from .tokens import DEVICES, planted_subspaces, vit_like


@dataclass(frozen=True)
class Case:
    """A problem: affine or not, and whether the error term is active, which depends on the alphas."""

    name: str
    affine: bool
    alpha_e: float
    alpha_z: float = 50.0
    rank: int = 12
    tokens: Callable[[], torch.Tensor] = lambda: vit_like(6, 25)
    error_acts: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"affine": self.affine, "alpha_e": self.alpha_e, "alpha_z": self.alpha_z}

    @cache  # noqa: B019
    def features(self) -> torch.Tensor:
        return token_features(self.tokens(), self.rank)

    def weights(self) -> tuple[float, float]:
        return textbook_weights(self.features().numpy(), self.alpha_e, self.alpha_z)


CASES = (
    Case("affine", True, 800.0),
    Case("linear", False, 800.0),
    Case("affine-error", True, 8.0, error_acts=True),
    Case("linear-error", False, 8.0, error_acts=True),
    Case("published", True, 800.0, 800.0, 17),
    Case("hull", True, 800.0, 800.0, 6, lambda: planted_subspaces(4, 40, 3, 40, noise=0.3)[0]),
)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def clarabel_optimum(Y: np.ndarray, token: int, lambda_e: float, lambda_z: float, affine: bool) -> float:
    """The optimal objective of one token from Clarabel, on positive and negative parts of c and e."""
    clarabel: Any = pytest.importorskip("clarabel")
    target, Y, root = Y[:, token], np.delete(Y, token, axis=1), lambda_z**0.5
    rank, n_atoms = Y.shape
    identity = np.eye(rank)
    n_parts = 2 * (n_atoms + rank)
    fit = np.hstack([Y, -Y, identity, -identity, identity / root])  # Y c + e + z / root = y
    right = target
    if affine:
        sums = np.repeat([1.0, -1.0, 0.0, 0.0, 0.0], [n_atoms, n_atoms, rank, rank, rank])
        fit, right = np.vstack([fit, sums]), np.append(right, 1.0)
    constraints = np.vstack([fit, np.eye(n_parts, n_parts + rank) * -1])
    square = scipy.sparse.diags_array(np.repeat([0.0, 1.0], [n_parts, rank])).tocsc()
    cost = np.repeat([1.0, lambda_e, 0.0], [2 * n_atoms, 2 * rank, rank])
    cones = [clarabel.ZeroConeT(len(fit)), clarabel.NonnegativeConeT(n_parts)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    padded = np.append(right, np.zeros(n_parts))
    solver = clarabel.DefaultSolver(square, cost, scipy.sparse.csc_array(constraints), padded, cones, settings)
    solution = solver.solve()
    assert str(solution.status) == "Solved"
    return solution.obj_val


def test_the_reference_is_the_optimum(case: Case) -> None:
    Y, weights = case.features().numpy(), case.weights()
    for token in range(0, Y.shape[1], 29):
        found = optimum(Y, token, *weights, case.affine)
        assert found.upper - found.lower <= CERTIFIED / 10 * found.upper
        assert clarabel_optimum(Y, token, *weights, case.affine) == pytest.approx(found.lower, rel=CERTIFIED)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tol", [0.3, 1e-3, 1e-4, 1e-6])
def test_every_token_is_as_close_to_the_optimum_as_it_claims(
    case: Case, tol: float, dtype: torch.dtype, device: str
) -> None:
    Y = case.features().to(dtype)
    found = self_expression(Y.to(device), SolverOptions(**case.options, tol=tol))
    gaps, C = found.gap.cpu().numpy(), coefficients(found)
    assert found.converged
    assert gaps.min() >= 0
    assert gaps.max() <= tol
    assert np.count_nonzero(C.diagonal()) == 0
    if case.affine:
        np.testing.assert_allclose(C.sum(0), 1, rtol=0, atol=1e-12)
    exact = Y.double().numpy()
    weights = textbook_weights(exact, case.alpha_e, case.alpha_z)
    check_claims(exact, C, gaps, weights, case.affine, range(0, len(gaps), 5))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize("rank", [6, 17])
def test_tokens_over_atoms_that_they_are_not_among(rank: int, affine: bool) -> None:
    """The weights of the penalties are those of the atoms."""
    Y = token_features(vit_like(8, 25), rank)
    atoms, tokens = Y[:, :150].contiguous(), Y[:, 150:].contiguous()
    found = self_expression(tokens, SolverOptions(affine=affine), atoms=atoms)
    gaps, C = found.gap.numpy(), coefficients(found, 150)
    assert (found.n_atoms, found.converged) == (150, True)
    assert gaps.max() <= SolverOptions.tol
    weights = textbook_weights(atoms.numpy(), 800.0, 800.0)
    for i in range(0, 50, 3):
        both = np.hstack([atoms.numpy(), tokens[:, i : i + 1].numpy()])
        padded = np.zeros((151, 151))
        padded[:150, 150] = C[:, i]
        check_claims(both, padded, np.full(151, gaps[i]), weights, affine, [150])


def test_an_atom_equal_to_a_token_expresses_it() -> None:
    atoms = token_features(vit_like(8, 25), 17)
    C = self_expression(atoms[:, ::9].contiguous(), SolverOptions(), atoms=atoms).to_dense()
    assert C.shape == (200, 23)
    assert (C[torch.arange(0, 200, 9), torch.arange(23)] > 0.9).all()


def test_the_error_term_acts_where_it_should(case: Case) -> None:
    """Else the cases named after it would test nothing."""
    Y, (lambda_e, lambda_z) = case.features().numpy(), case.weights()
    residual = Y - Y @ coefficients(self_expression(case.features(), SolverOptions(**case.options)))
    acts = np.abs(residual) > 1.01 * lambda_e / lambda_z
    assert acts.any() == case.error_acts


def test_weights_of_the_penalties_are_the_published_ones(case: Case) -> None:
    np.testing.assert_allclose(penalty_weights(case.features(), case.alpha_e, case.alpha_z), case.weights(), rtol=1e-12)


@pytest.mark.parametrize("false", ["gap", "coefficients"])
def test_a_claim_that_is_not_true_is_found(false: str, case: Case) -> None:
    """What the other tests rely on: half of a gap, or coefficients that are somewhat worse, are told apart."""
    Y = case.features().numpy()
    found = self_expression(case.features(), SolverOptions(**case.options, tol=1e-3))
    gaps, C = found.gap.numpy(), coefficients(found)
    if false == "gap":
        gaps = gaps / 1e4
    else:
        C = 0.8 * C + 0.2 * np.roll(C, 1, 0) * (1 - np.eye(len(C)))
    with pytest.raises(AssertionError):
        check_claims(Y, C, gaps, case.weights(), case.affine, range(0, len(gaps), 5))
