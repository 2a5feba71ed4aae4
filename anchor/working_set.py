"""The self-expression over working sets: each token over a few candidate atoms, until no atom outside is missed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .admm import Admm, Dictionary, Rows
from .blocked import CHECK_EVERY, solve_block
from .memory import candidate_atoms
from .options import SolverOptions
from .problem import Problem

SEED_ITERATIONS = 120  # over all atoms, to find the first candidates
ROUNDS = 50  # sets of candidates that are tried before a token goes back to all atoms, which costs far more
INNER_TOLERANCE = 0.8  # times tol: the gap over all atoms is wider than the one over the candidates


@dataclass
class _Pool:
    """Tokens that are iterated together, each over its own candidates.

    Attributes:
        admm: the iterates, over (b, p, K) atoms.
        token: (b,) int64, the token of each row.
        candidates: (b, K) int64 atoms.
        n_iter: (b,) int64 iterations so far, those over all atoms included.
        rounds: (b,) int64 sets of candidates so far.
    """

    admm: Admm
    token: Tensor
    candidates: Tensor
    n_iter: Tensor
    rounds: Tensor

    def keep(self, rows: Tensor) -> None:
        self.admm.keep(rows)
        for name in ("token", "candidates", "n_iter", "rounds"):
            setattr(self, name, getattr(self, name)[rows])

    def slopes(self, everything: Dictionary, rows: Tensor) -> Tensor:
        """(b, N) slopes of all atoms for some rows (b,), divided by their dictionary's penalty; 0 for the token itself.

        The step is brought to the units of that dictionary, whose penalty is another.
        """
        ratio = self.admm.dictionary.rho / everything.rho
        step = ratio * self.admm.step[rows]
        step[:, everything.rank :] *= ratio**0.5
        return (step @ everything.factor).scatter_(1, self.token[rows, None], 0.0)

    def solution(self, rows: Tensor, largest_slope: Tensor) -> Rows:
        """What some rows (b,) have come to, with the gap over all atoms: those that are no candidates have weight 0."""
        coefficients = self.admm.coefficients(rows)
        gap = self.admm.relative_gap(rows, coefficients, largest_slope)
        order = coefficients.abs().argsort(dim=1, descending=True)
        values = self.admm.of_unit_sum(coefficients).gather(1, order)
        return Rows(self.candidates[rows].gather(1, order), values, gap, self.n_iter[rows])

    def join(self, other: "_Pool") -> None:
        self.admm.join(other.admm)
        for name in ("token", "candidates", "n_iter", "rounds"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


def solve_working_sets(
    problem: Problem, options: SolverOptions, block: int, dtype: torch.dtype, done: Callable[[int], None]
) -> Rows:
    """Express every token over a few atoms, which the certificate over all atoms proves to be enough.

    A short run over all atoms picks a token's candidates: the atoms of largest state, which are the active ones and
    then those nearest to being active. Where the iterates over the candidates have converged, the slopes of all atoms
    give the gap of the whole problem. If it is above the tolerance the same rule picks new candidates: the active atoms
    and those that violate the optimality conditions most. A token that needs more than `ROUNDS` sets of candidates or
    options.max_iter iterations is solved over all atoms, from the start.

    Args:
        problem: N >= 2 tokens of rank r.
        options: tolerance and iterations.
        block: tokens that are iterated over all atoms at a time; up to 3/2 block are over their candidates.
        dtype: precision of the iteration.
        done: called with the number of tokens that have been solved since the last call.

    Returns:
        Rows of all tokens. Their gap is the one over all atoms.

    Raises:
        FloatingPointError: the iteration left the range of dtype.
    """
    rank, n_tokens = problem.atoms.shape
    device = problem.atoms.device
    tokens = problem.atoms.T.contiguous()
    everything = Dictionary.of(problem.atoms, affine=problem.affine, rho=options.penalty(n_tokens), dtype=dtype)
    k = candidate_atoms(rank, n_tokens)
    found = Rows.empty(n_tokens, k, dtype, device)
    missed = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    first, *queue = torch.arange(n_tokens, device=device).split(block)
    pool = _first_candidates(problem, tokens, everything, first, k, options)
    while queue or len(pool.token):
        if queue and len(pool.token) <= block // 2:
            pool.join(_first_candidates(problem, tokens, everything, queue.pop(0), k, options))
        for _ in range(CHECK_EVERY):
            pool.admm.advance()
        pool.n_iter += CHECK_EVERY
        exhausted = (pool.n_iter > options.max_iter) | ~torch.isfinite(pool.admm.step).all(1)
        missed[pool.token[exhausted]] = True
        ready = ~exhausted & (pool.admm.gaps() <= INNER_TOLERANCE * options.tol)
        rows = ready.nonzero()[:block, 0]
        staying = ~exhausted
        staying[rows] = False
        if staying.all():
            continue
        slopes, token = pool.slopes(everything, rows), pool.token[rows]
        solved = pool.solution(rows, torch.maximum(slopes.amax(1), -slopes.amin(1)).double() * everything.rho)
        accepted = solved.gap <= options.tol
        found[token[accepted]] = solved[accepted]
        done(int(accepted.sum()))
        again = ~accepted & (pool.rounds[rows] < ROUNDS)
        missed[token[~accepted & ~again]] = True
        slopes = slopes[again]
        whole = _over_all_atoms(everything, pool, rows[again], slopes)
        changed = _over_candidates(tokens, whole, token[again], k, options)
        changed.n_iter.copy_(pool.n_iter[rows[again]])
        changed.rounds.copy_(pool.rounds[rows[again]] + 1)
        pool.keep(staying.nonzero()[:, 0])
        pool.join(changed)
    for own in missed.nonzero()[:, 0].split(block):
        found[own] = solve_block(problem, everything, tokens[own].to(dtype), own, options, keep=k, done=done)
    return found


def _first_candidates(
    problem: Problem, tokens: Tensor, everything: Dictionary, own: Tensor, k: int, options: SolverOptions
) -> _Pool:
    targets = tokens[own].to(everything.factor.dtype)
    whole = Admm(everything, targets, own, error_bound=problem.error_bound, relaxation=options.relaxation)
    for _ in range(SEED_ITERATIONS):
        whole.advance()
    return _over_candidates(tokens, whole, own, k, options)


def _over_candidates(tokens: Tensor, whole: Admm, own: Tensor, k: int, options: SolverOptions) -> _Pool:
    """Go on with these tokens over the k atoms of largest state only, the token itself excepted."""
    size = whole.state.abs().scatter_(1, own[:, None], -1.0)
    candidates = size.topk(k, sorted=False).indices
    dictionary = Dictionary.of(
        tokens[candidates].mT,
        affine=whole.dictionary.affine,
        rho=options.penalty(k),
        dtype=whole.state.dtype,
    )
    ratio, rank = whole.dictionary.rho / dictionary.rho, dictionary.rank
    state = whole.state.gather(1, candidates)
    coefficients = (state + whole.reflected.gather(1, candidates)) / 2
    admm = Admm(
        dictionary,
        whole.target[:, :rank],
        None,
        error_bound=whole.error_bound,
        relaxation=whole.relaxation,
        start=coefficients + ratio * (state - coefficients),
    )
    admm.offset = whole.offset.clone()
    admm.offset[:, rank:] *= ratio**0.5
    return _Pool(admm, own, candidates, torch.full_like(own, SEED_ITERATIONS), torch.ones_like(own))


def _over_all_atoms(everything: Dictionary, pool: _Pool, rows: Tensor, slopes: Tensor) -> Admm:
    """Some rows over all atoms: an atom that is no candidate has coefficient 0, and so the state slope / rho.

    Args:
        slopes: (b, N), see `_Pool.slopes`; written over.
    """
    admm, rank = pool.admm, everything.rank
    ratio = admm.dictionary.rho / everything.rho
    offset = admm.offset[rows]
    offset[:, rank:] *= ratio**0.5
    coefficients = admm.coefficients(rows)
    candidates_state = coefficients + ratio * (admm.state[rows] - coefficients)
    whole = Admm(
        everything,
        admm.target[rows, :rank],
        pool.token[rows],
        error_bound=admm.error_bound,
        relaxation=admm.relaxation,
        start=slopes.scatter_(1, pool.candidates[rows], candidates_state),
    )
    whole.offset = offset
    return whole
