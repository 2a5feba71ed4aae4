"""The dual problem of a token's self-expression over atoms, and the certificate of what was found for it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .problem import Problem

SMALLEST = 1e-6  # a smaller objective counts as this one: that of a zero token is 0
TINY = 1e-300


@dataclass(frozen=True)
class Atoms:
    """The dual's constraints, an atom a row, in units of x in which the normal matrix has a diagonal near 1.

    Attributes:
        exact: (N, p) float64.
        rows: (N, p) the same in the precision of the iteration.
        scale: (p,) float64, the unit of each unknown.
        limit: (r,) float64, |x[:r]| <= limit is the error term's constraint.
        bound: the error term's weight.
        affine: x has the unknown mu.
    """

    exact: Tensor
    rows: Tensor
    scale: Tensor
    limit: Tensor
    bound: float
    affine: bool

    @classmethod
    def of(cls, problem: Problem, dtype: torch.dtype) -> "Atoms":
        scale = problem.atoms.square().mean(1).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        limit, exact = problem.error_bound * scale, _rows(problem.atoms, scale, problem.affine)
        if problem.affine:
            scale = torch.cat([scale, scale.new_ones(1)])
        return cls(exact, exact.to(dtype), scale, limit, problem.error_bound, problem.affine)

    def targets(self, tokens: Tensor) -> Tensor:
        """(n, p) of weighted tokens (r, n)."""
        return _rows(tokens, self.scale[: len(self.limit)], self.affine)

    @cached_property
    def quadratic(self) -> Tensor:
        """(p,) q of the dual's <t, x> - <x, q x> / 2."""
        return torch.nn.functional.pad(self.scale[: len(self.limit)] ** -2, (0, int(self.affine)))


def _rows(features: Tensor, scale: Tensor, affine: bool) -> Tensor:
    return torch.nn.functional.pad((features / scale[:, None]).T, (0, int(affine)), value=1.0).contiguous()


def dual_value(atoms: Atoms, x: Tensor, target: Tensor) -> Tensor:
    """(b,) <t, x> - |nu|^2 / 2; not raised to 1."""
    return (target * x).sum(1) - (x.square() * atoms.quadratic).sum(1) / 2


def objective(atoms: Atoms, expressed: Tensor, c: Tensor, target: Tensor) -> Tensor:
    """(b,) primal objective of c (b, K), by which (b, p) is expressed."""
    rank = len(atoms.limit)
    residual = (target[:, :rank] - expressed[:, :rank]) * atoms.scale[:rank]
    fit = residual.clamp(-atoms.bound, atoms.bound)
    return c.abs().sum(1) + atoms.bound * (residual - fit).abs().sum(1) + fit.square().sum(1) / 2


def relative_gap(atoms: Atoms, primal: Tensor, dual: Tensor) -> Tensor:
    """(b,) how far the objective can lie above the optimum, relative to it; infinite where something is not finite."""
    gap = (primal - dual.clamp_min(float(atoms.affine))) / primal.clamp_min(SMALLEST)
    return gap.clamp_min(0).nan_to_num(nan=torch.inf)


def all_slopes(atoms: Atoms, x: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b, N) float64 absolute slopes of all atoms, -1 for the token itself; (b, 1) the largest, error term and all."""
    slopes = (x @ atoms.exact.T).abs_()
    if own is not None:
        slopes.scatter_(1, own[:, None], -1.0)
    error = (x[:, : len(atoms.limit)] / atoms.limit).abs()
    largest = slopes.amax(1, keepdim=True)
    return slopes, largest if error.shape[1] == 0 else largest.maximum(error.amax(1, keepdim=True))


def certificate(
    atoms: Atoms, found: Tensor, c: Tensor, x: Tensor, target: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(b,) objective and relative gap of c (b, K) over atoms `found`, with x scaled to be feasible, all in float64; and
    the slopes of `all_slopes`."""
    expressed = torch.nn.functional.embedding_bag(found, atoms.exact, per_sample_weights=c, mode="sum")
    primal = objective(atoms, expressed, c, target)
    slopes, largest = all_slopes(atoms, x, own)
    gap = relative_gap(atoms, primal, dual_value(atoms, x / largest.clamp_min(1), target))
    return primal, gap, slopes, largest[:, 0]
