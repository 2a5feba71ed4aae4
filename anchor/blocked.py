"""The self-expression by blocks of tokens, and as one block the authors' own way."""

from collections.abc import Callable

import torch
from torch import Tensor

from .admm import Admm, Dictionary, Rows
from .host_reads import places, read
from .options import SolverOptions
from .problem import Problem

CHECK_EVERY = 20
AUTHORS_RHO, AUTHORS_TOL = 300.0, 2e-4  # published


def solve_block(
    problem: Problem,
    dictionary: Dictionary,
    targets: Tensor,
    own: Tensor,
    options: SolverOptions,
    *,
    keep: int,
    done: Callable[[int], None] | None = None,
) -> Rows:
    """Iterate b tokens until each is within options.tol of its optimum; converged ones leave the iteration early.

    Args:
        problem: gives the error bound.
        dictionary: the atoms.
        targets: (b, r) weighted tokens, in the dictionary's dtype.
        own: (b,) atom that is the token itself.
        options: tolerance and iterations.
        keep: coefficients to keep of a token, see `kept_coefficients`.
        done: called with the number of tokens that have left since the last call.

    Raises:
        FloatingPointError: the iteration left the range of the dtype.
    """
    admm = Admm(dictionary, targets, own, error_bound=problem.error_bound, relaxation=options.relaxation)
    found = Rows.empty(len(targets), keep, targets.dtype, targets.device)
    token = torch.arange(len(targets), device=targets.device)  # of each row that is still iterated
    waiting = torch.ones_like(token, dtype=torch.bool)
    n_iter, n_waiting = 0, len(waiting)
    while n_waiting:
        for _ in range(min(CHECK_EVERY, options.max_iter - n_iter)):
            admm.advance()
            n_iter += 1
        last = n_iter >= options.max_iter
        ready = waiting & (last | (admm.gaps() <= options.tol))
        finite, n_ready = read(torch.isfinite(admm.step).all(), ready.sum())
        if not finite:
            raise FloatingPointError(
                f"the self-expression left the range of {targets.dtype} after {n_iter} iterations; use float64 "
                f"tokens, or less extreme alpha_e={options.alpha_e}, alpha_z={options.alpha_z}, rho={dictionary.rho}"
            )
        if n_ready == 0:
            continue
        candidates = places(ready, n_ready)
        rows = admm.largest(candidates, keep)
        rows.n_iter.fill_(n_iter)
        accepted = last | (rows.gap <= options.tol)
        (n_accepted,) = read(accepted.sum())
        accepted = places(accepted, n_accepted)
        found[token[candidates[accepted]]] = rows[accepted]
        waiting.index_fill_(0, candidates[accepted], False)
        n_waiting -= n_accepted
        if done is not None:
            done(n_accepted)
        # Dropping rows copies the rest, so it waits until it is worth that.
        if 4 * n_waiting <= 3 * len(waiting):
            rest = places(waiting, n_waiting)
            admm.keep(rest)
            token, waiting = token[rest], waiting[rest]
    return found


def solve_as_authors(problem: Problem, options: SolverOptions) -> Rows:
    """The authors' ADMM with their penalty and stopping rule, over all tokens at once, in float64; nothing dropped.

    They stop when max_i sum_j |A_ij - C_ij| < 2e-4, with A and C the two copies of W after an iteration.
    """
    dictionary = Dictionary.of(problem.atoms, affine=problem.affine, rho=AUTHORS_RHO, dtype=torch.float64)
    n_tokens = problem.atoms.shape[1]
    own = torch.arange(n_tokens, device=problem.atoms.device)
    admm = Admm(dictionary, problem.atoms.T.contiguous(), own, error_bound=problem.error_bound, relaxation=1.0)
    everything = slice(0, n_tokens)
    multiplier = torch.zeros_like(admm.state)
    difference, n_iter = torch.inf, 0
    while difference >= AUTHORS_TOL and n_iter < options.max_iter:
        admm.advance()
        n_iter += 1
        coefficients = admm.coefficients(everything)
        previous, multiplier = multiplier, admm.state - coefficients
        difference = float((multiplier - previous).abs_().sum(0).amax())
    found = admm.largest(own, n_tokens)
    found.values.copy_(admm.coefficients(everything).gather(1, found.indices))
    found.n_iter.fill_(n_iter)
    if difference >= AUTHORS_TOL:
        found.gap.fill_(torch.inf)
    return found
