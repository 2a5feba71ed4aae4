"""Sparse self-expression: every token as a sparse combination of the others."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .admm import Dictionary, Rows
from .blocked import solve_as_authors, solve_block
from .host_reads import read
from .memory import kept_coefficients, plan_solver
from .options import Algorithm, SolverOptions
from .precision import full_precision_products
from .problem import Problem
from .timing import Progress, throttled
from .working_set import solve_working_sets


@dataclass(frozen=True)
class SelfExpression:
    """What `self_expression` found.

    Attributes:
        indices: (N, k) int64; token j is expressed by the tokens indices[j] ...
        values: (N, k) ... with these weights. Unused slots hold 0.
        gap: (N,) float64 relative duality gap of each token, see `Admm.relative_gap`; 0 is the optimum.
        n_iter: iterations of the slowest token.
        tol: the bound on the gap that was asked for; infinite for algorithm="authors", which has another rule.
        algorithm: the one that ran.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> solution = va.self_expression(torch.randn(4, 12), va.SolverOptions())
        >>> solution.residual <= solution.tol
        True
        >>> solution.row_sums().shape
        torch.Size([12])
    """

    indices: Tensor
    values: Tensor
    gap: Tensor
    n_iter: int
    tol: float
    algorithm: Algorithm

    @cached_property
    def unconverged(self) -> Tensor:
        """Indices of the tokens above the tolerance; of all, if the authors' rule was not met."""
        return (~(self.gap <= self.tol) | self.gap.isinf()).nonzero()[:, 0]

    @property
    def converged(self) -> bool:
        return len(self.unconverged) == 0

    @cached_property
    def residual(self) -> float:
        """The largest relative duality gap of a token."""
        return float(self.gap.amax()) if len(self.gap) else 0.0

    def row_sums(self) -> Tensor:
        """(N,) float64 r_i = sum_j W_ij: how much token i serves to express the others (signed)."""
        sums = torch.zeros(len(self.gap), dtype=torch.float64)
        # on the CPU: atomic additions on a GPU come in any order
        return sums.index_add_(0, self.indices.flatten().cpu(), self.values.flatten().double().cpu()).to(
            self.gap.device
        )

    def to_dense(self) -> Tensor:
        """(N, N) coefficients W; W[:, j] expresses token j."""
        dense = self.values.new_zeros(len(self.gap), len(self.gap))
        return dense.scatter_add_(1, self.indices, self.values).T


def self_expression(
    Y: Tensor, options: SolverOptions, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> SelfExpression:
    """Express every token by the others (VideoAnchor, arXiv 2509.25151; the authors' ADMM, reformulated).

    Minimises, for each token j on its own,

        |c|_1 + lambda_e |e|_1 + lambda_z / 2 |y_j - Y c - e|^2,   c_j = 0,   and sum(c) = 1 if affine.

    If all tokens are equal, or there is only one, nothing can be told apart: all coefficients are zero.

    Args:
        Y: (r, N) floating-point tensor, one token a column. r may be 0.
        options: problem and solver settings.
        dtype: float32 or float64, the precision of the iteration; small factors and the gap are computed in float64.
            algorithm="authors" always computes in float64.
        progress: called as progress("solve", tokens done, N) at most four times a second.

    Raises:
        TypeError: dtype is neither float32 nor float64.
        ValueError: Y is not 2-D.
        MemoryError: the budget, or the device, does not hold what the algorithm needs.
        FloatingPointError: the iteration left the range of dtype.

    Warns:
        ConvergenceWarning: some tokens, which it names, did not converge within max_iter.

    See Also:
        SparseSubspaceClustering: the estimator over this and a spectral step.
        anchor_scores: scores tokens by what they serve each other.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> Y = torch.randn(4, 12)  # 12 tokens of 4 features
        >>> W = va.self_expression(Y, va.SolverOptions()).to_dense()
        >>> W.shape
        torch.Size([12, 12])
        >>> bool(W.diagonal().any())  # no token expresses itself
        False
        >>> torch.allclose(W.sum(0), torch.ones(12), atol=1e-3)  # affine
        True
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if Y.ndim != 2:
        raise ValueError(f"Y must be 2-D, (rank, n_tokens), got shape {tuple(Y.shape)}")
    rank, n_tokens = Y.shape
    plan = plan_solver(n_tokens, rank, dtype, Y.device, options.algorithm, options.memory_budget)
    if n_tokens < 2 or bool((Y[:, :1] == Y).all()):
        rows = Rows.empty(n_tokens, min(n_tokens, 1), dtype, Y.device)
        rows.gap.zero_()
    else:
        done = _counter(progress, n_tokens)
        with torch.no_grad(), full_precision_products(Y.device):
            problem = Problem.of(Y, affine=options.affine, alpha_e=options.alpha_e, alpha_z=options.alpha_z)
            if plan.algorithm == "authors":
                rows = solve_as_authors(problem, options)
            elif plan.algorithm == "working-set":
                rows = solve_working_sets(problem, options, plan.block, dtype, done)
            else:
                rows = _solve_blocks(problem, options, plan.block, dtype, done)
    tol = math.inf if plan.algorithm == "authors" else options.tol
    used, n_iter = read((rows.values != 0).sum(1).amax(), rows.n_iter.amax()) if n_tokens else (0, 0)
    kept = slice(0, max(1, used))
    solution = SelfExpression(
        rows.indices[:, kept].clone(), rows.values[:, kept].clone(), rows.gap, n_iter, tol, plan.algorithm
    )
    _warn_unconverged(solution, options)
    return solution


def _solve_blocks(
    problem: Problem, options: SolverOptions, block: int, dtype: torch.dtype, done: Callable[[int], None]
) -> Rows:
    rank, n_tokens = problem.atoms.shape
    dictionary = Dictionary.of(problem.atoms, affine=problem.affine, rho=options.penalty(n_tokens), dtype=dtype)
    keep = n_tokens if block == n_tokens else kept_coefficients(rank, n_tokens)
    found = Rows.empty(n_tokens, keep, dtype, problem.atoms.device)
    for own in torch.arange(n_tokens, device=problem.atoms.device).split(block):
        targets = problem.atoms.T[own].to(dtype)
        found[own] = solve_block(problem, dictionary, targets, own, options, keep=keep, done=done)
    return found


def _warn_unconverged(solution: SelfExpression, options: SolverOptions) -> None:
    missed = solution.unconverged
    if len(missed) == 0:
        return
    if solution.algorithm == "authors":
        warnings.warn(
            f"the authors' stopping rule was not met within max_iter={options.max_iter}; raise max_iter",
            ConvergenceWarning,
            stacklevel=3,
        )
        return
    named = ", ".join(map(str, missed[:10].tolist())) + (", ..." if len(missed) > 10 else "")
    warnings.warn(
        f"{len(missed)} of {len(solution.gap)} tokens did not converge within max_iter={options.max_iter}: the "
        f"largest relative duality gap is {solution.residual:.2g}, tol={solution.tol:.2g}; raise max_iter or tol. "
        f"Tokens {named}",
        ConvergenceWarning,
        stacklevel=3,
    )


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Adds up tokens that are done, and reports them."""
    report, count = throttled(progress), 0

    def add(more: int) -> None:
        nonlocal count
        count += more
        report("solve", count, total)

    return add
