"""The backward kernels against autograd of the fp64 specification; the specification itself by gradcheck."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Problem

from videoanchor_triton.kernels.backward import backward
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.operands import Masks
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tiles import HEAD_DIMS
from videoanchor_triton.kernels.tolerance import Tensors, eager_attention, error

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NAMES = ("dq", "dk", "dv", "d_gamma_k", "d_gamma_v")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALL = Problem("small", query_heads=2, kv_heads=1, queries=20, keys=45, head_dim=16)
WIDE = replace(SMALL, batch=1, queries=70, keys=100)


def small(name: str, base: Problem = SMALL, **changes: Any) -> Problem:
    return replace(base, name=name, **changes)


ADVERSARIAL = [
    small("ungated", gate="none"),
    small("ungated-not-causal", gate="none", causal=False),
    small("not-causal", causal=False),
    small("square", queries=45),
    small("many-tiles", WIDE),
    small("many-tiles-not-causal", WIDE, causal=False),
    small("many-tiles-square-bf16", WIDE, queries=100, dtype=torch.bfloat16),
    small("dead-rows-when-queries-exceed-keys", queries=60, keys=20),
    small("dead-tiles-when-queries-exceed-keys", WIDE, queries=120, keys=20),
    small("one-key", keys=1, causal=False),
    small("one-key-causal", keys=1),
    small("one-query", queries=1),
    small("one-query-one-key", queries=1, keys=1),
    small("tile-aligned", batch=1, queries=64, keys=64),
    small("one-beyond-a-tile", batch=1, queries=65, keys=65),
    small("bnhd-strides", layout="bnhd"),
    small("fused-qkv-strides", layout="fused"),
    small("last-dimension-not-contiguous", layout="column"),
    small("gqa-7-to-1", batch=1, query_heads=7),
    small("mha", query_heads=3, kv_heads=3),
    small("gate-shared", gate="shared"),
    small("gate-per-head", query_heads=4, kv_heads=2, gate="per-head"),
    small("gates-not-contiguous", gate="strided"),
    small("gates-shorter-than-keys", gate_keys=29),
    small("gates-shorter-than-keys-shared", gate_keys=29, gate="shared"),
    small("gates-of-length-0", gate_keys=0),
    small("gates-within-post-exp-limits", gate="wide", dtype=torch.float16),
    small("gates-within-post-exp-limits-bf16", gate="wide", dtype=torch.bfloat16),
    small("gates-up-to-1e6", gate="huge"),
    small("gates-up-to-1e6-bf16", gate="huge", dtype=torch.bfloat16),
    small("gate-0-on-dominating-keys", gate="zero"),
    small("gate-0-on-a-prefix", gate="some-zero"),
    small("all-gates-0", gate="all-zero", causal=False),
    small("value-gates-beyond-fp16", gate="huge-value", dtype=torch.float16),
    small("gated-values-beyond-fp16", gate="beyond-fp16", dtype=torch.float16),
    small("gated-values-beyond-fp16-padding-nan", gate="beyond-fp16", dtype=torch.float16, padding="left-nan"),
    small("logits-times-1000", logits=1000.0),
    small("logits-times-1000-bf16", logits=1000.0, dtype=torch.bfloat16),
    small("left-padding", padding="left"),
    small("left-padding-square", padding="left", queries=45),
    small("scattered-padding", padding="scattered", causal=False),
    small("scattered-padding-ungated", padding="scattered", gate="none"),
    small("all-keys-padded", padding="all"),
    small("padding-holds-nan", padding="left-nan"),
    small("padding-holds-nan-gate-0", padding="left-nan", gate="zero"),
    small("padding-holds-nan-fused-qkv-strides", padding="left-nan", layout="fused"),
    small("window", WIDE, window=11),
    small("window-of-1", window=1),
    small("window-of-a-tile", WIDE, window=32),
    small("window-beyond-all", window=10_000),
    small("window-dead-rows", window=5, queries=60, keys=40),
    small("window-left-padding-nan", window=30, padding="left-nan"),
    small("softcap", softcap=2.0),
    small("softcap-saturated-bf16", softcap=0.5, logits=10.0, dtype=torch.bfloat16),
    small("softcap-hardly-bends", softcap=500.0),
    small("softcap-window-padding", softcap=3.0, window=9, padding="left-nan"),
]
EVERY_SIZE = [
    small(f"D{head_dim}-{name}", batch=1, head_dim=head_dim, dtype=DTYPES[name])
    for i, head_dim in enumerate(HEAD_DIMS)
    for name in (list(DTYPES)[i % 3], list(DTYPES)[(i + 1) % 3])
]
Gradients = list[torch.Tensor | None]


def draw_weights(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of out, in a layout other than out's, and of lse."""
    generator = torch.Generator().manual_seed(q.numel())
    d_out = torch.randn(q.shape, generator=generator).to(q.device, q.dtype)
    return d_out, torch.randn(q.shape[:3], generator=generator).to(q.device)


