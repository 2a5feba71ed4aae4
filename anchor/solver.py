"""Sparse self-expression: every token as a sparse combination of the others."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .affinity import affinity_matrix
from .interior_point import Rows, solve
from .memory import plan_solver
from .options import SolverOptions
from .precision import full_precision_products
from .problem import Problem
from .timing import Progress, throttled

# A coefficient below so much of the tolerance, relative to its token's largest, says nothing.
NEGLIGIBLE = 0.25


@dataclass(frozen=True)
class SelfExpression:
    """What `self_expression` found.

    Attributes:
        indices: (n, k) int64; token j is expressed by the atoms indices[j] (tokens, where they express each other) ...
        values: (n, k) float64, ... with these weights. Unused slots hold 0.
        gap: (n,) float64 relative duality gap of each token: how far its objective can lie above the optimum, relative
            to it; 0 is the optimum.
        n_iter: iterations of the slowest token, all starts counted.
        tol: the bound on the gap that was asked for; infinite for the authors' iteration, which has another rule.
        n_atoms: N, how many atoms there were to choose from.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> solution = va.self_expression(torch.randn(4, 12))
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
    n_atoms: int

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
        """(N,) float64 r_i = sum_j W_ij: how much atom i serves to express the tokens (signed)."""
        sums = torch.zeros(self.n_atoms, dtype=torch.float64)
        # on the CPU: atomic additions on a GPU come in any order
        return sums.index_add_(0, self.indices.flatten().cpu(), self.values.flatten().cpu()).to(self.gap.device)

    def affinity(self) -> Tensor:
        """(N, N) sparse float64 `affinity_matrix` of tokens that express each other, on the device of the solution.

        An interior point ends with a little weight on atoms that have no part in the optimum, half of all links. What
        lies below NEGLIGIBLE tol max|c| of its token is left out: that takes the affinity nearer to the optimum's. The
        heavier half of the slots always stays, more than an optimum needs: where copies of a token take all its weight,
        as in a video that stands still, the rest still says which tokens are its kin.

        Raises:
            ValueError: the tokens are expressed by atoms of another number, or a coefficient is not finite.
        """
        if self.n_atoms != len(self.values):
            raise ValueError(
                f"an affinity is of tokens that express each other, got {len(self.values)} tokens over {self.n_atoms} "
                "atoms: use coefficient_matrix"
            )
        size, n_slots = self.values.abs(), self.values.shape[1]
        if n_slots < 2 or not math.isfinite(self.tol):
            return affinity_matrix(self.indices, self.values)
        negligible = NEGLIGIBLE * self.tol * size.amax(1, keepdim=True)
        least = negligible.minimum(size.kthvalue(n_slots // 2 + 1, dim=1, keepdim=True).values)
        return affinity_matrix(self.indices, size.where(~(size < least), 0.0))

    def to_dense(self) -> Tensor:
        """(N, n) coefficients W; W[:, j] expresses token j."""
        return self.values.new_zeros(len(self.gap), self.n_atoms).scatter_add_(1, self.indices, self.values).T


def self_expression(
    Y: Tensor,
    options: SolverOptions | None = None,
    *,
    atoms: Tensor | None = None,
    progress: Progress | None = None,
) -> SelfExpression:
    """Express every token by the others, or by given atoms (VideoAnchor, arXiv 2509.25151; solved by interior point).

    Minimises, for each token j on its own,

        |c|_1 + lambda_e |e|_1 + lambda_z / 2 |y_j - Y c - e|^2,   c_j = 0,   and sum(c) = 1 if affine.

    If all tokens are equal, or there is only one, nothing can be told apart: all coefficients are zero. Where the
    optimum is not unique (a token in the hull of others, in few dimensions), the one that is found is made of near
    atoms and depends on the tokens alone, see docs/mathematics.md.

    Args:
        Y: (r, n) floating-point tensor, one token a column. r may be 0.
        options: problem and solver settings; None: the published ones.
        atoms: (r, N) floating-point tensor, N >= 1: tokens Y are expressed by these, with the weights lambda of these.
        progress: called as progress("solve", tokens done, n) at most four times a second.

    Raises:
        ValueError: Y is not 2-D, or atoms are not (r, N).
        MemoryError: the budget, or the device, does not hold what the solver needs.

    Warns:
        ConvergenceWarning: some tokens, which it names, did not come within options.tol.

    See Also:
        SparseSubspaceClustering: the estimator over this and a spectral step.
        anchor_scores: scores tokens by what they serve each other.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> Y = torch.randn(4, 12)  # 12 tokens of 4 features
        >>> W = va.self_expression(Y).to_dense()
        >>> W.shape
        torch.Size([12, 12])
        >>> bool(W.diagonal().any())  # no token expresses itself
        False
        >>> torch.allclose(W.sum(0), torch.ones(12, dtype=W.dtype))  # affine
        True
    """
    options = options or SolverOptions()
    if Y.ndim != 2:
        raise ValueError(f"Y must be 2-D, (rank, n_tokens), got shape {tuple(Y.shape)}")
    dictionary = Y if atoms is None else atoms
    if dictionary.ndim != 2 or len(dictionary) != len(Y) or (atoms is not None and dictionary.shape[1] == 0):
        raise ValueError(f"atoms must have shape ({len(Y)}, n_atoms), n_atoms >= 1, got {tuple(dictionary.shape)}")
    (rank, n_tokens), n_atoms = Y.shape, dictionary.shape[1]
    plan = plan_solver(n_tokens, n_atoms, rank, Y.device, options.memory_budget)
    if n_tokens == 0 or (atoms is None and bool((Y[:, :1] == Y).all())):
        rows = Rows.empty(n_tokens, min(n_tokens, 1), Y.device)
        rows.gap.zero_()
    else:
        with torch.no_grad(), full_precision_products(Y.device):
            problem = Problem.of(dictionary, affine=options.affine, alpha_e=options.alpha_e, alpha_z=options.alpha_z)
            tokens = None if atoms is None else problem.unit * Y.double()
            rows = solve(problem, tokens, tol=options.tol, plan=plan, done=_counter(progress, n_tokens))
    n_iter = int(rows.n_iter.amax()) if n_tokens else 0
    solution = SelfExpression(rows.indices, rows.values, rows.gap, n_iter, options.tol, n_atoms)
    missed = solution.unconverged
    if len(missed):
        named = ", ".join(map(str, missed[:10].tolist())) + (", ..." if len(missed) > 10 else "")
        warnings.warn(
            f"{len(missed)} of {n_tokens} tokens did not come within tol={options.tol:.2g} of their optimum: the "
            f"largest relative duality gap is {solution.residual:.2g}; raise tol. Tokens {named}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return solution


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Adds up tokens that are done, and reports them."""
    report, count = throttled(progress), 0

    def add(more: int) -> None:
        nonlocal count
        count += more
        report("solve", count, total)

    return add
