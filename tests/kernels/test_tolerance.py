"""The rule of what error a result may have: another order of sums is right, 2% is wrong, at every dtype."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Problem

from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import (
    Tensors,
    allowed_error,
    compare_results,
    eager_attention,
    error,
    fp32_roundings,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BASE = Problem("tolerance", queries=40, keys=300, head_dim=64, causal=False)
PROBLEMS = (
    BASE,
    replace(BASE, name="ungated", gate="none"),
    replace(BASE, name="one query over many keys", queries=1, keys=3000),
    replace(BASE, name="few keys", queries=6, keys=9, head_dim=16),
    replace(BASE, name="one key", queries=5, keys=1, head_dim=16),
    replace(BASE, name="softcap and large logits", softcap=5.0, logits=30.0),
    replace(BASE, name="gates up to 1e6", gate="huge"),
    replace(BASE, name="left padding", padding="left-nan"),
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def reordered(tensors: Tensors, options: dict[str, Any], seed: int) -> tuple[Tensors, dict[str, Any]]:
    """The same problem with keys and columns in another order: each sum adds the same terms in another one."""
    q, k, v = tensors
    random = torch.Generator().manual_seed(seed)
    keys, columns = (torch.randperm(n, generator=random) for n in k.shape[2:])
    changed = {name: options[name][..., keys] for name in ("gamma_k", "gamma_v", "key_padding_mask") if name in options}
    return (q[..., columns], k[:, :, keys][..., columns], v[:, :, keys]), options | changed


@every_dtype
@every_problem
def test_another_order_of_sums_is_right(problem: Problem, dtype: torch.dtype) -> None:
    tensors, options = replace(problem, dtype=dtype).make(torch.device("cpu"))
    exact, eager, roundings = (
        form(*tensors, **options) for form in (reference_attention, eager_attention, fp32_roundings)
    )
    for seed in range(8):
        again, changed = reordered(tensors, options, seed)
        found = eager_attention(*again, **changed)
        for name, wrong, allowed in compare_results(found, exact, eager, roundings):
            assert wrong <= allowed, f"{name}, order {seed}: error {wrong:.3g}, allowed {allowed:.3g}"


@every_dtype
@every_problem
def test_two_percent_is_wrong(problem: Problem, dtype: torch.dtype) -> None:
    tensors, options = replace(problem, dtype=dtype).make(torch.device("cpu"))
    out, lse = eager_attention(*tensors, **options)
    exact, roundings = (form(*tensors, **options) for form in (reference_attention, fp32_roundings))
    for off in (0.98, 1.02):
        planted = (out.double() * off).to(dtype), lse + torch.tensor(off).log()
        for name, wrong, allowed in compare_results(planted, exact, (out, lse), roundings):
            assert wrong > allowed, f"{name}: error {wrong:.3g}, allowed {allowed:.3g}"


def test_the_rule_allows_a_rounding_where_the_eager_form_makes_no_error() -> None:
    exact = torch.tensor([1.0 + 2**-9, -3.0, float("-inf")], dtype=torch.float64)
    assert allowed_error(exact, 0.0, torch.bfloat16) == 3 * 2**-8
    assert error(exact.bfloat16(), exact) <= allowed_error(exact, 0.0, torch.bfloat16)
    assert allowed_error(exact, 0.25, torch.float32, inside=0.5) == pytest.approx(1.0)
    assert allowed_error(exact[:0], 0.0, torch.float32) == 0.0


def test_a_result_that_is_not_finite_is_an_infinite_error() -> None:
    exact = torch.zeros(1, 1, 2, 4).double(), torch.tensor([[[0.0, float("-inf")]]]).double()
    eager = exact[0].float(), exact[1].float()
    nothing = torch.zeros(1), torch.zeros(1)
    assert all(wrong <= allowed for _, wrong, allowed in compare_results(eager, exact, eager, nothing))
    for planted in (float("nan"), float("-inf")):
        broken = eager[0].clone(), eager[1].clone()
        broken[0][0, 0, 0, 0], broken[1][0, 0, 0] = planted, planted
        assert [wrong for _, wrong, _ in compare_results(broken, exact, eager, nothing)] == [float("inf")] * 2
