"""Iterates of the interior point: a step of many tokens over candidates of their own, and the swap of candidates."""

from importlib.util import find_spec

import torch
from torch import Tensor

from .atoms import SMALLEST, TINY, Atoms, dual_value, objective, relative_gap

if find_spec("triton"):  # not there on every platform
    from .newton_kernel import fits, newton_step
    from .slopes_kernel import take_in_violators

STEP, NEAREST_BOUNDARY = 0.97, 1e-12  # part of the way to the boundary, and where a slope ends by rounding
LEAST_CENTRING = 0.03  # of the complementarity, at which the corrector aims: 2% fewer iterations (rank 64, gap 1e-3)
MARGIN, PART_OF_GAP = 0.01, 0.3  # distance of other atoms from the boundary, at first, and as a part of the gap
GROUPS = 512  # of atoms, of which only the largest slope may join the candidates
TF32 = 1e-3  # below this tolerance the slopes on a GPU need whole float32


def ridge_of(dtype: torch.dtype) -> float:
    """What is added to the normal matrix's diagonal, as a part of it."""
    return 1e-7 if dtype == torch.float32 else 1e-15


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
        open: (b,) uint8, 0 for tokens that have ended but are kept, which the kernels leave as they are.
    """

    def __init__(
        self, atoms: Atoms, target: Tensor, own: Tensor | None, candidates: Tensor, x: Tensor, coefficients: Tensor
    ) -> None:
        self.atoms, self.target, self.own, self.candidates, self.x = atoms, target, own, candidates, x
        self.token = torch.arange(len(target), device=x.device)
        self.matrix = torch.nn.functional.embedding(candidates, atoms.rows)  # faster than rows[candidates]
        self.open = torch.ones(len(target), dtype=torch.uint8, device=x.device)
        self.taken: Tensor | None = None  # (b, N) uint8: what may not join the candidates, for the kernels
        self.margins: Tensor | None = None  # of the swap
        self.weights: Tensor | None = None
        self.objectives: Tensor | None = None
        self.g = self._slopes(x)
        c = torch.nn.functional.pad(coefficients, (0, len(atoms.limit)))
        level = self.dual()[:, None].abs()
        room = (c.abs().sum(1, keepdim=True) - self.dual()[:, None]).abs().maximum(1e-2 * level).clamp_min(SMALLEST)
        mu = room / c.shape[1]
        self.u, self.v = c.clamp_min(0) + mu / (1 - self.g), (-c).clamp_min(0) + mu / (1 + self.g)
        self.scalars = None
        if _runs_triton(x) and fits(atoms):  # pyright: ignore[reportPossiblyUnboundVariable]
            # the kernels gather the candidates' rows themselves, and write into x
            self.x = x.clone()
            self.matrix, self.scalars = (
                self.matrix[:, :0],
                _filled(x, atoms.bound, STEP, NEAREST_BOUNDARY, ridge_of(atoms.rows.dtype), LEAST_CENTRING),
            )

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the tokens only, a mask (b,)."""
        rows = rows.nonzero()[:, 0]  # the host asks the device once, not for each array
        if len(rows) == len(self.x):
            return
        for name in ("token", "open", "own", "target", "candidates", "matrix", "x", "u", "v", "g", "taken"):
            if (of_all := getattr(self, name)) is not None:
                setattr(self, name, of_all.index_select(0, rows))

    def advance(self, *, together: bool = False) -> tuple[Tensor, Tensor]:
        """A step of Mehrotra's predictor-corrector: normal matrix and factor in the precision of atoms.rows.

        Args:
            together: the primal and the dual step have one length, slower but safer.

        Returns:
            (b, K) float64 coefficients, of sum 1 if affine, not finite where that cannot be; and (b,) their objective.
        """
        atoms, u, v, g = self.atoms, self.u, self.v, self.g
        if self.scalars is not None:
            c, self.weights, self.objectives = newton_step(  # pyright: ignore[reportPossiblyUnboundVariable]
                atoms, self.open, self.candidates, self.target, self.x, u, v, g, self.scalars, together=together
            )
            return c, self.objectives[:, 0]
        dtype, rank, k = self.matrix.dtype, len(atoms.limit), self.candidates.shape[1]
        above, below = 1 - g, 1 + g
        weight = u / above + v / below
        features, mean, total = self.matrix[:, :, :rank], None, weight[:, :k].sum(1, keepdim=True)
        if atoms.affine:  # mu, whose column is 1, is eliminated first: what is left is better conditioned
            mean = torch.bmm((weight[:, None, :k] / total[:, None]).to(dtype), features)
            features, mean = features - mean, mean[:, 0].double()
        features = features * weight[:, :k, None].sqrt().to(dtype)
        normal = torch.bmm(features.mT, features)  # of one array twice: faster than of two
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += (atoms.quadratic[:rank] + weight[:, k:] / atoms.limit**2).to(dtype)
        diagonal *= 1 + ridge_of(dtype)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if failed.any():
            ridge = (1e-4 if dtype == torch.float32 else 1e-10) * diagonal
            firm = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))[0]
            factor = torch.where((failed > 0)[:, None, None], firm, factor)
        slope = self.target - atoms.quadratic * self.x

        def solved(right: Tensor) -> Tensor:
            of_nu, of_mu = right[:, :rank], right[:, rank:]
            of_nu = of_nu if mean is None else of_nu - mean * of_mu
            nu = torch.cholesky_solve(of_nu.to(dtype)[..., None], factor)[..., 0].double()
            return nu if mean is None else torch.cat([nu, of_mu / total - (mean * nu).sum(1, keepdim=True)], 1)

        dg = self._slopes(solved(slope))  # predictor
        a, b = dg / above, dg / below
        step = _step(torch.maximum(torch.maximum(a, 1 - a), torch.maximum(-b, 1 + b)), 1.0)  # primal and dual
        mu = ((1 - step) ** 3).clamp_min(LEAST_CENTRING) * (u * above + v * below).mean(1, keepdim=True) / 2
        to_u, to_v = (mu - u * dg * (1 - a)) / above, (mu + v * dg * (1 + b)) / below  # centred, of second order
        dx = solved(slope - self._combined(to_u - to_v))
        dg = self._slopes(dx)
        a, b = dg / above, dg / below
        du, dv = torch.addcmul(to_u - u, u, a), torch.addcmul(to_v - v, v, b, value=-1)
        primal, dual = _step(torch.maximum(-du / u, -dv / v), STEP), _step(torch.maximum(a, -b), STEP)
        if together:
            primal = dual = primal.minimum(dual)
        self.u, self.v = torch.addcmul(u, primal, du).clamp_min_(TINY), torch.addcmul(v, primal, dv).clamp_min_(TINY)
        self.x, self.g = torch.addcmul(self.x, dual, dx), torch.addcmul(g, dual, dg)
        self.g.clamp_(-1 + NEAREST_BOUNDARY, 1 - NEAREST_BOUNDARY)
        c = (self.u - self.v)[:, :k]
        c = c / c.sum(1, keepdim=True) if atoms.affine else c
        expressed = torch.bmm(c[:, None].to(dtype), self.matrix)[:, 0].double()
        return c, objective(atoms, expressed, c, self.target)

    @property
    def is_fused(self) -> bool:
        """Whether kernels make the step, in place and without asking the host."""
        return self.scalars is not None

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