def forward(tensors: Tensors, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification's out, in the layout of the kernels, and lse, as the forward would hand them over."""
    out, lse = reference_attention(*tensors, **options)
    return out.transpose(1, 2).contiguous().transpose(1, 2).to(tensors[0].dtype), lse.float()


def kernel_gradients(tensors: Tensors, options: dict[str, Any], d_out: torch.Tensor, d_lse: torch.Tensor) -> Gradients:
    """The launcher's gradients. NaN comes in where lse is -inf, which must not come out."""
    target, _ = triton_target(tensors[0].device)
    assert target is not None
    out, lse = forward(tensors, options)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    gates = options.get("gamma_k"), options.get("gamma_v")
    scale, softcap = options.get("scale", q.shape[-1] ** -0.5), options.get("softcap")
    d_lse = d_lse.masked_fill(lse == float("-inf"), float("nan"))
    masks = Masks(scale, options.get("causal", False), options.get("window"), softcap)
    padding = options.get("key_padding_mask")
    return list(backward(q, k, v, *gates, padding, out, lse, d_out, d_lse, masks, target))


def autograd(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tensors: Tensors,
    options: dict[str, Any],
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Gradients of q, k, v and the gates by autograd of a dense form, in `dtype` or the inputs' own."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    gates = {name: x.detach().requires_grad_() for name, x in options.items() if name in ("gamma_k", "gamma_v")}
    gates = {name: x.to(dtype or x.dtype) for name, x in gates.items()}
    out, lse = attend(*leaves, **(options | gates))
    d_lse = d_lse.masked_fill(lse == float("-inf"), 0)
    inputs = [*leaves, *gates.values()]
    return list(torch.autograd.grad((out, lse), inputs, (d_out.to(out.dtype), d_lse.to(lse.dtype))))


def moved_by_output(tensors: Tensors, options: dict[str, Any], d_out: torch.Tensor) -> Gradients:
    """What <dO, O> moves the gradients by, O rounded to its dtype and the sum to fp32: it enters as dLse does."""
    out, _ = forward(tensors, options)
    terms = d_out.double() * out.double()
    moved = torch.finfo(torch.float32).eps * terms.abs().sum(-1) + torch.finfo(out.dtype).eps / 2 * terms.norm(dim=-1)
    return autograd(reference_attention, tensors, options, torch.zeros_like(d_out), moved, torch.float64)


def assert_gradients(found: Gradients, exact: Gradients, eager: Gradients, moved: Gradients, lse: torch.Tensor) -> None:
    """Each within twice the eager form's error plus a rounding of the largest element, and what recomputing costs.

    Weights recomputed from a rounded lse are off by three roundings of it in fp32 (the logit and the lse in base 2, by
    a rounded log2 e, and the lse itself), and dS by what `moved` holds. The eager form, which keeps its weights, has
    neither; nor has it a gradient where a gate is 0.
    """
    recomputed = 3 * torch.finfo(torch.float32).eps * lse.masked_fill(lse.isinf(), 0).abs().max().item()
    ours = (x for x in found if x is not None)
    for name, mine, true, theirs, by_output in zip(NAMES, ours, exact, eager, moved, strict=False):
        assert true is not None
        assert theirs is not None
        assert by_output is not None
        assert mine.shape == true.shape
        assert mine.dtype == (torch.float32 if name.startswith("d_gamma") else theirs.dtype)
        assert not mine.isnan().any(), name
        if true.numel():
            size = true.abs().max().item()
            rounding = (torch.finfo(mine.dtype).eps + recomputed) * size
            rounding += by_output.abs().max().item() if true.any() else 0.0
            allowed = 2 * error(theirs.where(~theirs.isnan(), true), true) + rounding
            assert error(mine, true) <= allowed, f"{name}: error {error(mine, true):.3g}, allowed {allowed:.3g}"


def check(problem: Problem, device: torch.device) -> None:
    tensors, options = problem.make(device)
    options.pop("gamma_q", None)
    d_out, d_lse = draw_weights(tensors[0])
    if problem.gate == "huge-value":  # fp16 has to hold gV dO
        d_out = d_out * 1e-2
    found = kernel_gradients(tensors, options, d_out, d_lse)
    exact = autograd(reference_attention, tensors, options, d_out, d_lse, torch.float64)
    eager = autograd(eager_attention, tensors, options, d_out, d_lse)
    assert_gradients(found, exact, eager, moved_by_output(tensors, options, d_out), forward(tensors, options)[1])


@pytest.mark.parametrize("problem", ADVERSARIAL + EVERY_SIZE, ids=str)
def test_matches_autograd_of_the_specification(problem: Problem, device: torch.device) -> None:
    check(problem, device)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    dtype=st.sampled_from(list(DTYPES.values())),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 30),
    padding=st.sampled_from([None, "left", "scattered"]),
    gate=st.sampled_from(["none", "shared", "per-head", "some-zero"]),
)
def test_matches_autograd_for_any_shape(device: torch.device, heads: tuple[int, int], **changes: Any) -> None:
    changes["window"] = changes["window"] if changes["causal"] else None
    check(small("any", batch=1, query_heads=heads[0], kv_heads=heads[1], **changes), device)


