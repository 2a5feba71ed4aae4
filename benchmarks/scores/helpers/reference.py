"""A yardstick of the self-expression that shares no code with the package: the certified optimum."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path

# Weight of the constraint sum(c) = 1 as a row of the least squares: the larger, the closer to 1, and the less precise.
SUM_WEIGHT = 1e3
ALPHA = 800.0  # published
BLOCK = 128  # tokens at a time


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
        lower[i] = max(_dual_value(problem, token, nu), float(problem.affine))  # sum(c) = 1 means |c|_1 >= 1
        upper[i] = objectives(problem, np.arange(n_tokens)[None], coefficients[None], np.array([token]))[0]
    return Optimum(tokens, lower, upper)


def published_problem(Y: np.ndarray, affine: bool = True) -> Problem:
    """The problem of Y (r, N) with the published weights 800 / mu_e and 800 / mu_z by their definition."""
    norms, least = np.sort(np.abs(Y).sum(0)), np.inf
    for start in range(0, Y.shape[1], BLOCK):
        products = np.abs(Y[:, start : start + BLOCK].T @ Y)
        np.fill_diagonal(products[:, start:], 0)
        least = min(least, products.max(1).min())
    return Problem(Y, ALPHA / norms[-2], ALPHA / least, affine)


def objectives(problem: Problem, indices: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The objective (n,) of tokens (n,) with coefficients values (n, k) of atoms indices (n, k) at the best e; if
    affine, of the coefficients divided by their sums.

    An atom may stand in several slots. Infinite where affine coefficients do not have a positive sum, or do not leave
    out the token itself.
    """
    found = [_objectives(problem, *(x[i : i + BLOCK] for x in (indices, values, tokens))) for i in _blocks(tokens)]
    return np.concatenate(found)


def _blocks(tokens: np.ndarray) -> range:
    return range(0, len(tokens), BLOCK)


def _objectives(problem: Problem, indices: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    sums = values.sum(1) if problem.affine else np.ones(len(tokens))
    possible = (sums > 0) & ~((indices == tokens[:, None]) & (values != 0)).any(1)
    values = values / np.where(sums > 0, sums, 1.0)[:, None]
    residual = problem.Y.T[tokens] - np.einsum("nk,nkr->nr", values, problem.Y.T[indices])
    bound = problem.lambda_e / problem.lambda_z
    fit = np.clip(residual, -bound, bound)
    error = np.abs(residual - fit).sum(1)
    objective = np.abs(values).sum(1) + problem.lambda_e * error + problem.lambda_z / 2 * (fit**2).sum(1)
    return np.where(possible, objective, np.inf)


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