def swap_candidates(it: Iterates, primal: Tensor, tol: float, slopes: Tensor) -> None:
    """Scale x to be feasible for all atoms, and let those of largest slope take the place of the lightest candidates.

    primal: (b,) objective that `advance` gave; slopes: (b, N) room for the slopes.
    """
    atoms, k = it.atoms, it.candidates.shape[1]
    n_atoms, n_unknowns = atoms.rows.shape
    if k >= n_atoms - (it.own is not None):
        return
    if it.scalars is not None:
        taken = it.taken
        if taken is None:
            taken = torch.zeros(len(it.x), n_atoms, dtype=torch.uint8, device=it.x.device).scatter_(1, it.candidates, 1)
            it.taken = taken if it.own is None else taken.scatter_(1, it.own[:, None], 1)
            it.margins = _filled(it.x, MARGIN, PART_OF_GAP * tol, PART_OF_GAP, SMALLEST, float(atoms.affine))
        assert it.weights is not None  # of the step before
        assert it.objectives is not None
        assert it.margins is not None
        take_in_violators(  # pyright: ignore[reportPossiblyUnboundVariable]
            *(atoms, it.open, it.candidates, taken, it.x, it.u, it.v, it.g, it.weights, it.objectives, it.margins),
            n_swaps=n_unknowns // 2 or 1,
            tf32=tol >= TF32,
        )
        return
    torch.mm(it.x.to(atoms.rows.dtype), atoms.rows.T, out=slopes).abs_()
    if it.own is not None:
        slopes.scatter_(1, it.own[:, None], -1.0)
    slopes.scatter_(1, it.candidates, -1.0)
    top = _largest_in_groups(slopes)
    most = top.amax(1, keepdim=True).double()
    inside = 1 - (PART_OF_GAP * relative_gap(atoms, primal, it.dual())).clamp(PART_OF_GAP * tol, MARGIN)[:, None]
    shrink = inside / most.maximum(inside)
    some = (most[:, 0] > 1 - MARGIN).nonzero()[:, 0]  # the others have no violator
    u, v, g = it.u[some], it.v[some], it.g[some]
    weights = torch.maximum(u / (1 - g), v / (1 + g))[:, :k]
    it.x, it.g = it.x * shrink, it.g * shrink
    g *= shrink[some]
    mu = (u * (1 - g) + v * (1 + g)).mean(1) / 2
    value, group = top[some].topk(min(n_unknowns // 2 or 1, top.shape[1]))
    atom = _members(slopes, some, group).max(1).indices * GROUPS + group  # argmax is much slower
    place = weights.topk(value.shape[1], largest=False).indices
    row, column = (value > g.gather(1, place).abs().clamp_min(1 - MARGIN)).nonzero(as_tuple=True)
    where, atom, mu = (some[row], place[row, column]), atom[row, column], mu[row]
    rows = atoms.rows[atom]
    new = (it.x[where[0]] * rows).sum(1, keepdim=True)
    new = new.maximum(-inside[where[0]]).minimum(inside[where[0]])[:, 0]
    it.candidates, it.g = it.candidates.index_put(where, atom), it.g.index_put_(where, new)
    it.u, it.v = it.u.index_put(where, mu / (1 - new)), it.v.index_put(where, mu / (1 + new))
    it.matrix[where] = rows


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and find_spec("triton") is not None


def _filled(like: Tensor, *numbers: float) -> Tensor:
    """Numbers as a tensor on a device, each written there: nothing is copied from the host."""
    return torch.cat([like.new_full((1,), number) for number in numbers])


def largest(slopes: Tensor, k: int) -> Tensor:
    """(b, k) columns of the k largest of each row (b, N), which are all in the k groups of largest maximum."""
    top = _largest_in_groups(slopes)
    if k >= top.shape[1]:
        return slopes.topk(k, sorted=False).indices
    group = top.topk(k, sorted=False).indices
    every = torch.arange(len(slopes), device=slopes.device)
    place = _members(slopes, every, group).flatten(1).topk(k, sorted=False).indices
    return place // k * GROUPS + group.gather(1, place % k)


def _largest_in_groups(slopes: Tensor) -> Tensor:
    """(b, at most GROUPS) the largest of each group: columns that lie GROUPS apart are a group."""
    n = slopes.shape[1] // GROUPS * GROUPS
    whole, rest = slopes[:, :n].unflatten(1, (-1, GROUPS)), slopes[:, n:]  # views: nothing is copied
    if whole.shape[1] == 0:
        return rest
    top = whole.amax(1)
    torch.maximum(top[:, : rest.shape[1]], rest, out=top[:, : rest.shape[1]])
    return top


def _members(slopes: Tensor, rows: Tensor, group: Tensor) -> Tensor:
    """(m, size, k) the members of groups (m, k) of some rows (m,), -1 for what is missing."""
    n_atoms = slopes.shape[1]
    column = torch.arange(0, n_atoms, GROUPS, device=group.device)[:, None] + group[:, None]
    members = slopes[rows[:, None, None], column.clamp_max(n_atoms - 1)]
    return members.masked_fill_(column >= n_atoms, -1.0)


def _step(relative: Tensor, part: float) -> Tensor:
    """(b, 1) the step at which the largest relative decrease has used `part` of what there is, at most 1."""
    return part / relative.amax(1, keepdim=True).clamp_min(part)
