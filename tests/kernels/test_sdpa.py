"""The SDPA form: no tensor of Nq x Nk, no copy of k and v for each query head, gradients."""

from typing import Any

import pytest
import torch
from oracle import Problem
from torch.utils._python_dispatch import TorchDispatchMode

from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.sdpa import sdpa_attention


class LargestTensors(TorchDispatchMode):
    """Records the shapes of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.operators: list[str] = []
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.shapes.append(x.shape)
                if not func.is_view:
                    self.copied = max(self.copied, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("gate", ["none", "per-head"])
@pytest.mark.parametrize("gate_form", ["log-bias", "post-exp"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_no_tensor_of_queries_times_keys(
    dtype: torch.dtype, padding: str | None, gate: str, gate_form: str, layout: str, device: torch.device
) -> None:
    problem = Problem("600", 2, 8, 2, 600, 600, 32, dtype, gate=gate, padding=padding, layout=layout)
    tensors, options = problem.make(device)
    with LargestTensors() as seen:
        anchored_attention(*tensors, **options, backend="sdpa", gate_form=gate_form, return_lse=True)
    assert not [shape for shape in seen.shapes if len(shape) > 1 and min(shape[-2:]) >= 600]
    assert not [name for name in seen.operators if "_math" in name]


def test_keys_and_values_are_not_repeated_for_query_heads(device: torch.device) -> None:
    problem = Problem("repeated", 1, 16, 2, 300, 900, 64, padding="left")
    tensors, options = problem.make(device)
    with LargestTensors() as seen:
        anchored_attention(*tensors, **options, backend="sdpa")
    widened = 2 * 900 * (64 + 8)
    largest = max(widened, 16 * 300 * (64 + 8), 2 * 256 * 900)
    assert seen.copied <= largest


def test_one_query_takes_few_operators(device: torch.device) -> None:
    tensors, options = Problem("few", queries=1, keys=500).make(device)
    gates = options["gamma_k"], options["gamma_v"]
    with LargestTensors() as seen:
        sdpa_attention(*tensors, *gates, None, 0.2, True, None, True, False)
    assert seen.copied <= tensors[1].numel()
    assert len(seen.operators) < 60


GRADIENTS = [
    Problem("gated", 1, 2, 1, 5, 6, 4, torch.float64),
    Problem("gated-square", 1, 2, 1, 6, 6, 4, torch.float64),
    Problem("not-causal", 2, 4, 2, 3, 5, 4, torch.float64, causal=False, gate="per-head"),
    Problem("padded", 2, 2, 1, 5, 6, 4, torch.float64, padding="left"),
    Problem("window", 1, 2, 2, 5, 6, 4, torch.float64, window=2),
    Problem("dead-rows", 1, 2, 1, 6, 3, 4, torch.float64, gate_keys=2),
    Problem("one-query", 1, 4, 2, 1, 6, 4, torch.float64, padding="left"),
]


@pytest.mark.parametrize("problem", GRADIENTS, ids=str)
@pytest.mark.parametrize("gate_form", ["log-bias", "post-exp"])
def test_gradients(problem: Problem, gate_form: str, device: torch.device) -> None:
    tensors, options = problem.make(device)
    del options["gamma_q"]
    gates = [options.pop(name).double() for name in ("gamma_k", "gamma_v")]
    inputs = [x.detach().requires_grad_() for x in (*tensors, *gates)]

    def product(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, gamma_k, gamma_v = inputs
        gated = {"gamma_k": gamma_k, "gamma_v": gamma_v}
        out, lse = anchored_attention(q, k, v, **gated, **options, return_lse=True, backend="sdpa", gate_form=gate_form)
        return out, lse.masked_fill(lse == float("-inf"), 0)

    def specification(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, gamma_k, gamma_v = inputs
        out, lse = reference_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v, **options)
        return out, lse.float().masked_fill(lse == float("-inf"), 0)

    assert torch.autograd.gradcheck(lambda *x: product(*x)[0], inputs)
    found, exact = product(*inputs), specification(*inputs)
    weights = [torch.randn(x.shape, dtype=x.dtype, device=device) for x in found]
    ours = torch.autograd.grad(found, inputs, weights)
    theirs = torch.autograd.grad(exact, inputs, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_gradients_in_bfloat16_stay_finite_and_close(device: torch.device) -> None:
    tensors, options = Problem("bf16", dtype=torch.bfloat16, padding="left-nan").make(device)
    inputs = [x.detach().requires_grad_() for x in (*tensors, options.pop("gamma_k"), options.pop("gamma_v"))]
    q, k, v, gamma_k, gamma_v = inputs
    out = anchored_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v, **options)
    exact, _ = reference_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v, **options)
    assert isinstance(out, torch.Tensor)
    ours = torch.autograd.grad(out.float().square().sum(), inputs)
    theirs = torch.autograd.grad(exact.square().sum(), inputs)
    for mine, true in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        assert (mine - true).norm() <= 0.02 * true.norm()