def test_only_one_gate_and_no_lse_gradient(device: torch.device) -> None:
    tensors, options = small("one-gate").make(device)
    d_out, d_lse = draw_weights(tensors[0])
    target, _ = triton_target(device)
    assert target is not None
    for name in ("gamma_k", "gamma_v"):
        only = {name: options[name], "causal": True}
        out, lse = forward(tensors, only)
        gates = only.get("gamma_k"), only.get("gamma_v")
        found = backward(*tensors, *gates, None, out, lse, d_out, None, Masks(0.25, True, None, None), target)
        same = kernel_gradients(tensors, only, d_out, 0 * d_lse)
        assert [x is None for x in found] == [False, False, False, name != "gamma_k", name != "gamma_v"]
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True) if a is not None and b is not None)
        exact = autograd(reference_attention, tensors, only, d_out, 0 * d_lse, torch.float64)
        eager = autograd(eager_attention, tensors, only, d_out, 0 * d_lse)
        assert_gradients(list(found), exact, eager, moved_by_output(tensors, only, d_out), lse)


def test_gradients_of_scores_beyond_fp16(device: torch.device) -> None:
    """dS is beyond 65504, the gradients are not."""
    generator = torch.Generator().manual_seed(0)
    q, k = (0.01 * torch.randn(2, 1, 1, 20, 16, generator=generator)).half().to(device)
    v, d_out = (10 * torch.randn(2, 1, 1, 20, 16, generator=generator)).half().to(device)
    options: dict[str, Any] = {"gamma_v": torch.full((20,), 100.0, device=device), "causal": True}
    tensors, d_lse = (q, k, 10 * v), torch.zeros(1, 1, 20, device=device)
    found = kernel_gradients(tensors, options, d_out, d_lse)
    exact = autograd(reference_attention, tensors, options, d_out, d_lse, torch.float64)
    for mine, true in zip((x for x in found if x is not None), exact, strict=True):
        assert true is not None
        assert true.abs().max() < 65504
        assert error(mine, true) <= 4 * torch.finfo(torch.float16).eps * true.abs().max()


