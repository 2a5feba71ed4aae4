"""Independent forms of the self-expression problem in NumPy, float64; they share no code with the package."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

# The bounds of an optimum are mostly 1e-9 of it apart, and no farther than CERTIFIED; sums are rounded to ROUNDING.
CERTIFIED, ROUNDING = 1e-7, 1e-9
# An optimum of 0 (a zero token, not affine) has no relative gap: gaps are relative to at least this.
SMALLEST = 1e-6


def shrink(values: np.ndarray, bound: float) -> np.ndarray:
    return np.sign(values) * np.maximum(np.abs(values) - bound, 0)


def textbook_weights(Y: np.ndarray, alpha_e: float, alpha_z: float) -> tuple[float, float]:
    """lambda_e and lambda_z by their definition, pair by pair."""
    n_tokens = Y.shape[1]
    norms = np.abs(Y).sum(0)
    mu_e = min(max(norms[j] for j in range(n_tokens) if j != i) for i in range(n_tokens))
    mu_z = min(max(abs(Y[:, i] @ Y[:, j]) for j in range(n_tokens) if j != i) for i in range(n_tokens))
    return alpha_e / float(mu_e), alpha_z / float(mu_z)


def textbook_iterates(
    Y: np.ndarray, lambda_e: float, lambda_z: float, rho: float, affine: bool, n_iter: int, relaxation: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two copies A and C of W after each of n_iter iterations of the authors' ADMM; relaxation 1 is theirs."""
    n_tokens = Y.shape[1]
    ones = np.ones((n_tokens, n_tokens)) if affine else 0.0
    system = lambda_z * Y.T @ Y + rho * np.eye(n_tokens) + rho * ones
    C = np.zeros((n_tokens, n_tokens))
    E = np.zeros_like(Y)
    multiplier, sum_multiplier = np.zeros_like(C), np.zeros(n_tokens)
    for _ in range(n_iter):
        right = lambda_z * Y.T @ (Y - E) + rho * C - multiplier
        if affine:
            right += rho * ones - sum_multiplier
        A = np.linalg.solve(system, right)
        relaxed = relaxation * A + (1 - relaxation) * C
        C = shrink(relaxed + multiplier / rho, 1 / rho)
        np.fill_diagonal(C, 0)
        E = shrink(Y - Y @ A, lambda_e / lambda_z)
        multiplier += rho * (relaxed - C)
        if affine:
            sum_multiplier += relaxation * rho * (A.sum(0) - 1)
        yield A, C


