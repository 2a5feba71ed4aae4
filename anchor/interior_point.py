"""The exact solver of the self-expression: a batched interior point in the dual of each token, over few atoms each.

With t a token, F the weighted atoms (see `Problem`), p = r + 1 dual unknowns x = (nu, mu) if affine, else p = r:

    min |c|_1 + bound |e|_1 + |t - F c - e|^2 / 2,  1'c = 1 if affine         max <t, nu> + mu - |nu|^2 / 2
                                                                              |F'nu + mu| <= 1, |nu| <= bound

Affine coefficients have |c|_1 >= 1, so the dual value may be raised to 1: tokens in the hull of others end at once.

1. `over_changing_atoms`: ADMM iterations give a start and K candidates for each token; where they are cheap beside a
   step of the interior point (few atoms, high rank), they go on, and most tokens end there. Mehrotra's
   predictor-corrector over the candidates; after each step one product gives the slopes of all atoms, x is scaled to be
   feasible, and the atoms of largest slope take the place of the candidates of least weight. K never changes.
2. `over_settled_atoms`, for a token that did not end there, and for one in the hull of others, whose optimum is not
   unique. The solution that is meant starts from the K nearest atoms: the optimum over K atoms, in its analytic centre,
   is found to CENTRED; then the heaviest half stays and the atoms of largest slope join it, until none is missed. It
   is a function of the tokens alone: neither the start, nor the blocks, nor the tolerance have a part in it.

Each token that ends is certified by float64 slopes of all atoms.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.optimize import nnls
from torch import Tensor

from .admm_start import HALVING, Admm, Start
from .atoms import SMALLEST, Atoms, all_slopes, certificate, relative_gap
from .iterates import Iterates, largest, swap_candidates
from .memory import Plan, candidate_atoms
from .problem import Problem
from .repeated import Repeated

STALLED, LONGEST = 25, 60  # iterations of a token over changing atoms, and over settled ones
CHECK_ON_CUDA = 3  # iterations after which the host asks for those that have ended; on a CPU after each
KEPT_ON_CUDA = 0.5  # part that is left when those that have ended leave, and the step is captured anew
ROUNDS = 20  # of settled atoms, of which the light half leaves in each; then none leaves any more
FINE = 1e-4  # below this tolerance float32 is not enough
# Of settled atoms: the gap over them, |c|_1 - 1 in a hull, and slope - 1 of others.
CENTRED, CONTAINED, VIOLATION = 1e-6, 1e-5, 1e-4


class Found(NamedTuple):
    """Some tokens of a block that ended: which (m,), atoms and coefficients (m, K), objective and relative gap (m,)."""

    token: Tensor
    atoms: Tensor
    values: Tensor
    objective: Tensor
    gap: Tensor
    n_iter: int

    def of(self, kept: Tensor) -> "Found":
        """Some of these (m,), a mask."""
        kept = kept.nonzero()[:, 0]  # the host asks the device once, not for each field
        return self._replace(**{name: getattr(self, name)[kept] for name in self._fields[:-1]})


def over_changing_atoms(atoms: Atoms, start: Start, target: Tensor, own: Tensor | None, tol: float) -> Iterator[Found]:
    """See the top of the file, 1. Tokens as they end, the stalled ones at last with whatever gap they have."""
    n_atoms, n_unknowns = atoms.rows.shape
    k = candidate_atoms(n_unknowns, n_atoms - (own is not None))
    admm = Admm(start, atoms, target, own)
    admm.advance(start.n_iter)
    for left in range(start.n_rounds, 0, -1):
        if admm.gap().median() > tol * 2**left:
            break
        admm.advance(HALVING)
        near = (admm.gap() <= tol).nonzero()[:, 0]
        if len(near) == 0:
            continue
        part = admm.of(near)
        x, candidates, c, _ = part.point(k)
        c = c / c.sum(1, keepdim=True) if atoms.affine else c
        primal, gap, _, _ = certificate(atoms, candidates, c, x, part.target, part.own)
        found = Found(part.token, candidates, c, primal, gap, 1).of(gap <= tol)
        yield found
        admm = admm.of((~torch.isin(admm.token, found.token)).nonzero()[:, 0])
        if len(admm.token) == 0:
            return
    x, candidates, c, slopes = admm.point(k)
    x *= 0.98 / all_slopes(atoms, x, admm.own)[1].clamp_min(0.98)
    it = Iterates(atoms, admm.target, admm.own, candidates, x, c)
    it.token = admm.token
    every = CHECK_ON_CUDA if x.is_cuda else 1

    def step() -> tuple[Tensor, Tensor, Tensor]:
        found = it.candidates.clone() if it.is_fused else it.candidates  # which kernels change in place
        c, primal = it.advance()
        swap_candidates(it, primal, tol, slopes[: len(c)])
        return found, c, primal

    advance, n_open = Repeated(step, x.device) if it.is_fused else step, len(x)
    for n_iter in range(1, STALLED + 1):
        found, c, primal = advance()
        if n_iter % every and n_iter < STALLED:
            continue
        gap = relative_gap(atoms, primal, it.dual())
        last = ~torch.isfinite(it.x).all(1) | (n_iter == STALLED)
        ended = ((last | (gap <= tol)) & (it.open > 0)).nonzero()[:, 0]
        if len(ended) == 0:
            continue
        rest = None if it.own is None else it.own[ended]
        primal, gap, _, _ = certificate(atoms, found[ended], c[ended], it.x[ended], it.target[ended], rest)
        sure = last[ended] | (gap <= tol)
        ended = ended[sure]
        yield Found(it.token[ended], found[ended], c[ended], primal[sure], gap[sure], n_iter)
        it.open.index_fill_(0, ended, 0)
        n_open -= len(ended)
        if n_open == 0:
            return
        if n_open <= (KEPT_ON_CUDA if it.is_fused else 1) * len(it.x):
            it.keep(it.open > 0)
            advance = Repeated(step, x.device) if it.is_fused else step


def over_settled_atoms(
    atoms: Atoms, target: Tensor, own: Tensor | None, candidates: Tensor, inside: Tensor, tol: float
) -> Iterator[Found]:
    """See the top of the file, 2. atoms.rows are float64; tokens not `inside` (b,) the hull of others start from the
    candidates (b, K). Tokens as they end."""
    n_atoms, n_unknowns = atoms.rows.shape
    n_others = n_atoms - (own is not None)
    k = candidate_atoms(n_unknowns, n_others)
    token, before = torch.arange(len(target), device=target.device), 0
    candidates = torch.where(inside[:, None], _nearest(atoms, target, own, k), candidates)
    if n_others <= 2 * k:
        everything = torch.arange(n_others, device=target.device).expand(len(target), -1)
        candidates = everything if own is None else everything + (everything >= own[:, None])
    for n_rounds in itertools.count(1):
        c, x, n_iter = _optimum_over(atoms, target, candidates, min(CENTRED, tol / 4))
        before += n_iter
        primal, gap, slopes, steepest = certificate(atoms, candidates, c, x, target, own)
        good = steepest <= 1 + min(VIOLATION, tol)
        if atoms.affine:
            good |= primal <= 1 + min(CONTAINED, tol)
        good = (good & (gap <= tol)) | torch.full_like(good, candidates.shape[1] == n_others)
        yield Found(token, candidates, c, primal, gap, before).of(good)
        rest = (~good).nonzero()[:, 0]
        if len(rest) == 0:
            return
        if n_rounds < ROUNDS:  # later on nothing is left out: the set grows until it is enough
            heaviest = c.abs().nan_to_num(nan=0.0).topk(k - k // 2, sorted=False).indices
            candidates = candidates.gather(1, heaviest)
        room = min(k // 2, n_others - candidates.shape[1])
        # of all tokens: those that are left would have to be copied out of the slopes
        candidates = torch.cat([candidates, largest(slopes.scatter_(1, candidates, -1.0), room)], 1)[rest]
        token, target, own = token[rest], target[rest], None if own is None else own[rest]


def _nearest(atoms: Atoms, target: Tensor, own: Tensor | None, k: int) -> Tensor:
    """(b, k) the atoms nearest to each target."""
    rank = len(atoms.limit)
    unit = atoms.scale[:rank]
    rows = atoms.exact[:, :rank] * unit
    distance = rows.square().sum(1) - 2 * (target[:, :rank] * unit) @ rows.T
    if own is not None:
        distance.scatter_(1, own[:, None], torch.inf)
    return distance.topk(k, largest=False, sorted=False).indices


def _optimum_over(atoms: Atoms, target: Tensor, candidates: Tensor, tol: float) -> tuple[Tensor, Tensor, int]:
    """(b, K) coefficients and (b, p) dual points of the optima over the candidates, and iterations."""
    x = torch.zeros_like(target)
    x[:, len(atoms.limit) :] = 0.9
    start = torch.full(candidates.shape, 1 / candidates.shape[1], dtype=torch.float64, device=x.device)
    it = Iterates(atoms, target, None, candidates, x, start)
    c, every = torch.zeros_like(start), CHECK_ON_CUDA if x.is_cuda else 1
    for n_iter in range(1, LONGEST + 1):
        c[it.token], primal = it.advance(together=n_iter > STALLED)
        x[it.token] = it.x
        if n_iter % every and n_iter < LONGEST:
            continue
        open_ = (primal - it.dual() > tol * primal.clamp_min(SMALLEST)) & torch.isfinite(it.x).all(1)
        if not open_.any():
            return c, x, n_iter
        it.keep(open_)
    return c, x, LONGEST


@dataclass(frozen=True)
class Rows:
    """Sparse coefficients of n tokens, one a row.

    Attributes:
        indices: (n, k) int64 atoms.
        values: (n, k) float64 weights; unused slots hold 0.
        gap: (n,) float64 relative duality gap.
        n_iter: (n,) int64 iterations, all starts counted.
    """

    indices: Tensor
    values: Tensor
    gap: Tensor
    n_iter: Tensor

    @classmethod
    def empty(cls, n_tokens: int, k: int, device: torch.device) -> "Rows":
        """To be filled; their gap is infinite."""
        return cls(
            torch.zeros(n_tokens, k, dtype=torch.int64, device=device),
            torch.zeros(n_tokens, k, dtype=torch.float64, device=device),
            torch.full((n_tokens,), torch.inf, dtype=torch.float64, device=device),
            torch.zeros(n_tokens, dtype=torch.int64, device=device),
        )

    def put(self, token: Tensor, found: Found) -> None:
        """Fill in what was found for some tokens (m,), in place of what stands there; iterations add up."""
        width = found.values.shape[1]
        self.indices[token, :width], self.values[token, :width] = found.atoms, found.values.nan_to_num(0.0, 0.0, 0.0)
        self.values[token, width:] = 0
        self.gap[token] = found.gap
        self.n_iter[token] += found.n_iter


def solve(
    problem: Problem,
    tokens: Tensor | None,
    *,
    tol: float,
    plan: Plan,
    done: Callable[[int], None] = lambda _: None,
) -> Rows:
    """Express tokens by atoms, each within `tol` of its optimum.

    Blocks of tokens run side by side on a CPU, each in one thread, so that nothing depends on the number of threads.

    Args:
        problem: the atoms (r, N), N >= 2, or N >= 1 if tokens are given.
        tokens: (r, n) float64 in the units of the atoms, none of which is an atom; None: the atoms, each by the others.
        tol: bound on the relative duality gap.
        plan: tokens that are iterated together.
        done: called with the number of tokens that have ended since the last call.
    """
    atoms = Atoms.of(problem, torch.float32 if tol >= FINE else torch.float64)
    target = atoms.exact if tokens is None else atoms.targets(tokens)
    n_tokens, n_unknowns = target.shape
    n_others, device = len(atoms.exact) - (tokens is None), target.device
    k = candidate_atoms(n_unknowns, n_others)
    rows = Rows.empty(n_tokens, k, device)
    inside = torch.zeros(n_tokens, dtype=torch.bool, device=device)

    def owned(part: Tensor) -> Tensor | None:
        return part if tokens is None else None

    start, parts = Start.of(atoms, k), torch.arange(n_tokens, device=device).split(plan.block)
    passes = _side_by_side(
        lambda part: over_changing_atoms(atoms, start, target[part], owned(part), tol), parts, plan.threads
    )
    for part, found in passes:
        token = part[found.token]
        inside[token] = ~(found.objective * (1 - found.gap.clamp_min(tol)) > 1 + CONTAINED) & problem.affine
        rows.put(token, found)
        done(int(((found.gap <= tol) & ~inside[token]).sum()))
    left = (~(rows.gap <= tol) | inside).nonzero()[:, 0]
    atoms, parts = replace(atoms, rows=atoms.exact), left.split(plan.block) if len(left) else ()
    passes = _side_by_side(
        lambda part: over_settled_atoms(atoms, target[part], owned(part), rows.indices[part], inside[part], tol),
        parts,
        plan.threads,
    )
    for part, found in passes:
        token = part[found.token]
        better = ((found.gap <= tol) | (found.gap < rows.gap[token])) & found.values.isfinite().all(1)
        rows.n_iter[token[~better]] += found.n_iter
        found = found.of(better)
        rows.put(token[better], fewest(atoms, found) if found.atoms.shape[1] > k else found)
        done(len(token))
    return rows


def _side_by_side(
    work: Callable[[Tensor], Iterator[Found]], parts: Sequence[Tensor], n_threads: int
) -> Iterator[tuple[Tensor, Found]]:
    """What `work` finds for each of the parts, in their order."""
    if len(parts) == 0 or parts[0].is_cuda or torch.get_num_threads() == 1:
        yield from ((part, found) for part in parts for found in work(part))
        return
    of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, "self-expression", torch.set_num_threads, (1,)) as pool:
            for part, all_found in zip(parts, pool.map(lambda part: list(work(part)), parts), strict=True):
                yield from ((part, found) for found in all_found)
    finally:
        torch.set_num_threads(of_torch)


def fewest(atoms: Atoms, found: Found) -> Found:
    """The same with at most p + 1 coefficients that are not 0, of the same signs, fit, sum and L1 norm.

    A vertex of the polytope of all such coefficients, by nonnegative least squares (Lawson and Hanson) on the CPU.
    """
    exact, values = atoms.exact.cpu(), found.values.to("cpu", copy=True)
    for atom, c in zip(found.atoms.cpu(), values, strict=True):
        sign, given = c.sign(), c.abs().numpy()
        columns = torch.cat([exact[atom] * sign[:, None], torch.ones_like(c)[:, None]], 1).T.numpy()
        c.copy_(sign * torch.from_numpy(nnls(columns, columns @ given, maxiter=100 * len(given))[0]))
    values = values.to(found.values.device)
    kept = values.abs().topk(min(exact.shape[1] + 1, values.shape[1]), sorted=False).indices
    return found._replace(atoms=found.atoms.gather(1, kept), values=values.gather(1, kept))
