"""ADMM iterates of the self-expression, for any tokens over any atoms, and the certificate of what they found."""

import math
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from .memory import chunk_rows

if find_spec("triton"):  # not there on every platform
    from .fused import update_state

TINY = 1e-300


@dataclass(frozen=True)
class Dictionary:
    """Atoms that express tokens, and the small matrices that an iteration needs.

    Either K atoms that all tokens share, or K atoms for each of b tokens: then every array leads with a dimension b.
    p is r + 1 if affine, else r.

    Attributes:
        factor: (p, K) or (b, p, K): the weighted atoms sqrt(lambda_z) Y, and if affine a last row sqrt(rho).
        gram: (p, p) or (b, p, p), factor factor'.
        inverse: (p, p) or (b, p, p), the inverse of gram + rho I.
        rank: r.
        rho: ADMM penalty.
    """

    factor: Tensor
    gram: Tensor
    inverse: Tensor
    rank: int
    rho: float

    @classmethod
    def of(cls, atoms: Tensor, *, affine: bool, rho: float, dtype: torch.dtype) -> "Dictionary":
        """From weighted float64 atoms (r, K) or (b, r, K); computed in float64, kept in `dtype`."""
        rank = atoms.shape[-2]
        if affine:
            row = atoms.new_full((*atoms.shape[:-2], 1, atoms.shape[-1]), rho**0.5)
            atoms = torch.cat([atoms, row], dim=-2)
        gram = atoms @ atoms.mT
        shifted = gram + rho * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.inv_ex(shifted).inverse  # positive definite: no check that waits for the device
        return cls(atoms.to(dtype), gram.to(dtype), inverse.to(dtype), rank, rho)

    @property
    def affine(self) -> bool:
        return self.factor.shape[-2] > self.rank

    def of_tokens(self, tokens: Tensor | slice) -> "Dictionary":
        """The dictionaries of some of the tokens."""
        if self.factor.ndim == 2:
            return self
        return Dictionary(self.factor[tokens], self.gram[tokens], self.inverse[tokens], self.rank, self.rho)


