"""The exact solver of the self-expression: a batched interior point in the dual of each token, over few atoms each.

With t a token, F the weighted atoms (see `Problem`), p = r + 1 dual unknowns x = (nu, mu) if affine, else p = r:

    min |c|_1 + bound |e|_1 + |t - F c - e|^2 / 2,  1'c = 1 if affine         max <t, nu> + mu - |nu|^2 / 2
                                                                              |F'nu + mu| <= 1, |nu| <= bound

Affine coefficients have |c|_1 >= 1, so the dual value may be raised to 1: tokens in the hull of others end at once.

1. `over_changing_atoms`: ADMM iterations give a start and K candidates for each token. Mehrotra's predictor-corrector
   over the candidates; after each step one product gives the slopes of all atoms, x is scaled to be feasible, and the
   atoms of largest slope take the place of the candidates of least weight. K never changes.
2. `over_settled_atoms`, for a token that did not end there, and for one in the hull of others, whose optimum is not
   unique. The solution that is meant starts from the K nearest atoms: the optimum over K atoms, in its analytic centre,
   is found to CENTRED; then the heaviest half stays and the atoms of largest slope join it, until none is missed. It
   is a function of the tokens alone: neither the start, nor the blocks, nor the tolerance have a part in it.

Each token that ends is certified by float64 slopes of all atoms.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import torch
from scipy.optimize import nnls
from torch import Tensor

from .admm_start import Start
from .atoms import SMALLEST, TINY, Atoms, all_slopes, certificate, dual_value, objective, relative_gap
from .memory import Plan, candidate_atoms
from .problem import Problem

if find_spec("triton"):  # not there on every platform
    from .newton_kernel import newton_step
    from .slopes_kernel import take_in_violators

STEP, NEAREST_BOUNDARY = 0.97, 1e-12  # part of the way to the boundary, and where a slope ends by rounding
MARGIN, PART_OF_GAP = 0.01, 0.3  # distance of other atoms from the boundary, at first, and as a part of the gap
STALLED, LONGEST = 25, 60  # iterations of a token over changing atoms, and over settled ones
CHECK_ON_CUDA = 3  # iterations after which the host asks for those that have ended; on a CPU after each
ROUNDS = 20  # of settled atoms; then all atoms at once
GROUPS = 512  # of atoms, of which only the largest slope may join the candidates
FINE, TF32 = 1e-4, 1e-3  # below these tolerances float32 is not enough, nor TF32 for slopes on a GPU
# Of settled atoms: the gap over them, |c|_1 - 1 in a hull, and slope - 1 of others.
CENTRED, CONTAINED, VIOLATION = 1e-6, 1e-5, 1e-4


def ridge_of(dtype: torch.dtype) -> float:
    """What is added to the normal matrix's diagonal, as a part of it."""
    return 1e-7 if dtype == torch.float32 else 1e-15


class Found(NamedTuple):
    """Some tokens of a block that ended: which (m,), atoms and coefficients (m, K), objective and relative gap (m,)."""

    token: Tensor
    atoms: Tensor
    values: Tensor
    objective: Tensor
    gap: Tensor
    n_iter: int

    def of(self, kept: Tensor) -> "Found":
        """Some of these."""
        return Found(*(field[kept] for field in self[:-1]), self.n_iter)  # pyright: ignore[reportIndexIssue]


