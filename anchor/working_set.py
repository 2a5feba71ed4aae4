"""The self-expression over working sets: each token over a few candidate atoms, until no atom outside is missed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .admm import Admm, Dictionary, Rows, product
from .blocked import CHECK_EVERY
from .host_reads import places, read
from .memory import candidate_atoms
from .options import SolverOptions
from .problem import Problem

SEED_ITERATIONS = 20  # over all atoms, to find the first candidates
# A set of candidates is iterated until its own gap is this part of the gap over all atoms, at first LOOSE: what they
# lack shows long before they have converged. The gap over all atoms is wider, so the last ones go below tol.
LOOSE, PART_OF_GAP, PART_OF_TOL = 0.1, 0.3, 0.8
# Where float32 has not converged by then, its rounding may be what keeps the gap open.
FLOAT32_ITERATIONS = 2000


@dataclass
class _Pool:
    """Tokens that are iterated together, each over its own candidates.

    Attributes:
        admm: the iterates, over (b, p, K) atoms.
        token: (b,) int64, the token of each row.
        candidates: (b, K) int64 atoms.
        n_iter: (b,) int64 iterations so far, those over all atoms included.
        enough: (b,) float64, the gap over the candidates from which on all atoms are looked at.
    """

    admm: Admm
    token: Tensor
    candidates: Tensor
    n_iter: Tensor
    enough: Tensor

    def keep(self, rows: Tensor) -> None:
        self.admm.keep(rows)
        for name in ("token", "candidates", "n_iter", "enough"):
            setattr(self, name, getattr(self, name)[rows])

    def join(self, other: "_Pool") -> None:
        self.admm.join(other.admm)
        for name in ("token", "candidates", "n_iter", "enough"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def slopes(self, everything: Dictionary, rows: Tensor, out: Tensor) -> Tensor:
        """(b, N) absolute slopes of all atoms for some rows (b,), divided by the penalty; 0 for the token itself.

        They are in `out`: where N is large, it is the pages of a new array that take the time.
        """
        step = self.admm.step[rows]
        step[:, everything.rank :] *= (self.admm.dictionary.rho / everything.rho) ** 0.5
        slopes = torch.mm(step, everything.factor, out=out[: len(rows)]).abs_()
        return slopes.scatter_(1, self.token[rows, None], 0.0)

    def solution(self, rows: Tensor, largest_slope: Tensor) -> Rows:
        """What some rows (b,) have come to, with the gap over all atoms: those that are no candidates have weight 0."""
        coefficients = self.admm.coefficients(rows)
        gap = self.admm.relative_gap(rows, coefficients, largest_slope)
        order = coefficients.abs().argsort(dim=1, descending=True)
        values = self.admm.of_unit_sum(coefficients).gather(1, order)
        return Rows(self.candidates[rows].gather(1, order), values, gap, self.n_iter[rows])


def solve_working_sets(
    problem: Problem, options: SolverOptions, block: int, dtype: torch.dtype, done: Callable[[int], None]
) -> Rows:
    """Express every token over a few atoms, which the certificate over all atoms proves to be enough.

    A short run over all atoms picks a token's first candidates, the atoms of largest state. From then on the iterates
    over the candidates give a point of the dual problem, and its slopes over all atoms the gap of the whole problem. If
    that is above the tolerance, two thirds of the candidates stay, and the atoms that violate the optimality conditions
    most join them. A token that does not converge in float32 starts again in float64, and if it has not converged there
    after options.max_iter iterations, its gap says so.

    Args:
        problem: N >= 2 tokens of rank r.
        options: tolerance and iterations.
        block: tokens that are iterated over all atoms at a time; up to 3/2 block are over their candidates.
        dtype: precision of the iteration.
        done: called with the number of tokens that have been solved since the last call.

    Returns:
        Rows of all tokens. Their gap is the one over all atoms.

    Raises:
        FloatingPointError: the iteration left the range of float64.
    """
    rank, n_tokens = problem.atoms.shape
    tokens = problem.atoms.T.contiguous()
    found = Rows.empty(n_tokens, candidate_atoms(rank, n_tokens), dtype, tokens.device)
    missed = torch.arange(n_tokens, device=tokens.device)
    if dtype == torch.float32:
        max_iter = min(FLOAT32_ITERATIONS, options.max_iter)
        missed = _WorkingSets.of(problem, options, tokens, dtype).solve(missed, found, max_iter, block, done)
        block = max(1, block // 2)
    if len(missed):
        in_float64 = _WorkingSets.of(problem, options, tokens, torch.float64)
        missed = in_float64.solve(missed, found, options.max_iter, block, done)
    if not torch.isfinite(found.values[missed]).all():
        raise FloatingPointError(
            f"the self-expression left the range of float64; use less extreme alpha_e={options.alpha_e}, "
            f"alpha_z={options.alpha_z}, rho={options.rho}"
        )
    done(len(missed))
    return found


@dataclass(frozen=True)
class _WorkingSets:
    """The problem of all tokens, to be solved in one precision.

    Attributes:
        problem, options: see `solve_working_sets`.
        tokens: (N, r) float64, the atoms, one a row.
        everything: the dictionary of all atoms, in the precision of the iteration.
    """

    problem: Problem
    options: SolverOptions
    tokens: Tensor
    everything: Dictionary

    @classmethod
    def of(cls, problem: Problem, options: SolverOptions, tokens: Tensor, dtype: torch.dtype) -> "_WorkingSets":
        rho = options.penalty(len(tokens))
        everything = Dictionary.of(problem.atoms, affine=problem.affine, rho=rho, dtype=dtype)
        return cls(problem, options, tokens, everything)

    def solve(self, own: Tensor, found: Rows, max_iter: int, block: int, done: Callable[[int], None]) -> Tensor:
        """Solve some tokens (b,) into `found`; returns those that did not converge."""
        missed = torch.zeros(len(self.tokens), dtype=torch.bool, device=own.device)
        first, *queue = own.split(block)
        work = self.everything.factor.new_empty(len(first), len(self.tokens))
        pool = self.first_candidates(first, work)
        while queue or len(pool.token):
            if queue and len(pool.token) <= block // 2:
                pool.join(self.first_candidates(queue.pop(0), work))
            for _ in range(CHECK_EVERY):
                pool.admm.advance()
            pool.n_iter += CHECK_EVERY
            # Out of the range of the precision, there is nothing to go on from.
            last = (pool.n_iter >= max_iter) | ~torch.isfinite(pool.admm.step).all(1)
            rows = (last | (pool.admm.gaps() <= pool.enough)).nonzero()[: len(work), 0]
            if len(rows) == 0:
                continue
            slopes, token = pool.slopes(self.everything, rows, work), pool.token[rows]
            solved = pool.solution(rows, slopes.amax(1).double() * pool.admm.dictionary.rho)
            solved.n_iter.clamp_(max=max_iter)  # they are counted by CHECK_EVERY
            found[token] = solved.to(found.values.dtype)
            accepted = solved.gap <= self.options.tol
            ended = accepted | last[rows]
            missed[token] = ended & ~accepted
            n_accepted, n_ended = read(accepted.sum(), ended.sum())
            done(n_accepted)
            again = places(~ended, len(rows) - n_ended)
            candidates, state = self.next_candidates(pool, rows, slopes)
            changed = self.go_on(pool, rows[again], candidates[again], state[again])
            changed.enough.copy_((PART_OF_GAP * solved.gap[again]).clamp(PART_OF_TOL * self.options.tol, LOOSE))
            staying = torch.ones_like(last).index_fill_(0, rows, False)
            pool.keep(places(staying, len(staying) - len(rows)))
            pool.join(changed)
        return missed.nonzero()[:, 0]

    def first_candidates(self, own: Tensor, work: Tensor) -> _Pool:
        """Start tokens (b,) with the atoms of largest state after a few iterations over all, and go on from there.

        Args:
            work: at least (b, N), written over.
        """
        everything = self.everything
        targets = self.tokens[own].to(everything.factor.dtype)
        whole = self._admm(everything, targets, own=own)
        for _ in range(SEED_ITERATIONS):
            whole.advance()
        sizes = torch.abs(whole.state, out=work[: len(own)]).scatter_(1, own[:, None], -1.0)
        candidates = sizes.topk(candidate_atoms(everything.rank, len(self.tokens)), sorted=False).indices
        dictionary = self.over(candidates)
        ratio = everything.rho / dictionary.rho
        state = whole.state.gather(1, candidates)
        coefficients = (state + whole.reflected.gather(1, candidates)) / 2
        admm = self._admm(dictionary, targets, start=coefficients + ratio * (state - coefficients))
        admm.offset = whole.offset
        admm.offset[:, everything.rank :] *= ratio**0.5
        n_iter = torch.full_like(own, SEED_ITERATIONS)
        enough = torch.full_like(own, LOOSE, dtype=torch.float64)
        return _Pool(admm, own, candidates, n_iter, enough)

    def next_candidates(self, pool: _Pool, rows: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Other candidates of some rows: up to a third gives way to atoms that violate the conditions.

        Those that stay are the active and those nearest to it. If more gave way, or to atoms that violate nothing, the
        next round would miss them, and so on.

        Args:
            pool: of which the rows are.
            rows: (b,) int64.
            slopes: (b, N), see `_Pool.slopes`; written over.

        Returns:
            (b, K) candidates, and their state; infinite where they were none before.
        """
        state, old = pool.admm.state[rows], pool.candidates[rows]
        stay = state.abs().topk(2 * old.shape[1] // 3).indices
        sizes = torch.threshold_(slopes, 1 / pool.admm.dictionary.rho, -1.0)  # no place for these, nor for the token
        sizes.scatter_(1, old, state.abs()).scatter_(1, old.gather(1, stay), torch.inf)
        candidates = sizes.topk(old.shape[1], sorted=False).indices
        return candidates, sizes.fill_(torch.inf).scatter_(1, old, state).gather(1, candidates)

    def go_on(self, pool: _Pool, rows: Tensor, candidates: Tensor, state: Tensor) -> _Pool:
        """Some rows (b,) over what `next_candidates` found: new ones start with coefficient 0, at their slope."""
        admm, dictionary = pool.admm, self.over(candidates)
        bound = 1 / dictionary.rho  # of the state of an atom whose coefficient is 0
        slopes = product(admm.step[rows], dictionary.factor)
        start = torch.where(state.isinf(), slopes.clamp_(-bound, bound), state)
        changed = self._admm(dictionary, admm.target[rows, : self.everything.rank], start=start)
        changed.offset = admm.offset[rows]
        return _Pool(changed, pool.token[rows], candidates, pool.n_iter[rows], pool.enough[rows])

    def over(self, candidates: Tensor) -> Dictionary:
        """The dictionary of each token's candidates (b, K)."""
        return Dictionary.of(
            self.tokens[candidates].mT,
            affine=self.everything.affine,
            rho=self.options.penalty(candidates.shape[1]),
            dtype=self.everything.factor.dtype,
        )

    def _admm(
        self, dictionary: Dictionary, targets: Tensor, own: Tensor | None = None, start: Tensor | None = None
    ) -> Admm:
        bound, relaxation = self.problem.error_bound, self.options.relaxation
        return Admm(dictionary, targets, own, error_bound=bound, relaxation=relaxation, start=start)
