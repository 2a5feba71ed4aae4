"""Sparse self-expression by ADMM: every token as a sparse combination of the others."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .memory import check_dense_memory, chunk_rows
from .precision import full_precision_products
from .problem import penalty_weights
from .validation import check_choice, check_integer, check_number

Progress = Callable[[str, int, int], None]

CHECK_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Settings of the self-expression problem and of its solver.

    The published ones are rho=300, relaxation=1, tol=2e-4, max_iter=10_000, on another residual than this one; they
    lead to the same optimum in many more iterations.

    Attributes:
        affine: the coefficients of a token sum to 1.
        alpha_e: the weight of the L1 error is alpha_e / mu_e (see `penalty_weights`).
        alpha_z: the weight of the squared residual is alpha_z / mu_z.
        rho: ADMM penalty.
        relaxation: ADMM over-relaxation, between 0 and 2; 1 is plain ADMM.
        max_iter: iterations after which the solver gives up with a warning.
        tol: bound on every token's scaled residual (see `self_expression`); 0 runs all of max_iter.
    """

    affine: bool = True
    alpha_e: float = 800.0
    alpha_z: float = 800.0
    rho: float = 20.0
    relaxation: float = 1.8
    max_iter: int = 10_000
    tol: float = 1e-3

    def __post_init__(self) -> None:
        check_choice("affine", self.affine, (True, False))
        check_number("alpha_e", self.alpha_e, low=0)
        check_number("alpha_z", self.alpha_z, low=0)
        check_number("rho", self.rho, low=0)
        check_number("relaxation", self.relaxation, low=0, high=2)
        check_integer("max_iter", self.max_iter, low=1)
        check_number("tol", self.tol, low=0, low_included=True)


@dataclass(frozen=True)
class SelfExpression:
    """What `self_expression` found.

    Attributes:
        coef: (N, N) coefficients; coef[:, j] expresses token j, diagonal 0, most entries exactly 0.
        n_iter: iterations made.
        residual: the largest scaled residual of a token.
        n_unconverged: tokens whose residual is above the tolerance.
    """

    coef: Tensor
    n_iter: int
    residual: float
    n_unconverged: int

    @property
    def converged(self) -> bool:
        return self.n_unconverged == 0


