"""Partial attention over disjoint keys merges to attention over all of them."""

from functools import partial
from typing import Any

import pytest
import torch
from oracle import Problem, assert_results_as_exact_as_eager

from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.merge import merge_attention
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import eager_attention, fp32_roundings

INF, NAN = float("inf"), float("nan")
Part = tuple[torch.Tensor, torch.Tensor]


def chunk(attend: Any, tensors: tuple[torch.Tensor, ...], options: dict[str, Any], keys: slice) -> Part:
    """Attention of the queries over some of the keys: causal over the last ones, which are the queries' own."""
    q, k, v = tensors
    gates = {name: options[name][:, keys] for name in ("gamma_k", "gamma_v")}
    options = options | gates | {"causal": keys.stop == k.shape[2]}
    return attend(q, k[:, :, keys], v[:, :, keys], **options)


def fold(parts: list[Part]) -> Part:
    merged, *rest = parts
    for part in rest:
        merged = merge_attention(*merged, *part)
    return merged


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_chunks_of_a_context_give_the_whole(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    tensors, options = Problem("chunks", 2, 4, 2, 20, 70, 16, dtype).make(device)
    places = [slice(0, 13), slice(13, 50), slice(50, 70)]
    attend = partial(anchored_attention, return_lse=True, backend=backend)
    parts = [chunk(attend, tensors, options, keys) for keys in places]
    eager_out, eager_lse = formula([chunk(eager_attention, tensors, options, keys) for keys in places])
    eager = eager_out.to(dtype), eager_lse.float()
    exact, roundings = (form(*tensors, **options) for form in (reference_attention, fp32_roundings))
    assert_results_as_exact_as_eager(fold(parts), exact, eager, roundings)
    assert_results_as_exact_as_eager(fold(parts[::-1]), exact, eager, roundings)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_merge_of_large_logits_is_as_exact_as_the_whole(backend: str, device: torch.device) -> None:
    """Weights between the parts come from the lse alone: logits near 150 rounded to bf16 would be off by 0.5."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator).to(device, torch.bfloat16) for n in (20, 64, 64))
    attend = partial(anchored_attention, 8 * q, scale=1.0, return_lse=True, backend=backend)
    found = fold([attend(k[:, :, half], v[:, :, half]) for half in (slice(0, 32), slice(32, 64))])
    forms = reference_attention, eager_attention, fp32_roundings
    assert_results_as_exact_as_eager(found, *(form(8 * q, k, v, scale=1.0) for form in forms))


def test_gamma_q_in_every_part_or_after_the_merge(device: torch.device) -> None:
    tensors, options = Problem("gamma-q", queries=20, keys=40).make(device)
    places = [slice(0, 20), slice(20, 40)]
    attend = partial(anchored_attention, return_lse=True, backend="sdpa")
    in_parts = fold([chunk(attend, tensors, options, keys) for keys in places])
    gamma_q = options.pop("gamma_q")
    out, lse = fold([chunk(attend, tensors, options, keys) for keys in places])
    torch.testing.assert_close(in_parts, (out, lse + gamma_q[:, None].log()))


def draw(seed: int, parts: int, rows: int = 50, dtype: torch.dtype = torch.float64) -> list[Part]:
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(rows, 8, generator=generator).to(dtype) for _ in range(parts)]
    return [(out, 5 * torch.randn(rows, generator=generator)) for out in outs]


def formula(parts: list[Part]) -> Part:
    """The definition in fp64: a softmax over the parts' lse."""
    lse = torch.stack([lse.double() for _, lse in parts])
    weights = lse.softmax(0)
    return (weights[..., None] * torch.stack([out.double() for out, _ in parts])).sum(0), lse.logsumexp(0)


def test_is_associative_and_commutative_up_to_rounding() -> None:
    a, b, c = draw(0, 3)
    expected = formula([a, b, c])
    for found in (fold([a, b, c]), fold([c, b, a]), merge_attention(*a, *merge_attention(*b, *c))):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_merge_rounds_once(dtype: torch.dtype) -> None:
    parts = draw(5, 2, dtype=dtype)
    out, lse = merge_attention(*parts[0], *parts[1])
    exact_out, exact_lse = formula(parts)
    torch.testing.assert_close(out.double(), exact_out, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("difference", [0.0, 1e-3, 20.0, 100.0, 1e4, 3e38])
def test_far_apart_parts(difference: float) -> None:
    (out_a, _), (out_b, _) = draw(1, 2, rows=1)
    for lse_a, lse_b in ((0.0, difference), (difference, 0.0), (difference, -difference)):
        a, b = (out_a, torch.tensor([lse_a])), (out_b, torch.tensor([lse_b]))
        for found, expected in zip(merge_attention(*a, *b), formula([a, b]), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_parts_without_a_visible_key() -> None:
    """Such a part is not looked at, whatever its out holds; two of them give 0 and -inf. Gradients stay finite."""
    (out_a, lse_a), (out_b, lse_b) = draw(2, 2, rows=4)
    lse_a[[1, 3]] = -INF
    lse_b[[2, 3]] = -INF
    out_a[[1, 3]] = NAN
    out_b[3] = INF
    inputs = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = merge_attention(*inputs)
    assert torch.equal(out[1], out_b[1])
    assert torch.equal(out[2], out_a[2])
    assert torch.equal(out[3], torch.zeros(8))
    assert torch.equal(lse[1:], torch.stack([lse_b[1], lse_a[2], torch.tensor(-INF)]))
    gradients = torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)])
    assert all(x.isfinite().all() for x in gradients)
    of_out_a, of_lse_a, of_out_b, of_lse_b = gradients
    assert of_lse_a[[1, 2]].tolist() == [0, 1]
    assert of_lse_b[[1, 2]].tolist() == [1, 0]
    assert of_out_a[:, 0].tolist()[1:] == [0, 1, 0]
    assert of_out_b[:, 0].tolist()[1:] == [1, 0, 0]


