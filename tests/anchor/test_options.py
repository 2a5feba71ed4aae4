"""What the solver refuses."""

import pytest

from videoanchor_triton.anchor.options import SolverOptions


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": 0.0}, ValueError, "tol must be finite and > 0"),
        ({"tol": float("nan")}, ValueError, "tol must be finite"),
        ({"tol": "small"}, TypeError, "tol must be a number"),
        ({"alpha_e": float("inf")}, ValueError, "alpha_e must be finite"),
        ({"alpha_z": 0.0}, ValueError, "alpha_z must be finite and > 0"),
        ({"affine": "yes"}, ValueError, "affine must be one of True, False"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget must be an integer"),
        ({"max_iter": 10}, TypeError, "max_iter"),
    ],
    ids=str,
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        SolverOptions(**options)
