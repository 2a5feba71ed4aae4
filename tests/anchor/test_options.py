"""What the solver refuses."""

import pytest
import torch

from videoanchor_triton.anchor.solver import SolverOptions, self_expression


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be finite and > 0"),
        ({"rho": float("nan")}, "rho must be finite"),
        ({"relaxation": 2.0}, "relaxation must be finite and > 0 and < 2"),
        ({"max_iter": 0}, "max_iter must be >= 1"),
        ({"tol": -1.0}, "tol must be finite and >= 0"),
        ({"alpha_e": float("inf")}, "alpha_e must be finite"),
        ({"affine": "yes"}, "affine must be one of True, False"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SolverOptions(**options)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="max_iter must be an integer"):
        SolverOptions(max_iter=1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="rho must be a number"):
        SolverOptions(rho="20")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="dtype must be"):
        self_expression(torch.ones(2, 3), SolverOptions(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"Y must be 2-D.*\(4,\)"):
        self_expression(torch.ones(4), SolverOptions())
