"""Yardsticks of the self-expression that share no code with the package: the certified optimum, the textbook ADMM."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path

PUBLISHED_RHO = 300.0
# Weight of the constraint sum(c) = 1 as a row of the least squares: the larger, the closer to 1, and the less precise.
SUM_WEIGHT = 1e3


@dataclass(frozen=True)
class Problem:
    """The self-expression of the columns of Y (r, N), float64. With y = Y[:, j], for each token j:

    min |c|_1 + lambda_e |e|_1 + lambda_z / 2 |y - Y c - e|^2,   c_j = 0,   and sum(c) = 1 if affine.
    """

    Y: np.ndarray
    lambda_e: float
    lambda_z: float
    affine: bool


@dataclass(frozen=True)
class Optimum:
    """Bounds of the optimal objective of n tokens: lower (n,) and upper (n,), float64."""

    tokens: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @property
    def gap(self) -> float:
        """The largest (upper - lower) / upper."""
        return float(((self.upper - self.lower) / self.upper).max())


def certified_optimum(problem: Problem, tokens: np.ndarray) -> Optimum:
    """The optimum of some tokens by the LARS path of scikit-learn, float64, with proof: weak duality.

    The path is exact but for SUM_WEIGHT. The upper bound is the objective of its end, the lower one the dual value of
    its residual; both hold whatever the path did. The error e is a combination of further atoms, I / lambda_e.
    """
    rank, n_tokens = problem.Y.shape
    root = problem.lambda_z**0.5
    atoms = root * np.hstack([problem.Y, np.eye(rank) / problem.lambda_e])
    if problem.affine:
        atoms = np.vstack([atoms, SUM_WEIGHT * (np.arange(n_tokens + rank) < n_tokens)])
    lower, upper = np.empty(len(tokens)), np.empty(len(tokens))
    for i, token in enumerate(tokens):
        others = np.delete(atoms, token, axis=1)
        target = atoms[:, token]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the bounds tell how good the end of the path is
            end: Any = 1 / len(target)
            _, _, weights = lars_path(others, target, alpha_min=end, method="lasso", return_path=False)
        nu = root * (target - others @ weights)[:rank]
        coefficients = np.insert(weights[: n_tokens - 1], token, 0.0)
        lower[i] = _dual_value(problem, token, nu)
        upper[i] = objectives(problem, coefficients[:, None], np.array([token]))[0]
    return Optimum(tokens, lower, upper)


def objectives(problem: Problem, C: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The objective (n,) of coefficients C (N, n) of some tokens at the best e; if affine, of C divided by its sums.

    Infinite where affine coefficients do not have a positive sum, or do not leave out the token itself.
    """
    sums = C.sum(0) if problem.affine else np.ones(C.shape[1])
    possible = (sums > 0) & (C[tokens, np.arange(len(tokens))] == 0)
    C = C / np.where(sums > 0, sums, 1.0)
    residual = problem.Y[:, tokens] - problem.Y @ C
    bound = problem.lambda_e / problem.lambda_z
    fit = np.clip(residual, -bound, bound)
    error = np.abs(residual - fit).sum(0)
    values = np.abs(C).sum(0) + problem.lambda_e * error + problem.lambda_z / 2 * (fit**2).sum(0)
    return np.where(possible, values, np.inf)


def _dual_value(problem: Problem, token: int, nu: np.ndarray) -> float:
    """The largest dual value of a feasible multiple s nu, s >= 0, a lower bound of the optimum for any nu (r,):

    s <y, nu> - s^2 |nu|^2 / (2 lambda_z) + mu,   |s y_i' nu + mu| <= 1 for all i but j,   s |nu|_inf <= lambda_e.
    """
    slopes = np.delete(problem.Y.T @ nu, token)
    linear, constant, spread = problem.Y[:, token] @ nu, 0.0, np.abs(slopes).max()
    if problem.affine:  # mu is free: 1 - s max(slopes), the largest that is allowed
        linear, constant, spread = linear - slopes.max(), 1.0, np.ptp(slopes) / 2
    most = 1 / max(spread, np.abs(nu).max() / problem.lambda_e, 1e-300)
    square = nu @ nu / problem.lambda_z
    scale = min(max(linear, 0.0) / max(square, 1e-300), most)
    return float(constant + scale * linear - scale**2 * square / 2)


def textbook_iterates(
    problem: Problem, factorised: bool, tokens: np.ndarray | None = None, xp: Any = np, linalg: Any = scipy.linalg
) -> Iterator[Any]:
    """C (N, n) of n tokens (None: all) after each iteration of the authors' ADMM with the published penalty.

    Every iteration solves an N x N system with n right sides, as the authors' code does (Elhamifar and Vidal, 2013);
    `factorised` reuses one LU factorisation. CuPy and cupyx.scipy.linalg as `xp` and `linalg` run it on a GPU.
    """
    Y, lambda_z, rho = xp.asarray(problem.Y), problem.lambda_z, PUBLISHED_RHO
    bound = problem.lambda_e / lambda_z
    n_tokens = Y.shape[1]
    own = xp.arange(n_tokens) if tokens is None else xp.asarray(tokens)
    target = Y[:, own]
    system = lambda_z * (Y.T @ Y) + (rho if problem.affine else 0.0) + rho * xp.eye(n_tokens)
    factors = linalg.lu_factor(system) if factorised else None
    C, E = xp.zeros((n_tokens, len(own))), xp.zeros_like(target)
    multiplier, sum_multiplier = xp.zeros_like(C), xp.zeros(len(own))
    while True:
        right = lambda_z * (Y.T @ (target - E)) + rho * C - multiplier
        if problem.affine:
            right += rho - sum_multiplier
        A = xp.linalg.solve(system, right) if factors is None else linalg.lu_solve(factors, right)
        C = A + multiplier / rho
        C -= xp.clip(C, -1 / rho, 1 / rho)
        C[own, xp.arange(len(own))] = 0
        misfit = target - Y @ A
        E = misfit - xp.clip(misfit, -bound, bound)
        multiplier += rho * (A - C)
        if problem.affine:
            sum_multiplier += rho * (A.sum(0) - 1)
        yield C
