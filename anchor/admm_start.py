"""A few ADMM iterations over a sample of the atoms, from which the interior point starts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .atoms import Atoms

START_ATOMS, START_ITERATIONS, RHO, RELAXATION = 2048, 60, 40.0, 1.8


@dataclass(frozen=True)
class Start:
    """ADMM (the authors', reformulated) over a fixed sample of the atoms: a dual point and candidates for any token.

    Attributes:
        sample: (m,) int64 atoms, ascending; of all atoms where these are few.
        columns: (p, m) of them.
        gram, inverse: (p, p), and of gram + RHO I, in the units of `unit` (p,).
    """

    sample: Tensor
    columns: Tensor
    gram: Tensor
    inverse: Tensor
    unit: Tensor

    @classmethod
    def of(cls, atoms: Atoms) -> "Start":
        n_atoms, device = len(atoms.rows), atoms.rows.device
        sample = torch.arange(n_atoms)
        if n_atoms > START_ATOMS:
            sample = torch.randperm(n_atoms, generator=torch.Generator().manual_seed(0))[:START_ATOMS].sort().values
        sample = sample.to(device)
        unit = atoms.scale.clone()
        unit[len(atoms.limit) :] = RHO**0.5
        rows = atoms.exact[sample] * unit
        gram = rows.T @ rows
        inverse = torch.linalg.inv(gram + RHO * torch.eye(len(unit), dtype=unit.dtype, device=device))
        dtype = atoms.rows.dtype
        columns = atoms.rows[sample].T.contiguous()
        return cls(sample, columns, gram.to(dtype), inverse.to(dtype), unit.to(dtype))

    def run(self, atoms: Atoms, target: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(b, p) float64 dual point; (b, N) slopes by which candidates are chosen, -1 for the token itself; (b, N)
        coefficients, 0 outside the sample."""
        rank, n_atoms = len(atoms.limit), len(atoms.rows)
        goal = target.to(self.unit.dtype) * self.unit
        offset, step = torch.zeros_like(goal), goal  # the error and the constraint's multiplier / sqrt(rho)
        state, reflected = (goal.new_zeros(len(goal), len(self.sample)) for _ in range(2))
        rows, places = self._places(own)
        for _ in range(START_ITERATIONS):
            expressed = (reflected @ self.columns.T) * self.unit
            step = (goal - offset - expressed) @ self.inverse
            misfit = goal - expressed - step @ self.gram
            offset[:, :rank] = misfit[:, :rank] - misfit[:, :rank].clamp(-atoms.bound, atoms.bound)
            offset[:, rank:] -= RELAXATION * misfit[:, rank:]
            state.lerp_(reflected, RELAXATION / 2).addmm_(step * self.unit, self.columns, alpha=RELAXATION)
            torch.clamp(state, -1 / RHO, 1 / RHO, out=reflected)
            torch.add(state, reflected, alpha=-2, out=reflected)  # 2 C - state
            reflected[rows, places] = -state[rows, places]
        x = RHO * (step * self.unit).double()
        slopes = (x.to(atoms.rows.dtype) @ atoms.rows.T).abs_()
        slopes[:, self.sample] = state.abs() * RHO
        coefficients = slopes.new_zeros(len(goal), n_atoms)
        coefficients[:, self.sample] = (state + reflected) / 2
        if own is not None:
            slopes.scatter_(1, own[:, None], -1.0)
            coefficients.scatter_(1, own[:, None], 0.0)
        return x, slopes, coefficients

    def _places(self, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows whose own atom is in the sample, and its place there."""
        if own is None:
            return self.sample[:0], self.sample[:0]
        place = torch.searchsorted(self.sample, own).clamp_max(len(self.sample) - 1)
        rows = (self.sample[place] == own).nonzero()[:, 0]
        return rows, place[rows]