class Iterates:
    """Iterates of b tokens over K candidates each.

    Args:
        atoms: all of them.
        target: (b, p) float64.
        own: (b,) int64, the atom that is the token itself; None where none is.
        candidates: (b, K) int64.
        x: (b, p) float64, a dual point strictly inside the constraints.
        coefficients: (b, K) float64.

    Attributes:
        u, v: (b, K + r) float64 > 0, multipliers of slope <= 1 and slope >= -1 for each candidate and the error term.
        g: (b, K + r) float64 slopes.
    """

    def __init__(
        self, atoms: Atoms, target: Tensor, own: Tensor | None, candidates: Tensor, x: Tensor, coefficients: Tensor
    ) -> None:
        self.atoms, self.target, self.own, self.candidates, self.x = atoms, target, own, candidates, x
        self.token = torch.arange(len(target), device=x.device)
        self.matrix = atoms.rows[candidates]
        self.taken = self.weights = self.objectives = None
        self.g = self._slopes(x)
        c = torch.nn.functional.pad(coefficients, (0, len(atoms.limit)))
        level = self.dual()[:, None].abs()
        room = (c.abs().sum(1, keepdim=True) - self.dual()[:, None]).abs().maximum(1e-2 * level).clamp_min(SMALLEST)
        mu = room / c.shape[1]
        self.u, self.v = c.clamp_min(0) + mu / (1 - self.g), (-c).clamp_min(0) + mu / (1 + self.g)
        self.scalars = None
        if _runs_triton(x):  # the kernels gather the candidates' rows themselves, and write into x
            self.x = x.clone()
            self.matrix, self.scalars = (
                self.matrix[:, :0],
                _filled(x, atoms.bound, STEP, NEAREST_BOUNDARY, ridge_of(atoms.rows.dtype)),
            )

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the tokens only."""
        for name in ("token", "own", "target", "candidates", "matrix", "x", "u", "v", "g", "taken"):
            if (of_all := getattr(self, name)) is not None:
                setattr(self, name, of_all[rows])

    def advance(self, *, together: bool = False) -> tuple[Tensor, Tensor]:
        """A step of Mehrotra's predictor-corrector: normal matrix and factor in the precision of atoms.rows.

        Args:
            together: the primal and the dual step have one length, slower but safer.

        Returns:
            (b, K) float64 coefficients, of sum 1 if affine, not finite where that cannot be; and (b,) their objective.
        """
        atoms, u, v, g = self.atoms, self.u, self.v, self.g
        if self.scalars is not None:
            c, self.weights, self.objectives = newton_step(
                atoms, self.candidates, self.target, self.x, u, v, g, self.scalars, together=together
            )  # pyright: ignore[reportPossiblyUnboundVariable]
            return c, self.objectives[:, 0]
        dtype, rank, k = self.matrix.dtype, len(atoms.limit), self.candidates.shape[1]
        above, below = 1 - g, 1 + g
        weight = u / above + v / below
        normal = torch.bmm(self.matrix.mT, self.matrix * weight[:, :k, None].to(dtype))
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += atoms.quadratic.to(dtype)
        diagonal[:, :rank] += (weight[:, k:] / atoms.limit**2).to(dtype)
        diagonal *= 1 + ridge_of(dtype)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if failed.any():
            ridge = (1e-4 if dtype == torch.float32 else 1e-10) * diagonal
            firm = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))[0]
            factor = torch.where((failed > 0)[:, None, None], firm, factor)
        slope = self.target - atoms.quadratic * self.x

        def solved(right: Tensor) -> Tensor:
            return torch.cholesky_solve(right.to(dtype)[..., None], factor)[..., 0].double()

        dg = self._slopes(solved(slope))  # predictor
        a, b = dg / above, dg / below
        primal, dual = _step(torch.maximum(1 - a, 1 + b), 1.0), _step(torch.maximum(a, -b), 1.0)
        now = (u * above + v * below).sum(1, keepdim=True)
        then = u * (1 - primal * (1 - a)) * (above - dual * dg) + v * (1 - primal * (1 + b)) * (below + dual * dg)
        mu = (then.sum(1, keepdim=True) / now).clamp(0, 1) ** 3 * now / (2 * g.shape[1])
        to_u, to_v = (mu - u * dg * (1 - a)) / above, (mu + v * dg * (1 + b)) / below  # centred, of second order
        dx = solved(slope - self._combined(to_u - to_v))
        dg = self._slopes(dx)
        a, b = dg / above, dg / below
        du, dv = to_u - u + u * a, to_v - v - v * b
        primal, dual = _step(torch.maximum(-du / u, -dv / v), STEP), _step(torch.maximum(a, -b), STEP)
        if together:
            primal = dual = primal.minimum(dual)
        self.u, self.v = (u + primal * du).clamp_min_(TINY), (v + primal * dv).clamp_min_(TINY)
        self.x, self.g = self.x + dual * dx, (g + dual * dg).clamp_(-1 + NEAREST_BOUNDARY, 1 - NEAREST_BOUNDARY)
        c = (self.u - self.v)[:, :k]
        c = c / c.sum(1, keepdim=True) if atoms.affine else c
        return c, objective(atoms, self.matrix, c, self.target)

    def dual(self) -> Tensor:
        """(b,) the dual value of x."""
        return dual_value(self.atoms, self.x, self.target)

    def _slopes(self, x: Tensor) -> Tensor:
        """(b, K + r) slopes of the candidates and of the error term."""
        own = torch.bmm(x.to(self.matrix.dtype)[:, None], self.matrix.mT)[:, 0].double()  # faster than (matrix, x)
        return torch.cat([own, x[:, : len(self.atoms.limit)] / self.atoms.limit], 1)

    def _combined(self, c: Tensor) -> Tensor:
        """(b, p), the transpose of `_slopes`."""
        k, rank = self.candidates.shape[1], len(self.atoms.limit)
        y = torch.bmm(c[:, None, :k].to(self.matrix.dtype), self.matrix)[:, 0].double()
        y[:, :rank] += c[:, k:] / self.atoms.limit
        return y


def over_changing_atoms(atoms: Atoms, start: Start, target: Tensor, own: Tensor | None, tol: float) -> Iterator[Found]:
    """See the top of the file, 1. Tokens as they end, the stalled ones at last with whatever gap they have."""
    n_atoms, n_unknowns = atoms.rows.shape
    k = candidate_atoms(n_unknowns, n_atoms - (own is not None))
    x, slopes, coefficients = start.run(atoms, target, own)
    candidates = slopes.topk(k, sorted=False).indices
    x *= 0.98 / all_slopes(atoms, x, own)[1].clamp_min(0.98)
    it = Iterates(atoms, target, own, candidates, x, coefficients.gather(1, candidates).double())
    del coefficients
    every = CHECK_ON_CUDA if x.is_cuda else 1
    for n_iter in range(1, STALLED + 1):
        found = it.candidates
        c, primal = it.advance()
        _take_in_violators(it, relative_gap(atoms, primal, it.dual()), tol, slopes[: len(c)])
        if n_iter % every and n_iter < STALLED:
            continue
        gap = relative_gap(atoms, primal, it.dual())
        last = ~torch.isfinite(it.x).all(1) | (n_iter == STALLED)
        ended = (last | (gap <= tol)).nonzero()[:, 0]
        if len(ended) == 0:
            continue
        rest = None if it.own is None else it.own[ended]
        primal, gap, _, _ = certificate(atoms, found[ended], c[ended], it.x[ended], it.target[ended], rest)
        sure = last[ended] | (gap <= tol)
        ended = ended[sure]
        yield Found(it.token[ended], found[ended], c[ended], primal[sure], gap[sure], n_iter)
        stay = torch.ones_like(last).index_fill_(0, ended, False)
        if not stay.any():
            return
        it.keep(stay)


def _take_in_violators(it: Iterates, gap: Tensor, tol: float, slopes: Tensor) -> None:
    """Scale x to be feasible for all atoms, and let those of largest slope take the place of the lightest candidates.

    slopes: (b, N) room for the slopes.
    """
    atoms, k = it.atoms, it.candidates.shape[1]
    n_atoms, n_unknowns = atoms.rows.shape
    if k >= n_atoms - (it.own is not None):
        return
    if it.scalars is not None:
        if it.taken is None:
            it.taken = torch.zeros(len(it.x), n_atoms, dtype=torch.uint8, device=it.x.device)
            it.taken.scatter_(1, it.candidates, 1)
            if it.own is not None:
                it.taken.scatter_(1, it.own[:, None], 1)
        scalars = _filled(it.x, MARGIN, PART_OF_GAP * tol, PART_OF_GAP, SMALLEST, float(atoms.affine))
        take_in_violators(  # pyright: ignore[reportPossiblyUnboundVariable]
            *(atoms, it.candidates, it.taken, it.x, it.u, it.v, it.g, it.weights, it.objectives, scalars),
            n_swaps=n_unknowns // 2 or 1,
            tf32=tol >= TF32,
        )
        return
    torch.mm(it.x.to(atoms.rows.dtype), atoms.rows.T, out=slopes).abs_()
    if it.own is not None:
        slopes.scatter_(1, it.own[:, None], -1.0)
    slopes.scatter_(1, it.candidates, -1.0)
    value, atom = _largest_of_groups(slopes, n_unknowns // 2 or 1)
    weights = torch.maximum(it.u / (1 - it.g), it.v / (1 + it.g))[:, :k]
    inside = 1 - (PART_OF_GAP * gap).clamp(PART_OF_GAP * tol, MARGIN)[:, None]
    shrink = inside / value[:, :1].double().maximum(inside)
    it.x, it.g = it.x * shrink, it.g * shrink
    mu = (it.u * (1 - it.g) + it.v * (1 + it.g)).mean(1, keepdim=True) / 2
    rows = atoms.rows[atom]
    new = torch.bmm(it.x.to(rows.dtype)[:, None], rows.mT)[:, 0].double().maximum(-inside).minimum(inside)
    place = weights.topk(value.shape[1], largest=False).indices
    better = value > it.g.gather(1, place).abs().clamp_min(1 - MARGIN)

    def swap(old: Tensor, new: Tensor) -> Tensor:
        return old.scatter(1, place, torch.where(better, new, old.gather(1, place)))

    it.candidates = swap(it.candidates, atom)
    it.u, it.v, it.g = swap(it.u, mu / (1 - new)), swap(it.v, mu / (1 + new)), swap(it.g, new)
    token, column = better.nonzero(as_tuple=True)
    it.matrix[token, place[token, column]] = rows[token, column]


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and find_spec("triton") is not None


def _filled(like: Tensor, *numbers: float) -> Tensor:
    """Numbers as a tensor on a device, each written there: nothing is copied from the host."""
    return torch.cat([like.new_full((1,), number) for number in numbers])


def _largest_of_groups(slopes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """About the k largest of each row (b, N), descending, and their columns: the largest of each of GROUPS groups."""
    n_tokens, n_atoms = slopes.shape
    size = -(-n_atoms // GROUPS)
    groups = torch.nn.functional.pad(slopes, (0, -n_atoms % size), value=-1.0).view(n_tokens, size, -1)
    value, group = groups.amax(1).topk(min(k, groups.shape[2]))
    atom = groups.gather(2, group[:, None].expand(-1, size, -1)).argmax(1) * groups.shape[2] + group
    return value, atom.clamp_max(n_atoms - 1)


def _step(relative: Tensor, part: float) -> Tensor:
    """(b, 1) the step at which the largest relative decrease has used `part` of what there is, at most 1."""
    return part / relative.amax(1, keepdim=True).clamp_min(part)


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
    for _ in range(ROUNDS if n_others > 2 * k else 0):
        c, x, n_iter = _optimum_over(atoms, target, candidates, min(CENTRED, tol / 4))
        before += n_iter
        primal, gap, slopes, largest = certificate(atoms, candidates, c, x, target, own)
        good = largest <= 1 + min(VIOLATION, tol)
        if atoms.affine:
            good |= primal <= 1 + min(CONTAINED, tol)
        good &= gap <= tol
        yield Found(token[good], candidates[good], c[good], primal[good], gap[good], before)
        rest = (~good).nonzero()[:, 0]
        if len(rest) == 0:
            return
        token, target, own = token[rest], target[rest], None if own is None else own[rest]
        kept = candidates[rest].gather(1, c[rest].abs().nan_to_num(nan=0.0).topk(k - k // 2, sorted=False).indices)
        candidates = torch.cat([kept, slopes[rest].scatter_(1, kept, -1.0).topk(k // 2, sorted=False).indices], 1)
    everything = torch.arange(n_others, device=target.device)
    for part in torch.arange(len(token), device=token.device).split(max(1, len(inside) * k // n_others)):
        mine = None if own is None else own[part]
        candidates = everything.expand(len(part), -1) if mine is None else everything + (everything >= mine[:, None])
        c, x, n_iter = _optimum_over(atoms, target[part], candidates, min(CENTRED, tol / 4))
        primal, gap, _, _ = certificate(atoms, candidates, c, x, target[part], mine)
        yield Found(token[part], candidates, c, primal, gap, before + n_iter)


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

    start, parts = Start.of(atoms), torch.arange(n_tokens, device=device).split(plan.block)
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
    values = torch.zeros_like(found.values)
    for i, (atom, c) in enumerate(zip(found.atoms, found.values, strict=True)):
        sign, given = c.sign(), c.abs().cpu().numpy()
        columns = torch.cat([atoms.exact[atom] * sign[:, None], torch.ones_like(c)[:, None]], 1).T.cpu().numpy()
        weights = nnls(columns, columns @ given, maxiter=100 * len(given))[0]
        values[i] = torch.from_numpy(weights).to(c) * sign
    kept = values.abs().topk(min(atoms.exact.shape[1] + 1, values.shape[1]), sorted=False).indices
    return found._replace(atoms=found.atoms.gather(1, kept), values=values.gather(1, kept))