def test_gradients_of_alphas(device: torch.device) -> None:
    """gamma = 1 + alpha s: d alpha = sum_j s_j d gamma_j."""
    tensors, options = small("alphas", gate="none").make(device)
    weights = draw_weights(tensors[0])
    scores = torch.rand(2, 45, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    alphas = [torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in (9.5, 2.5)]
    gates = dict(zip(("gamma_k", "gamma_v"), (1 + alpha * scores for alpha in alphas), strict=True))
    out, lse = reference_attention(*tensors, **options, **gates)
    exact = torch.autograd.grad((out, lse), alphas, [x.double() for x in weights], retain_graph=True)
    rounded = {name: gate.detach().float() for name, gate in gates.items()}
    d_gates = kernel_gradients(tensors, options | rounded, *weights)[3:]
    found = torch.autograd.grad(list(gates.values()), alphas, [x.double() for x in d_gates if x is not None])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": False, "gate": "per-head"},
        {"gate": "shared", "gate_keys": 4},
        {"window": 2},
        {"padding": "left", "softcap": 1.5},
        {"queries": 6, "keys": 3},
    ],
    ids=["not-causal", "shared", "window", "padded-softcap", "dead-rows"],
)
def test_gradcheck_of_the_specification(changes: dict[str, Any], device: torch.device) -> None:
    base = Problem("gradcheck", 2, 2, 1, 3, 5, 4, torch.float64)
    tensors, options = replace(base, **changes).make(device)
    inputs = [x.double().requires_grad_() for x in (*tensors, options.pop("gamma_k"), options.pop("gamma_v"))]

    def attend(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, gamma_k, gamma_v = inputs
        out, lse = reference_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v, **options)
        return out, lse.masked_fill(lse == float("-inf"), 0)

    assert torch.autograd.gradcheck(attend, inputs)


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    tensors, options = small("bits", WIDE, query_heads=2, dtype=torch.bfloat16).make(device)
    first, second = (kernel_gradients(tensors, options, *draw_weights(tensors[0])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 20, 30), (2, 0, 30), (2, 20, 0), (2, 0, 0)], ids=str)
