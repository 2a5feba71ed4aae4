"""Independent forms of the self-expression problem, in float64 and with N x N matrices throughout."""

from collections.abc import Iterator

import numpy as np
from scipy.optimize import minimize


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


def objective(Y: np.ndarray, C: np.ndarray, lambda_e: float, lambda_z: float) -> np.ndarray:
    """(N,) objective of each token, at the best error for its coefficients."""
    residual = Y - Y @ C
    error = shrink(residual, lambda_e / lambda_z)
    squares = ((residual - error) ** 2).sum(0)
    return np.abs(C).sum(0) + lambda_e * np.abs(error).sum(0) + lambda_z / 2 * squares


def duality_gap(Y: np.ndarray, C: np.ndarray, lambda_e: float, lambda_z: float, affine: bool) -> np.ndarray:
    """(N,) bound on how far each token's objective lies above the optimum, relative to the objective.

    The optimum has |y_i' nu + mu| <= 1 for nu = lambda_z (y - Y c - e), and positive coefficients have
    y_i' nu + mu = 1, which gives mu. Divided by the violation, nu and mu are feasible for the dual,
    max <y, nu> - |nu|^2 / (2 lambda_z) + mu.
    """
    residual = Y - Y @ C
    nu = lambda_z * np.clip(residual, -lambda_e / lambda_z, lambda_e / lambda_z)
    slope = Y.T @ nu
    np.fill_diagonal(slope, np.nan)
    mu = 1 - np.nanmax(slope, 0) if affine else np.zeros(len(slope))
    violation = np.maximum(1, np.nanmax(np.abs(slope + mu), 0))
    nu, mu = nu / violation, mu / violation
    dual = (Y * nu).sum(0) - (nu**2).sum(0) / (2 * lambda_z) + mu
    primal = objective(Y, C, lambda_e, lambda_z)
    return (primal - dual) / primal


def polish(Y: np.ndarray, C: np.ndarray, lambda_z: float) -> np.ndarray:
    """The affine optimum without error, if the signs of C are those of the optimum: one linear system a token."""
    polished = np.zeros_like(C)
    for token in range(C.shape[1]):
        support = np.flatnonzero(C[:, token])
        atoms, size = Y[:, support], len(support)
        system = np.ones((size + 1, size + 1))
        system[:size, :size] = lambda_z * atoms.T @ atoms
        system[size, size] = 0
        right = np.append(lambda_z * atoms.T @ Y[:, token] - np.sign(C[support, token]), 1)
        polished[support, token] = np.linalg.lstsq(system, right, rcond=None)[0][:size]
    return polished


def optimal_coefficients(
    Y: np.ndarray, token: int, lambda_e: float, lambda_z: float, affine: bool
) -> tuple[np.ndarray, float]:
    """Coefficients (N,) and objective of one token from SciPy's SLSQP, on positive and negative parts of c, e."""
    rank, n_tokens = Y.shape
    others = np.delete(np.arange(n_tokens), token)
    atoms = np.hstack([Y[:, others], -Y[:, others], np.eye(rank), -np.eye(rank)])
    weights = np.concatenate([np.ones(2 * len(others)), np.full(2 * rank, lambda_e)])
    sums = np.concatenate([np.ones(len(others)), -np.ones(len(others)), np.zeros(2 * rank)])

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        residual = Y[:, token] - atoms @ x
        return float(weights @ x + lambda_z / 2 * residual @ residual), weights - lambda_z * atoms.T @ residual

    constraints = [{"type": "eq", "fun": lambda x: sums @ x - 1, "jac": lambda _: sums}] if affine else []
    found = minimize(
        value,
        np.full(len(weights), 0.01),
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * len(weights),
        constraints=constraints,
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    coef = np.zeros(n_tokens)
    coef[others] = found.x[: len(others)] - found.x[len(others) : 2 * len(others)]
    return coef, float(found.fun)
