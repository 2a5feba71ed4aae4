"""A few ADMM iterations over a sample of the atoms, from which the interior point starts."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .atoms import Atoms, dual_value, objective, relative_gap
from .repeated import Repeated

START_ATOMS, RELAXATION = 2048, 1.9
# Iterations and rho: over all atoms where one costs less than a step of the interior point; and else, where few of them
# come further with a larger rho.
LONG, SHORT = (60, 40.0), (20, 100.0)
# More iterations that halve the gap, and interior-point steps that are worth the iterations which make them needless.
HALVING, STEPS_SAVED = 15, 4


@dataclass(frozen=True)
class Start:
    """ADMM (the authors', reformulated) over a fixed sample of the atoms: a dual point and candidates for any token.

    Attributes:
        sample: (m,) int64 atoms, ascending; of all atoms where these are few.
        columns: (p, m) of them.
        inverse: (p, p) of gram + rho I, in the units of `unit` (p,).
        rho: the penalty of ADMM.
        n_iter: iterations to begin with.
        n_rounds: how many times HALVING more cost no more than the interior-point steps that they save.
    """

    sample: Tensor
    columns: Tensor
    inverse: Tensor
    unit: Tensor
    rho: float
    n_iter: int
    n_rounds: int

    @classmethod
    def of(cls, atoms: Atoms, k: int) -> "Start":
        """That of an interior point over k candidates."""
        (n_atoms, n_unknowns), device = atoms.rows.shape, atoms.rows.device
        sample = torch.arange(n_atoms)
        if n_atoms > START_ATOMS:
            sample = torch.randperm(n_atoms, generator=torch.Generator().manual_seed(0))[:START_ATOMS].sort().values
        step = n_unknowns**2 * (2 * k + n_unknowns / 3) / (4 * n_unknowns * (len(sample) + n_unknowns))  # in iterations
        whole = len(sample) == n_atoms  # else iterations have no certificate
        n_iter, rho = LONG if step >= 1 and whole else SHORT
        sample = sample.to(device)
        unit = atoms.scale.clone()
        unit[len(atoms.limit) :] = rho**0.5
        rows = atoms.exact[sample] * unit
        gram = rows.T @ rows
        inverse = torch.linalg.inv(gram + rho * torch.eye(len(unit), dtype=unit.dtype, device=device))
        dtype = atoms.rows.dtype
        columns = atoms.rows[sample].T.contiguous()
        n_rounds = int(STEPS_SAVED * step / HALVING) * whole
        return cls(sample, columns, inverse.to(dtype), unit.to(dtype), rho, n_iter, n_rounds)

    def places(self, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows whose own atom is in the sample, and its place there."""
        if own is None:
            return self.sample[:0], self.sample[:0]
        place = torch.searchsorted(self.sample, own).clamp_max(len(self.sample) - 1)
        rows = (self.sample[place] == own).nonzero()[:, 0]
        return rows, place[rows]


class Admm:
    """The iteration for b targets (b, p) float64, of which `own` (b,) are the atoms of those numbers, or None."""

    def __init__(self, start: Start, atoms: Atoms, target: Tensor, own: Tensor | None) -> None:
        self.start, self.atoms, self.target, self.own = start, atoms, target, own
        self.goal = target.to(start.unit.dtype) * start.unit
        self.offset, self.step = torch.zeros_like(self.goal), self.goal  # the error, the multiplier / sqrt(rho)
        self.state, self.reflected = (self.goal.new_zeros(len(target), len(start.sample)) for _ in range(2))
        self.token = torch.arange(len(target), device=target.device)
        self.rows, self.places = start.places(own)

    def of(self, rows: Tensor) -> "Admm":
        """The same for some of the tokens only, (m,)."""
        part = copy(self)
        for name in ("token", "target", "goal", "offset", "step", "state", "reflected", "own"):
            if (of_all := getattr(self, name)) is not None:
                setattr(part, name, of_all.index_select(0, rows))
        part.rows, part.places = self.start.places(part.own)
        return part

    def advance(self, n_iter: int) -> None:
        """So many iterations."""
        iterate = Repeated(self._iterate, self.goal.device)
        for _ in range(n_iter):
            self.step = iterate()

    def _iterate(self) -> Tensor:
        """One; the new step, all else in place."""
        start, rank, bound, rho = self.start, len(self.atoms.limit), self.atoms.bound, self.start.rho
        offset, state, reflected = self.offset, self.state, self.reflected
        expressed = reflected @ start.columns[:rank].T
        if self.atoms.affine:  # the last column is of ones: a product with 65 columns costs 1.2 times one with 64
            expressed = torch.cat([expressed, reflected.sum(1, keepdim=True)], 1)
        step = (self.goal - offset - expressed * start.unit) @ start.inverse
        misfit = offset + rho * step
        offset[:, :rank] = misfit[:, :rank] - misfit[:, :rank].clamp(-bound, bound)
        offset[:, rank:] -= RELAXATION * misfit[:, rank:]
        state.lerp_(reflected, RELAXATION / 2).addmm_(step * start.unit, start.columns, alpha=RELAXATION)
        torch.clamp(state, -1 / rho, 1 / rho, out=reflected)
        torch.add(state, reflected, alpha=-2, out=reflected)  # 2 C - state
        reflected[self.rows, self.places] = -state[self.rows, self.places]
        return step

    def point(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(b, p) float64 dual point; (b, k) candidates and their float64 coefficients; (b, N) room for slopes."""
        rho, sample = self.start.rho, self.start.sample
        x = rho * (self.step * self.start.unit).double()
        slopes = (x.to(self.atoms.rows.dtype) @ self.atoms.rows.T).abs_()
        slopes[:, sample] = self.state.abs() * rho
        if self.own is not None:
            slopes.scatter_(1, self.own[:, None], -1.0)
        candidates = slopes.topk(k, sorted=False).indices
        coefficients = torch.zeros_like(slopes)
        coefficients[:, sample] = (self.state + self.reflected) / 2
        return x, candidates, coefficients.gather(1, candidates).double(), slopes

    def gap(self) -> Tensor:
        """(b,) about the relative gap, where all atoms are in the sample."""
        atoms = self.atoms
        x, c = self.start.rho * (self.step * self.start.unit), (self.state + self.reflected) / 2
        slopes = (x @ self.start.columns).abs_()
        slopes[self.rows, self.places] = c[self.rows, self.places] = 0
        c = c / c.sum(1, keepdim=True) if atoms.affine else c
        x = (x / slopes.amax(1, keepdim=True).clamp_min(1)).double()
        primal = objective(atoms, c @ atoms.rows, c, self.target)
        return relative_gap(atoms, primal, dual_value(atoms, x, self.target))