def test_empty_sizes(batch: int, queries: int, keys: int, device: torch.device) -> None:
    tensors, options = small("empty", batch=batch, queries=queries, keys=keys).make(device)
    for x, gradient in zip(
        (*tensors, options["gamma_k"], options["gamma_v"]),
        kernel_gradients(tensors, options, *draw_weights(tensors[0])),
        strict=True,
    ):
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros_like(x))


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, H, N, ...) of each sequence to (T, H, ...)."""
    return torch.cat([x[0].transpose(0, 1) for x in tensors])


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": "none", "causal": False},
        {"gate": "shared", "window": 6},
        {"gate": "per-head", "kv_heads": 2, "softcap": 2.0},
        {"gate": "per-head", "kv_heads": 2, "dtype": torch.bfloat16, "head_dim": 80},
    ],
    ids=["ungated-not-causal", "shared-window", "per-head-softcap", "per-head-D80-bf16"],
)
def test_packed_sequences(changes: dict[str, Any], device: torch.device) -> None:
    lengths = [5, 0, 40, 1, 7], [9, 3, 36, 33, 0]
    base = replace(SMALL, batch=1, **changes)
    parts = [small(f"{i}", base, queries=n, keys=m).make(device) for i, (n, m) in enumerate(zip(*lengths, strict=True))]
    weights = [draw_weights(tensors[0]) for tensors, _ in parts]
    for _, options in parts:
        options.pop("gamma_q", None)
    forms = ((reference_attention, torch.float64), (eager_attention, None))
    exact, eager = (
        [autograd(attend, *part, *weight, dtype) for part, weight in zip(parts, weights, strict=True)]
        for attend, dtype in forms
    )
    forwards = [forward(*part) for part in parts]

    def packed_gate(gates: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(gates)) if gates[0].dim() == 1 else pack(gates)

    def packed_gradients(gradients: list[Gradients]) -> Gradients:
        columns = [[x for x in column if x is not None] for column in zip(*gradients, strict=True)]
        return [*(pack(x) for x in columns[:3]), *(packed_gate(x) for x in columns[3:])]

    q, k, v = (pack(x) for x in zip(*(tensors for tensors, _ in parts), strict=True))
    out, lse, d_out, d_lse = (pack(x) for x in (*zip(*forwards, strict=True), *zip(*weights, strict=True)))
    gamma_k, gamma_v = (
        packed_gate([options[name] for _, options in parts]) if name in parts[0][1] else None
        for name in ("gamma_k", "gamma_v")
    )
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in lengths)
    options, target = parts[0][1], triton_target(device)[0]
    assert target is not None
    masks = Masks(q.shape[-1] ** -0.5, options["causal"], options["window"], options.get("softcap"))
    found = backward(
        q, k, v, gamma_k, gamma_v, None, out, lse, d_out, d_lse.masked_fill(lse.isinf(), float("nan")), masks, target,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=40, max_seqlen_k=36,
    )  # fmt: skip
    moved = [moved_by_output(*part, upstream) for part, (upstream, _) in zip(parts, weights, strict=True)]
    assert_gradients(list(found), packed_gradients(exact), packed_gradients(eager), packed_gradients(moved), lse)


def test_a_sequence_keeps_its_nan_to_itself(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(60, 2, 16, generator=generator).to(device) for _ in range(4))
    gamma_k, gamma_v = (1 + torch.rand(60, generator=generator).to(device) for _ in range(2))
    cu_seqlens = torch.tensor([0, 20, 37, 60], dtype=torch.int32, device=device)
    target, _ = triton_target(device)
    assert target is not None
    lengths: dict[str, Any] = {"max_seqlen_q": 23, "max_seqlen_k": 23}
    lengths |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    given = Masks(0.25, False, None, None), target
    lse = torch.full((60, 2), 9.0, device=device)
    expected = backward(q, k, v, gamma_k, gamma_v, None, v, lse, d_out, None, *given, **lengths)
    for x in (q, k, v, d_out, gamma_k, gamma_v):
        x[20:37] = float("nan")
    found = backward(q, k, v, gamma_k, gamma_v, None, v, lse, d_out, None, *given, **lengths)
    for mine, clean in zip(found, expected, strict=True):
        assert mine is not None
        assert clean is not None
        assert torch.equal(mine[:20], clean[:20])
        assert torch.equal(mine[37:], clean[37:])


@pytest.mark.parametrize("place", ["row", "head", "batch"])
def test_elements_beyond_31_bits(place: str, device: torch.device, far_store: torch.Tensor) -> None:
    stride = {"row": (0, 0, 2**22), "head": (0, 2**30, 16), "batch": (2**30, 0, 16)}[place]
    batch, heads, rows = 3 if place == "batch" else 1, 3 if place == "head" else 1, 520 if place == "row" else 8
    far = far_store.as_strided((batch, heads, rows, 16), (*stride, 1))
    for i in range(3):
        queries, keys = (rows, 8) if i == 0 else (8, rows)
        q, k, v = small("far", batch=batch, query_heads=heads, kv_heads=heads, queries=queries, keys=keys).make(device)[
            0
        ]
        close = q.half(), k.half(), v.half()
        far.copy_(close[i])
        strided = tuple(far if i == j else x for j, x in enumerate(close))
        assert len(strided) == 3
        found, expected = (kernel_gradients(x, {}, *draw_weights(close[0])) for x in (strided, close))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)