def test_gradients() -> None:
    inputs = [x.requires_grad_() for part in draw(3, 2) for x in part]
    out_a, lse_a, out_b, lse_b = inputs
    found, expected = merge_attention(*inputs), formula([(out_a, lse_a), (out_b, lse_b)])
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in expected]
    ours = torch.autograd.grad(found, inputs, [w.to(x.dtype) for w, x in zip(weights, found, strict=True)])
    theirs = torch.autograd.grad(expected, inputs, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_through_merged_attention(device: torch.device) -> None:
    (q, k, v), _ = Problem("through", 1, 2, 1, 6, 12, 8).make(device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    parts = [
        anchored_attention(q, k[:, :, half], v[:, :, half], causal=half.start > 0, return_lse=True, backend="sdpa")
        for half in (slice(0, 6), slice(6, 12))
    ]
    ours = torch.autograd.grad([x.sum() for x in merge_attention(*parts[0], *parts[1])], inputs)
    theirs = torch.autograd.grad([x.sum() for x in reference_attention(q, k, v, causal=True)], inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    (out_a, lse_a), (out_b, lse_b) = draw(4, 2, dtype=torch.bfloat16)
    lse_a[:20], lse_b[10:30] = -INF, -INF
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    parts = out_a, lse_a, out_b, lse_b
    torch.testing.assert_close(compiled(*parts), merge_attention(*parts), rtol=0, atol=0)


OUT, LSE = torch.zeros(2, 3, 4), torch.zeros(2, 3)
INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "lse-missing": (TypeError, "lse_a must be a tensor, got NoneType", {"lse_a": None}),
    "device": (ValueError, "lse_b must be on out_a's device", {"lse_b": LSE.to("meta")}),
    "integers": (TypeError, "out_a must be a floating tensor", {"out_a": OUT.long()}),
    "scalar": (ValueError, "out_a must have shape", {"out_a": torch.tensor(0.0)}),
    "dtypes-differ": (TypeError, "out_b must have out_a's dtype", {"out_b": OUT.half()}),
    "shapes-differ": (ValueError, "out_b must have out_a's shape", {"out_b": OUT[:1]}),
    "lse-dtype": (TypeError, "lse_a must be fp32", {"lse_a": LSE.double()}),
    "lse-transposed": (ValueError, r"lse_b must have shape \(2, 3\)", {"lse_b": LSE.T}),
    "lse-would-broadcast": (ValueError, r"lse_a must have shape \(2, 3\)", {"lse_a": LSE[:1]}),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_refused(name: str) -> None:
    kind, message, change = INVALID[name]
    arguments: dict[str, Any] = {"out_a": OUT, "lse_a": LSE, "out_b": OUT, "lse_b": LSE}
    with pytest.raises(kind, match=message):
        merge_attention(**(arguments | change))