class Admm:
    """Iterates of b tokens, one a row; rows are independent problems.

    The authors' iterates need rho I + F'F, N x N. By the Woodbury identity its inverse follows from the p x p
    `Dictionary.inverse`, and the splitting variable C and its multiplier are both functions of one state V:
    C = shrink(V, 1/rho) without a token's own weight, multiplier rho (V - C). With relaxation 1 the iterates are
    theirs.

    Args:
        dictionary: the atoms.
        targets: (b, r) weighted tokens, in the dictionary's dtype.
        own: (b,) int64, the atom that is the token itself and may not express it; None where no atom is.
        error_bound: lambda_e / sqrt(lambda_z), the threshold of the error term.
        relaxation: over-relaxation, 1 is plain ADMM.
        start: (b, K) state to start from; zero otherwise.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        targets: Tensor,
        own: Tensor | None,
        *,
        error_bound: float,
        relaxation: float,
        start: Tensor | None = None,
    ) -> None:
        self.dictionary = dictionary
        self.error_bound = error_bound
        self.relaxation = relaxation
        # For the fused pass, as a tensor: Triton's scalar arguments are float32.
        self.settings = _filled(targets, 1 / dictionary.rho, relaxation) if _runs_triton(targets) else None
        self.own = None if own is None else own[:, None]
        self.target = targets
        if dictionary.affine:
            self.target = torch.cat([targets, targets.new_full((len(targets), 1), dictionary.rho**0.5)], dim=1)
        self.offset = torch.zeros_like(self.target)  # the error e, and the constraint's multiplier / sqrt(rho)
        self.step = torch.zeros_like(self.target)
        shape = (len(targets), dictionary.factor.shape[-1])
        self.state = targets.new_zeros(shape) if start is None else start.clone()
        self.reflected = torch.empty_like(self.state)
        self._reflect()

    def advance(self) -> None:
        """One iteration: two products with the factor, and passes over the state."""
        dictionary, rank = self.dictionary, self.dictionary.rank
        expressed = product(self.reflected, dictionary.factor.mT)
        self.step = product(self.target - self.offset - expressed, dictionary.inverse)
        expressed += product(self.step, dictionary.gram)
        misfit = self.target - expressed
        self.offset[:, :rank] = misfit[:, :rank] - misfit[:, :rank].clamp(-self.error_bound, self.error_bound)
        self.offset[:, rank:] -= self.relaxation * misfit[:, rank:]
        if self.settings is not None:
            update_state(self.state, product(self.step, dictionary.factor), self.reflected, self.own, self.settings)  # pyright: ignore[reportPossiblyUnboundVariable]
            return
        self.state.lerp_(self.reflected, self.relaxation / 2)  # state + relaxation (C - state)
        if dictionary.factor.ndim == 2:
            self.state.addmm_(self.step, dictionary.factor, alpha=self.relaxation)
        else:
            self.state.add_(product(self.step, dictionary.factor), alpha=self.relaxation)
        self._reflect()

    def _reflect(self) -> None:
        """reflected = 2 C - state."""
        bound = 1 / self.dictionary.rho
        torch.clamp(self.state, -bound, bound, out=self.reflected)
        torch.add(self.state, self.reflected, alpha=-2, out=self.reflected)
        if self.own is not None:
            self.reflected.scatter_(1, self.own, -self.state.gather(1, self.own))

    def coefficients(self, rows: slice | Tensor) -> Tensor:
        """(b, K) coefficients C of some rows."""
        return (self.state[rows] + self.reflected[rows]).mul_(0.5)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        self.dictionary = self.dictionary.of_tokens(rows)
        self.own = None if self.own is None else self.own[rows]
        for name in ("target", "offset", "step", "state", "reflected"):
            setattr(self, name, getattr(self, name)[rows])

    def join(self, other: "Admm") -> None:
        """Go on with the rows of another one too; each token has its own atoms, as many there as here."""
        mine, theirs = self.dictionary, other.dictionary
        self.dictionary = Dictionary(
            torch.cat([mine.factor, theirs.factor]),
            torch.cat([mine.gram, theirs.gram]),
            torch.cat([mine.inverse, theirs.inverse]),
            mine.rank,
            mine.rho,
        )
        for name in ("target", "offset", "step", "state", "reflected"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def gaps(self) -> Tensor:
        """(b,) relative duality gaps of the present coefficients, see `relative_gap`."""
        gaps = torch.empty(len(self.target), dtype=torch.float64, device=self.target.device)
        size = chunk_rows(self.state.shape[1])
        for first in range(0, len(gaps), size):
            rows = slice(first, first + size)
            gaps[rows] = self.relative_gap(rows, self.coefficients(rows))
        return gaps

    def largest(self, rows: Tensor, k: int) -> "Rows":
        """The k largest coefficients of some rows (b,), divided by their sum if affine, with the gap of these k.

        Where there are more than k, the optimum is not unique (a token in the hull of many others, in few dimensions):
        coefficients of the same objective with fewer nonzeros take their place first, see `_fewest`.
        """
        found = Rows.empty(len(rows), k, self.state.dtype, rows.device)
        for first in range(0, len(rows), chunk_rows(self.state.shape[1])):
            part = slice(first, first + chunk_rows(self.state.shape[1]))
            coefficients = self.coefficients(rows[part])
            spread = (coefficients != 0).sum(1) > k
            for row in np.flatnonzero(spread.cpu()) if k < coefficients.shape[1] else ():
                atoms = self.dictionary.of_tokens(rows[part][row]).factor[: self.dictionary.rank]
                coefficients[row] = _fewest(coefficients[row], atoms)
            found.indices[part] = coefficients.abs().topk(k).indices
            kept = coefficients.gather(1, found.indices[part])
            coefficients.zero_().scatter_(1, found.indices[part], kept)
            found.gap[part] = self.relative_gap(rows[part], coefficients)
            found.values[part] = self.of_unit_sum(kept)
        return found

    def of_unit_sum(self, coefficients: Tensor) -> Tensor:
        """Coefficients (b, k), divided by their sum if affine; unchanged where that is not positive."""
        if not self.dictionary.affine:
            return coefficients
        sums = coefficients.sum(1, keepdim=True)
        return torch.where(sums > 0, coefficients / sums, coefficients)

    def largest_slope(self, rows: slice | Tensor) -> Tensor:
        """(b,) float64 |F' nu + mu|_inf of some rows over all atoms but the token itself, see `relative_gap`."""
        slopes = product(self.step[rows], self.dictionary.of_tokens(rows).factor)
        if self.own is not None:
            slopes.scatter_(1, self.own[rows], 0.0)
        return slopes.abs_().amax(1).double() * self.dictionary.rho

    def relative_gap(self, rows: slice | Tensor, coefficients: Tensor, largest_slope: Tensor | None = None) -> Tensor:
        """How far coefficients of some rows can lie above the optimum, relative to their objective.

        In weighted features, with t the token, F the atoms, and bound = lambda_e / sqrt(lambda_z):

            primal = |c|_1 + bound |e|_1 + |t - F c - e|^2 / 2,  e = shrink(t - F c, bound),  sum(c) = 1 if affine
            dual   = <t, nu> - |nu|^2 / 2 + mu,                  |F' nu + mu|_inf <= 1,  |nu|_inf <= bound

        The coefficients are divided by their sum if affine. A dual point comes with every iteration, rho times the
        step; it is scaled to be feasible.

        Args:
            rows: (b,) indices or a slice.
            coefficients: (b, K).
            largest_slope: (b,) float64 |F' nu + mu|_inf over more atoms than these, whose coefficients are 0.

        Returns:
            (b,) float64 (primal - dual) / primal; infinite where the sum of affine coefficients is not positive.
        """
        dictionary, rank, bound = self.dictionary.of_tokens(rows), self.dictionary.rank, self.error_bound
        largest = self.largest_slope(rows) if largest_slope is None else largest_slope
        dual_point = self.step[rows].double() * dictionary.rho
        nu, mu = dual_point[:, :rank], dual_point[:, rank:].sum(1) * dictionary.rho**0.5
        if rank:
            largest = torch.maximum(largest, nu.abs().amax(1) / bound)
        target = self.target[rows, :rank].double()
        linear, square = (target * nu).sum(1) + mu, nu.square().sum(1)
        scale = torch.minimum(1 / largest.clamp_min(1), linear.clamp_min(0) / square.clamp_min(TINY))
        dual = scale * linear - scale.square() * square / 2
        l1 = coefficients.abs().sum(1).double()
        expressed = product(coefficients, dictionary.factor[..., :rank, :].mT).double()
        sums = coefficients.sum(1).double() if dictionary.affine else torch.ones_like(l1)
        residual = target - expressed / sums[:, None]
        fit = residual.clamp(-bound, bound)
        primal = l1 / sums + bound * (residual - fit).abs().sum(1) + fit.square().sum(1) / 2
        gap = (primal - dual).clamp_min(0) / primal.clamp_min(TINY)
        return torch.where(sums > 0, gap, math.inf)


