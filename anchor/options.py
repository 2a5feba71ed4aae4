"""Settings of the self-expression problem and of its solver."""

from dataclasses import dataclass
from typing import Literal, get_args

from .validation import check_choice, check_integer, check_number

Algorithm = Literal["auto", "dense", "blocked", "working-set", "authors"]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Settings of the self-expression problem and of its solver.

    Attributes:
        algorithm: how the problem is solved. The first four reach the same optimum within `tol`.
            "dense": all tokens at once, memory grows with N^2.
            "blocked": blocks of tokens, each over all atoms; memory grows with N.
            "working-set": every token over a few candidate atoms, chosen anew until the gap over all atoms is within
            `tol`; memory grows with N.
            "auto": the one that is fastest on a CPU: "working-set" if the tokens are 8 times the candidates (from 1,024
            tokens on up to rank 41, from 1,560 at rank 64), else "dense" below 2,048 tokens; "blocked" from there on,
            and where the other does not fit.
            "authors": the authors' iterates, in float64 and without over-relaxation, and their stopping rule: the
            largest absolute row sum of the difference of the two copies of W is below 2e-4. It stops at some
            distance from the optimum, and memory grows with N^2. `tol`, `rho` and `relaxation` are not used: the
            published rho is 300.
        affine: the coefficients of a token sum to 1.
        alpha_e: the weight of the L1 error is alpha_e / mu_e (see `penalty_weights`).
        alpha_z: the weight of the squared residual is alpha_z / mu_z.
        rho: ADMM penalty; None: twice the root of the number of atoms.
        relaxation: ADMM over-relaxation, between 0 and 2; 1 is plain ADMM.
        max_iter: iterations after which the solver gives up on a token with a warning.
        tol: bound on every token's relative duality gap, and so on how far its objective can lie above the optimum,
            relative to the objective; 0 runs all of max_iter.
        memory_budget: bytes that the solver may use at a time; None: half of what is free on the device.

    See Also:
        self_expression: takes them.
        VideoAnchorConfig: has all of them among its own settings.

    Examples:
        >>> import videoanchor_triton as va
        >>> options = va.SolverOptions(algorithm="dense", tol=1e-4)
        >>> options.max_iter
        10000
    """

    algorithm: Algorithm = "auto"
    affine: bool = True
    alpha_e: float = 800.0
    alpha_z: float = 800.0
    rho: float | None = None
    relaxation: float = 1.8
    max_iter: int = 10_000
    tol: float = 1e-3
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        check_choice("affine", self.affine, (True, False))
        check_number("alpha_e", self.alpha_e, low=0)
        check_number("alpha_z", self.alpha_z, low=0)
        if self.rho is not None:
            check_number("rho", self.rho, low=0)
        check_number("relaxation", self.relaxation, low=0, high=2)
        check_integer("max_iter", self.max_iter, low=1)
        check_number("tol", self.tol, low=0, low_included=True)
        if self.memory_budget is not None:
            check_integer("memory_budget", self.memory_budget, low=1)

    def penalty(self, n_atoms: int) -> float:
        """The ADMM penalty for a problem of `n_atoms` atoms."""
        return 2 * n_atoms**0.5 if self.rho is None else self.rho
