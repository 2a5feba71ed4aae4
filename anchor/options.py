"""Settings of the self-expression problem and of its solver."""

from dataclasses import dataclass

from .validation import check_choice, check_integer, check_number


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Settings of the self-expression problem and of its solver.

    Attributes:
        affine: the coefficients of a token sum to 1.
        alpha_e: the weight of the L1 error is alpha_e / mu_e (see `penalty_weights`).
        alpha_z: the weight of the squared residual is alpha_z / mu_z.
        tol: bound on every token's relative duality gap, and so on how far its objective can lie above the optimum,
            relative to the objective. Below 1e-4 the solver computes in float64 throughout.
        memory_budget: bytes that the solver may use at a time; None: half of what is free on the device.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or out of its range.

    See Also:
        self_expression: takes them.
        VideoAnchorConfig: has all of them among its own settings.

    Examples:
        >>> import videoanchor_triton as va
        >>> va.SolverOptions(tol=1e-4).affine
        True
    """

    affine: bool = True
    alpha_e: float = 800.0
    alpha_z: float = 800.0
    tol: float = 1e-3
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_choice("affine", self.affine, (True, False))
        check_number("alpha_e", self.alpha_e, low=0)
        check_number("alpha_z", self.alpha_z, low=0)
        check_number("tol", self.tol, low=0)
        if self.memory_budget is not None:
            check_integer("memory_budget", self.memory_budget, low=1)
