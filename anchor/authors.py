"""Self-expression, labels and score as the authors' code computes them, for `VideoAnchorConfig.reproduce`."""

import warnings

import numpy as np
import torch
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .memory import check_fits
from .options import SolverOptions
from .problem import Problem
from .solver import SelfExpression

SCORE_EPS = 1e-5
RHO, TOL, MAX_ITER = 300.0, 2e-4, 10_000  # published
STATES = 10  # N x N float64 arrays that are held at a time, the caller's dense W among them


def authors_self_expression(Y: Tensor, options: SolverOptions) -> SelfExpression:
    """The authors' ADMM in float64 with their penalty and their stopping rule, over all tokens at once.

    Their iterates need the inverse of rho I + F'F, N x N. By the Woodbury identity it follows from that of F F' + rho
    I, p x p. The splitting variable C and its multiplier are both functions of one state V: C = shrink(V, 1/rho)
    without the diagonal, multiplier rho (V - C). They stop when max_i sum_j |A_ij - C_ij| < 2e-4, with A and C the two
    copies of W, at some distance from the optimum.

    Args:
        Y: (r, N) floating-point tensor, one token a column.
        options: of which affine, alpha_e, alpha_z and memory_budget are used.

    Returns:
        All N coefficients of each token; its gap is not known: 0 if their rule was met, infinite if not.

    Raises:
        MemoryError: before anything is computed, if N x N arrays do not fit.

    Warns:
        ConvergenceWarning: their rule was not met in 10,000 iterations.
    """
    n_tokens, device = Y.shape[1], Y.device
    check_authors_memory(n_tokens, device, options.memory_budget)
    everything = torch.arange(n_tokens, device=device).expand(n_tokens, -1)
    gap = torch.zeros(n_tokens, dtype=torch.float64, device=device)
    if n_tokens < 2 or bool((Y[:, :1] == Y).all()):
        return SelfExpression(
            everything, torch.zeros_like(everything, dtype=torch.float64), gap, 0, torch.inf, n_tokens
        )
    problem = Problem.of(Y, affine=options.affine, alpha_e=options.alpha_e, alpha_z=options.alpha_z)
    row = problem.atoms.new_full((int(options.affine), n_tokens), RHO**0.5)
    factor, rank = torch.cat([problem.atoms, row]), len(problem.atoms)
    gram = factor @ factor.T
    inverse = torch.linalg.inv(gram + RHO * torch.eye(len(gram), dtype=gram.dtype, device=device))
    offset, state = torch.zeros_like(factor), torch.zeros(n_tokens, n_tokens, dtype=gram.dtype, device=device)
    coefficients, multiplier, n_iter = torch.zeros_like(state), torch.zeros_like(state), 0
    for n_iter in range(1, MAX_ITER + 1):  # noqa: B007
        expressed = factor @ (2 * coefficients - state)
        step = inverse @ (factor - offset - expressed)
        misfit = factor - expressed - gram @ step
        offset[:rank] = misfit[:rank] - misfit[:rank].clamp(-problem.error_bound, problem.error_bound)
        offset[rank:] -= misfit[rank:]
        state = coefficients + factor.T @ step
        coefficients = state - state.clamp(-1 / RHO, 1 / RHO)
        coefficients.fill_diagonal_(0)
        previous, multiplier = multiplier, state - coefficients
        if float((multiplier - previous).abs_().sum(1).amax()) < TOL:
            break
    else:
        gap.fill_(torch.inf)
        message = (
            f"the authors' stopping rule was not met within {MAX_ITER:,} iterations; use other settings than theirs"
        )
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return SelfExpression(everything, coefficients.T.contiguous(), gap, n_iter, torch.inf, n_tokens)


def authors_memory_bytes(n_tokens: int) -> int:
    """Memory in bytes of `authors_self_expression` and of what follows it."""
    return STATES * 8 * n_tokens**2


def check_authors_memory(n_tokens: int, device: torch.device, budget: int | None) -> None:
    """Raises a MemoryError where they are more than `budget`, or than half of what is free."""
    check_fits(authors_memory_bytes(n_tokens), f"the authors' self-expression of {n_tokens} tokens", device, budget)


def authors_labels(coefficients: Tensor, n_clusters: int, random_state: int) -> Tensor:
    """scikit-learn's spectral clustering of |W| + |W|', their one unseeded step seeded.

    Args:
        coefficients: (N, N) W.
        n_clusters: at most N.
        random_state: seed.

    Returns:
        (N,) int64 labels on the device of `coefficients`.
    """
    weights = coefficients.abs()
    clustering = SpectralClustering(
        n_clusters=n_clusters, affinity="precomputed", assign_labels="discretize", random_state=random_state
    )
    labels = clustering.fit_predict((weights + weights.T).cpu().numpy())
    return torch.from_numpy(labels.astype(np.int64)).to(coefficients.device)


def authors_score(coefficients: Tensor, labels: Tensor) -> Tensor:
    """The shared-expression score with their rounding: row sums of W in bfloat16, 1e-5 in the denominator, the score in
    bfloat16.

    Args:
        coefficients: (N, N) W.
        labels: (N,) int64.

    Returns:
        (N,) float32 holding bfloat16 values.
    """
    share = torch.bincount(labels) / len(labels)
    score = coefficients.bfloat16().sum(-1) * share[labels]
    lowest = score.amin()
    return ((score - lowest) / (score.amax() - lowest + SCORE_EPS)).bfloat16().float()