def self_expression(
    Y: Tensor, options: SolverOptions, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> SelfExpression:
    """Express every token by the others (VideoAnchor, arXiv 2509.25151; the authors' ADMM, reformulated).

    Minimises, for each token j on its own,

        |c|_1 + lambda_e |e|_1 + lambda_z / 2 |y_j - Y c - e|^2,   c_j = 0,   and sum(c) = 1 if affine.

    The authors factor an N x N matrix, rho I + F'F with F = [sqrt(lambda_z) Y; sqrt(rho) 1']. By the Woodbury
    identity it is enough to invert the (r+1) x (r+1) matrix rho I + F F', and the splitting variable and its
    multiplier are both functions of one N x N state V: C = offdiag(shrink(V, 1/rho)), multiplier rho (V - C). With
    rho = 300 and relaxation = 1 the iterates are the authors'. An iteration costs two products of N^2 (r+1).

    A token has converged when its primal residual (distance of the two copies of its coefficients, and of their sum
    from 1), relative to the coefficients' norm, and its dual residual (the last change of the coefficients and of
    the error), relative to the multiplier's norm, are both at most `options.tol`.

    If all tokens are equal, or there is only one, nothing can be told apart: all coefficients are zero.

    Args:
        Y: (r, N) floating-point tensor, one token a column. r may be 0.
        options: problem and solver settings.
        dtype: float32 or float64, the precision of the iteration; small factors are always computed in float64.
        progress: called as progress("solve", iterations, max_iter) at most four times a second.

    Raises:
        TypeError: dtype is neither float32 nor float64.
        ValueError: Y is not 2-D.
        MemoryError: the dense arrays do not fit, see `dense_memory_bytes`.
        FloatingPointError: the iteration left the range of dtype.

    Warns:
        ConvergenceWarning: some tokens did not converge within max_iter.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if Y.ndim != 2:
        raise ValueError(f"Y must be 2-D, (rank, n_tokens), got shape {tuple(Y.shape)}")
    rank, n_tokens = Y.shape
    check_dense_memory(n_tokens, rank, dtype, Y.device)
    if n_tokens < 2 or bool((Y[:, :1] == Y).all()):
        return SelfExpression(torch.zeros(n_tokens, n_tokens, dtype=dtype, device=Y.device), 0, 0.0, 0)
    with torch.no_grad(), full_precision_products(Y.device):
        solution = _admm(Y, options, dtype, progress)
    if not math.isfinite(solution.residual):
        raise FloatingPointError(
            f"the self-expression left the range of {dtype} after {solution.n_iter} iterations; use float64 tokens, "
            f"or less extreme alpha_e={options.alpha_e}, alpha_z={options.alpha_z}, rho={options.rho}"
        )
    if not solution.converged:
        warnings.warn(
            f"{solution.n_unconverged} of {n_tokens} tokens did not converge within max_iter={options.max_iter}: the "
            f"largest residual is {solution.residual:.2g}, tol={options.tol:.2g}; raise max_iter or tol",
            ConvergenceWarning,
            stacklevel=2,
        )
    return solution


def _admm(Y: Tensor, options: SolverOptions, dtype: torch.dtype, progress: Progress | None) -> SelfExpression:
    rank, n_tokens = Y.shape
    rho, relaxation = options.rho, options.relaxation
    lambda_e, lambda_z = penalty_weights(Y.double(), options.alpha_e, options.alpha_z)
    # In units of the weighted tokens, sqrt(lambda_z) Y, everything is free of the scale of the input.
    factor = lambda_z**0.5 * Y.double()
    error_bound = lambda_e / lambda_z**0.5
    if options.affine:
        factor = torch.cat([factor, torch.full((1, n_tokens), rho**0.5, dtype=torch.float64, device=Y.device)])
    gram = factor @ factor.T
    inverse = torch.linalg.inv(gram + rho * torch.eye(len(gram), dtype=torch.float64, device=Y.device)).to(dtype)
    factor, gram = factor.to(dtype), gram.to(dtype)
    # One token a row from here on: rows are independent problems. The last column is the affine constraint.
    target = factor.T.clone()
    if options.affine:
        target[:, rank] = rho**0.5
    offset = torch.zeros_like(target)  # the error e, and the constraint's multiplier / sqrt(rho)
    state = torch.zeros(n_tokens, n_tokens, dtype=dtype, device=Y.device)
    reflected = torch.zeros_like(state)  # 2 C - state
    report_at = 0.0
    n_iter, residual, n_unconverged = 0, math.inf, n_tokens
    while n_unconverged and n_iter < options.max_iter:
        n_iter += 1
        check = n_iter % CHECK_EVERY == 0 or n_iter == options.max_iter
        expressed = reflected @ factor.T
        step = (target - offset - expressed) @ inverse
        expressed += step @ gram
        misfit = target - expressed
        new_error = misfit[:, :rank] - misfit[:, :rank].clamp(-error_bound, error_bound)
        error_change = new_error - offset[:, :rank]
        offset[:, :rank] = new_error
        offset[:, rank:] -= relaxation * misfit[:, rank:]
        if not check:
            _advance(state, reflected, step, factor, rho, relaxation, 0)
            continue
        sum_gap = misfit[:, rank:].norm(dim=1) / rho**0.5
        residuals = _advance_and_measure(state, reflected, step, factor, rho, relaxation, sum_gap, error_change)
        n_unconverged = int((residuals > options.tol).sum())
        residual = float(residuals.amax())
        if not math.isfinite(residual):
            break
        if progress is not None and time.monotonic() >= report_at:
            progress("solve", n_iter, options.max_iter)
            report_at = time.monotonic() + 0.25
    coef = reflected.add_(state).mul_(0.5)
    return SelfExpression(coef.T, n_iter, residual, n_unconverged)


def _advance(
    state: Tensor, reflected: Tensor, step: Tensor, factor: Tensor, rho: float, relaxation: float, first: int
) -> None:
    """In place: state += relaxation (C + step F - state), reflected = 2 C - state, for the rows from `first` on."""
    state.lerp_(reflected, relaxation / 2)
    state.addmm_(step, factor, alpha=relaxation)
    torch.clamp(state, -1 / rho, 1 / rho, out=reflected)
    torch.add(state, reflected, alpha=-2, out=reflected)
    reflected.diagonal(offset=first).copy_(state.diagonal(offset=first).neg())


def _advance_and_measure(
    state: Tensor,
    reflected: Tensor,
    step: Tensor,
    factor: Tensor,
    rho: float,
    relaxation: float,
    sum_gap: Tensor,
    error_change: Tensor,
) -> Tensor:
    """`_advance` by blocks of rows, so that the old state need not be kept whole; returns (N,) scaled residuals."""
    residuals = torch.empty_like(sum_gap)
    size = chunk_rows(len(state))
    for first in range(0, len(state), size):
        rows = slice(first, first + size)
        old_state = state[rows].clone()
        old_coef = (old_state + reflected[rows]).mul_(0.5)
        _advance(state[rows], reflected[rows], step[rows], factor, rho, relaxation, first)
        coef = (state[rows] + reflected[rows]).mul_(0.5)
        change = (coef - old_coef).addmm_(error_change[rows], factor[: error_change.shape[1]], alpha=-1 / rho)
        copy = old_coef.add_(state[rows] - old_state, alpha=1 / relaxation)
        # The shrinkage threshold 1/rho keeps tokens without any coefficient from dividing by zero.
        scale = torch.maximum(copy.norm(dim=1), coef.norm(dim=1)).clamp_min(1 / rho)
        primal = torch.hypot(copy.sub_(coef).norm(dim=1), sum_gap[rows]) / scale
        dual = change.norm(dim=1) / (state[rows] - coef).norm(dim=1).clamp_min(1 / rho)
        residuals[rows] = torch.maximum(primal, dual)
    return residuals