def inverse(H: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Solves with a positive definite matrix, however badly conditioned."""
    root = 1 / np.sqrt(H.diagonal())
    H = H * root * root[:, None]
    try:
        factor = scipy.linalg.cho_factor(H + 1e-15 * np.eye(len(H)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(H)
        return lambda right: root * (vectors @ (vectors.T @ (root * right) / values.clip(1e-15 * values[-1])))
    return lambda right: root * scipy.linalg.cho_solve(factor, root * right)


@dataclass(frozen=True)
class Optimum:
    """Bounds of the optimal objective of one token, both proved, whatever the iteration did."""

    lower: float
    upper: float


def documented_weights(Y: np.ndarray, alpha_e: float, alpha_z: float) -> tuple[float, float]:
    """`textbook_weights`, and what the package documents where those divide by zero."""
    norms, products = np.sort(np.abs(Y).sum(0)), np.abs(Y.T @ Y)
    largest_square = products.diagonal().max()
    np.fill_diagonal(products, 0)
    strongest = products.max(0)
    correlated = strongest[strongest > 1e-10 * largest_square]
    mu_z = correlated.min() if len(correlated) else largest_square
    return alpha_e / (norms[-2] or norms[-1] or 1.0), alpha_z / (mu_z or 1.0)


def objective(Y: np.ndarray, token: int, c: np.ndarray, lambda_e: float, lambda_z: float) -> float:
    """The objective of one token's coefficients c (N,), at the best error for them."""
    residual = Y[:, token] - Y @ c
    fit = np.clip(residual, -lambda_e / lambda_z, lambda_e / lambda_z)
    return float(np.abs(c).sum() + lambda_e * np.abs(residual - fit).sum() + lambda_z / 2 * (fit**2).sum())


def dual_value(F: np.ndarray, target: np.ndarray, nu: np.ndarray, bound: float, affine: bool) -> float:
    """The largest dual value of a multiple s nu, s >= 0: a lower bound of the optimum for any nu (r,).

    max s <t, nu> - s^2 |nu|^2 / 2 + mu,   |s f_i' nu + mu| <= 1,   s |nu|_inf <= bound;   mu = 0 if not affine
    """
    slopes = F.T @ nu
    linear, constant, spread = target @ nu, 0.0, np.abs(slopes).max()
    if affine:  # mu = 1 - s max(slopes), the largest that is allowed
        linear, constant, spread = linear - slopes.max(), 1.0, np.ptp(slopes) / 2
    most = 1 / max(spread, np.abs(nu).max(initial=0) / bound, 1e-300)
    scale = np.clip(linear / max(nu @ nu, 1e-300), 0, most)
    return float(constant + scale * linear - scale**2 * (nu @ nu) / 2)


def optimum(
    Y: np.ndarray, token: int, lambda_e: float, lambda_z: float, affine: bool, tol: float = 1e-9, n_iter: int = 80
) -> Optimum:
    """One token's optimum: Mehrotra's interior point for the dual as a quadratic program, dense and over all atoms.

    min |nu|^2 / 2 - <t, nu> - mu,   G (nu, mu) <= h:   |f_i' nu + mu| <= 1,   |nu| <= bound;   multipliers z = c+, c-
    """
    F, target, bound = lambda_z**0.5 * np.delete(Y, token, 1), lambda_z**0.5 * Y[:, token], lambda_e / lambda_z**0.5
    (r, n), others = F.shape, np.arange(Y.shape[1]) != token
    unit = np.sqrt((F**2).mean(1))  # of each unknown
    unit[unit == 0] = 1
    rows = np.hstack([F.T / unit[:, None].T, np.ones((n, int(affine)))])
    p = rows.shape[1]
    Q, b = np.zeros(p), np.ones(p)
    Q[:r], b[:r] = unit**-2, target / unit
    box = np.eye(p)[:r]
    G, h = np.vstack([rows, -rows, box, -box]), np.concatenate([np.ones(2 * n), np.tile(bound * unit, 2)])
    x, s, z = np.zeros(p), h.copy(), 1 / h
    lower, upper, c = float(affine), np.inf, np.zeros(Y.shape[1])
    for _ in range(n_iter):
        c[others] = z[:n] - z[n : 2 * n]
        if not affine or c.sum() > 0:
            upper = min(upper, objective(Y, token, c / c.sum() if affine else c, lambda_e, lambda_z))
        lower = max(lower, dual_value(F, target, x[:r] / unit, bound, affine))
        if upper <= lower + tol * max(lower, 1e-6):
            break
        solve, mean = inverse((G.T * (z / s)) @ G + np.diag(Q)), s @ z / len(s)
        centred: Any = 0.0
        for _ in range(2):  # predictor and corrector, both towards s z = centred
            dx = solve(b - Q * x - G.T @ (centred / s))
            ds = -G @ dx
            dz = (centred - z * ds) / s - z
            part = min(1.0, 0.99 / max((-ds / s).max(), (-dz / z).max(), 1e-300))
            then = (s + part * ds) @ (z + part * dz) / len(s)
            centred = max(0.0, then / mean) ** 3 * mean - ds * dz
        x, s, z = x + part * dx, s + part * ds, z + part * dz  # pyright: ignore[reportPossiblyUnboundVariable, reportOperatorIssue]
    return Optimum(lower, upper)


def coefficients(found: Any, n_tokens: int | None = None) -> np.ndarray:
    """(n_atoms, n) of a `SelfExpression`, from its indices and values alone."""
    indices, values = found.indices.cpu().numpy(), found.values.cpu().numpy()
    C = np.zeros((len(indices) if n_tokens is None else n_tokens, len(indices)))
    np.add.at(C, (indices, np.arange(len(indices))[:, None].repeat(indices.shape[1], 1)), values)
    return C


def check_claims(
    Y: np.ndarray, C: np.ndarray, gaps: np.ndarray, weights: tuple[float, float], affine: bool, tokens: Iterable[int]
) -> None:
    """Assert that no token's objective is farther above its optimum than its gap says."""
    for token in tokens:
        best = optimum(Y, token, *weights, affine)
        unknown = best.upper - best.lower
        assert unknown <= CERTIFIED * max(best.upper, SMALLEST)
        value = objective(Y, token, C[:, token], *weights)
        assert value >= best.lower - ROUNDING * max(value, SMALLEST)
        assert value - best.lower <= (gaps[token] + ROUNDING) * max(value, SMALLEST) + unknown
