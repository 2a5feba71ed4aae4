"""The SDPA form: no tensor of Nq x Nk, none kept for backward, no copy of k and v for each query head, gradients."""

from typing import Any

import pytest
import torch
from oracle import Problem, assert_as_exact_as_eager
from torch.utils._python_dispatch import TorchDispatchMode

from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.sdpa import DENSE_KEYS, sdpa_attention


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
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "softcap"])
def test_no_tensor_of_queries_times_keys(
    dtype: torch.dtype,
    padding: str | None,
    gate: str,
    gate_form: str,
    layout: str,
    softcap: float | None,
    device: torch.device,
) -> None:
    problem = Problem("600", 2, 8, 2, 600, 600, 32, dtype, gate=gate, padding=padding, layout=layout, softcap=softcap)
    tensors, options = problem.make(device)
    with LargestTensors() as seen:
        anchored_attention(*tensors, **options, backend="sdpa", gate_form=gate_form, return_lse=True)
    assert not [shape for shape in seen.shapes if len(shape) > 1 and min(shape[-2:]) >= 600]
    assert not [name for name in seen.operators if "_math" in name]


KEPT = [
    Problem("square", 1, 4, 2, 900, 900, 16),
    Problem("chunk-of-a-context", 1, 4, 2, 700, 900, 16),
    Problem("not-causal-padded", 1, 4, 2, 900, 900, 16, causal=False, padding="left"),
    Problem("padding", 1, 4, 2, 900, 900, 16, padding="left"),
    Problem("windowed", 1, 4, 2, 900, 900, 16, window=700),
    Problem("capped", 1, 4, 2, 900, 900, 16, softcap=2.0, logits=4.0),
    Problem("capped-padding", 1, 4, 2, 900, 900, 16, softcap=2.0, logits=4.0, padding="left"),
]


@pytest.mark.parametrize("problem", KEPT, ids=str)
def test_backward_keeps_no_queries_times_keys(problem: Problem, device: torch.device) -> None:
    """All that autograd keeps for out and lse is less than half of one Nq x Nk in fp32, of which two heads need two."""
    tensors, options = problem.make(device)
    gates = {name: options.pop(name).requires_grad_() for name in ("gamma_k", "gamma_v")}
    q, k, v = (x.requires_grad_() for x in tensors)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, lse = anchored_attention(q, k, v, **gates, **options, return_lse=True, backend="sdpa")
    assert sum(kept.values()) < problem.queries * problem.keys * 4 / 2
    (out.sum() + lse.masked_fill(lse == float("-inf"), 0).sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, *gates.values()))


CAPPED = [
    Problem("softcap", softcap=1.5, logits=4.0),
    Problem("softcap-not-causal", softcap=1.5, logits=4.0, causal=False),
    Problem("softcap-that-hardly-bites", softcap=50.0),
    Problem("softcap-logits-times-1000", softcap=30.0, logits=1000.0),
    Problem("softcap-per-head-gqa", 2, 6, 2, 20, 50, softcap=1.5, logits=4.0, gate="per-head"),
    Problem("softcap-more-than-a-chunk", 1, 2, 1, 290, 300, 16, softcap=1.5, logits=4.0),
    Problem("softcap-gate-0", softcap=1.5, logits=4.0, gate="zero"),
    Problem("softcap-window", softcap=1.5, logits=4.0, window=9),
    Problem("softcap-padding-holds-nan", softcap=1.5, logits=4.0, padding="left-nan"),
    Problem("softcap-dead-rows", softcap=1.5, logits=4.0, queries=70, keys=40),
    Problem("softcap-one-query", softcap=1.5, logits=4.0, queries=1),
    Problem("softcap-bf16", softcap=1.5, logits=4.0, dtype=torch.bfloat16),
    Problem("softcap-fp16", softcap=1.5, logits=4.0, dtype=torch.float16),
]


@pytest.mark.parametrize("problem", CAPPED, ids=str)
def test_softcap_matches_the_specification(problem: Problem, device: torch.device) -> None:
    tensors, options = problem.make(device)
    found = anchored_attention(*tensors, **options, return_lse=True, backend="sdpa")
    assert isinstance(found, tuple)
    assert_as_exact_as_eager(found, tensors, options)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["masked", "softcap"])
def test_gradients_compile_without_a_break(softcap: float | None, device: torch.device) -> None:
    torch.compiler.reset()
    tensors, options = Problem("compiled", 1, 2, 1, 140, 300, 16, padding="left", softcap=softcap).make(device)
    inputs = [x.requires_grad_() for x in (*tensors, options.pop("gamma_k"), options.pop("gamma_v"))]

    def product(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, gamma_k, gamma_v = inputs
        out = anchored_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v, **options, backend="sdpa")
        assert isinstance(out, torch.Tensor)
        return out

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(form(*inputs).square().sum(), inputs) for form in (compiled, product))
    torch.testing.assert_close(ours, theirs)


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


@pytest.mark.parametrize(("queries", "softcap"), [(1, None), (40, 5.0)], ids=["one-query", "softcap"])
def test_dense_scores_of_16_bits_need_no_whole_copy_of_keys(
    queries: int, softcap: float | None, device: torch.device
) -> None:
    problem = Problem("long", 1, 2, 1, queries, 20_000, 64, torch.bfloat16, gate="shared", softcap=softcap)
    tensors, options = problem.make(device)
    del options["gamma_k"]
    with LargestTensors() as seen:
        anchored_attention(*tensors, **options, backend="sdpa", gate_form="post-exp", return_lse=True)
    assert seen.copied <= max(DENSE_KEYS * 64, 2 * queries * 20_000)


GRADIENTS = [
    Problem("gated", 1, 2, 1, 5, 6, 4, torch.float64),
    Problem("gated-square", 1, 2, 1, 6, 6, 4, torch.float64),
    Problem("not-causal", 2, 4, 2, 3, 5, 4, torch.float64, causal=False, gate="per-head"),
    Problem("padded", 2, 2, 1, 5, 6, 4, torch.float64, padding="left"),
    Problem("window", 1, 2, 2, 5, 6, 4, torch.float64, window=2),
    Problem("dead-rows", 1, 2, 1, 6, 3, 4, torch.float64, gate_keys=2),
    Problem("one-query", 1, 4, 2, 1, 6, 4, torch.float64, padding="left"),
    Problem("capped", 2, 4, 2, 3, 5, 4, torch.float64, softcap=0.8, padding="left"),
    Problem("capped-dead-rows", 1, 2, 1, 6, 3, 4, torch.float64, softcap=0.8),
    Problem("no-keys", 1, 2, 1, 3, 0, 4, torch.float64),
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

    assert torch.autograd.gradcheck(lambda *x: product(*x)[0], inputs, fast_mode=True)
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


def test_inference_tensors_outside_of_inference_mode(device: torch.device) -> None:
    """Nothing is kept for a backward pass that cannot come."""
    with torch.inference_mode():
        tensors, options = Problem("chunks", queries=3, keys=40, causal=True).make(device)
        expected = anchored_attention(*tensors, **options, backend="sdpa")
    capped: dict[str, Any] = {**options, "softcap": 20.0}
    anchored_attention(*tensors, **capped, return_lse=True, backend="sdpa")
    torch.testing.assert_close(anchored_attention(*tensors, **options, backend="sdpa"), expected)