@dataclass(frozen=True)
class Rows:
    """Sparse coefficients of b tokens, one a row, the largest first.

    Attributes:
        indices: (b, k) int64 atoms.
        values: (b, k) their weights; unused slots hold 0.
        gap: (b,) float64 relative duality gap, see `Admm.relative_gap`.
        n_iter: (b,) int64 iterations.
    """

    indices: Tensor
    values: Tensor
    gap: Tensor
    n_iter: Tensor

    @classmethod
    def empty(cls, n_tokens: int, k: int, dtype: torch.dtype, device: torch.device) -> "Rows":
        """Rows to be filled; their gap is infinite."""
        return cls(
            torch.zeros(n_tokens, k, dtype=torch.int64, device=device),
            torch.zeros(n_tokens, k, dtype=dtype, device=device),
            torch.full((n_tokens,), math.inf, dtype=torch.float64, device=device),
            torch.zeros(n_tokens, dtype=torch.int64, device=device),
        )

    def __getitem__(self, rows: Tensor | slice) -> "Rows":
        return Rows(self.indices[rows], self.values[rows], self.gap[rows], self.n_iter[rows])

    def to(self, dtype: torch.dtype) -> "Rows":
        """With values in another precision."""
        return Rows(self.indices, self.values.to(dtype), self.gap, self.n_iter)

    def __setitem__(self, rows: Tensor | slice, other: "Rows") -> None:
        self.indices[rows], self.values[rows] = other.indices, other.values
        self.gap[rows], self.n_iter[rows] = other.gap, other.n_iter


def _fewest(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """Coefficients (K,) of at most r + 2 of the same atoms (r, K), with the same signs, fit, sum and L1 norm.

    A vertex of the polytope of all such coefficients, by nonnegative least squares (Lawson and Hanson) on the CPU.
    """
    support = coefficients.nonzero()[:, 0]
    given = coefficients[support].double().cpu().numpy()
    sign = np.sign(given)
    rows = np.vstack([atoms[:, support].double().cpu().numpy() * sign, sign, np.ones_like(sign)])
    weights = nnls(rows, rows @ np.abs(given), maxiter=100 * len(given))[0]
    fewest = torch.from_numpy(weights * sign).to(coefficients)
    return torch.zeros_like(coefficients).index_put_((support,), fewest)


def _filled(like: Tensor, *numbers: float) -> Tensor:
    """Numbers as a tensor on a device, each written there: nothing is copied from the host."""
    return torch.cat([like.new_full((1,), number) for number in numbers])


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and find_spec("triton") is not None


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """(b, m) rows times one (m, n) matrix, or each times its own of (b, m, n)."""
    return rows @ matrix if matrix.ndim == 2 else torch.bmm(rows[:, None], matrix)[:, 0]
