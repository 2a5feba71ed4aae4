"""Packed sequences: each of them as if it stood alone."""

import zlib
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_results_as_exact_as_eager
from torch._dynamo.testing import CompileCounter

from videoanchor_triton.kernels.api import anchored_attention, anchored_attention_varlen
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import Result, eager_attention, fp32_roundings

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("triton", "sdpa")
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Packed:
    """Named packed sequences; `make` draws their tensors from a seed of the name."""

    name: str
    queries: tuple[int, ...] = (5, 20, 1)
    keys: tuple[int, ...] = (9, 33, 4)
    query_heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    gate: str = "shared"
    layout: str = "thd"
    logits: float = 1.0

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments of `anchored_attention_varlen`."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        tokens_q, tokens_k = sum(self.queries), sum(self.keys)
        if self.layout == "fused":
            assert tokens_q == tokens_k
            heads = self.query_heads + 2 * self.kv_heads
            qkv = torch.randn(tokens_k, heads, self.head_dim, generator=generator).to(device, self.dtype)
            q, k, v = qkv.split([self.query_heads, self.kv_heads, self.kv_heads], dim=1)
        else:
            sizes = [(tokens_q, self.query_heads)] + [(tokens_k, self.kv_heads)] * 2
            drawn = [torch.randn(t, h, self.head_dim, generator=generator).to(device, self.dtype) for t, h in sizes]
            q, k, v = drawn
        q = q * self.logits if self.logits != 1 else q
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if self.gate != "none":
            shape = (tokens_k, self.kv_heads) if self.gate == "per-head" else (tokens_k,)
            gamma_k = 1 + 9.5 * torch.rand(shape, generator=generator)
            gamma_v = 1 + 2.5 * torch.rand(shape, generator=generator)
            if self.gate == "zero":
                gamma_k[::2] = 0
                k = k.clone()
                k[::2] *= 100
            elif self.gate == "all-zero":
                gamma_k.zero_()
            elif self.gate == "huge":
                gamma_k = 10.0 ** (6 * torch.rand(shape, generator=generator))
            shape_q = (tokens_q, self.query_heads) if self.gate == "per-head" else (tokens_q,)
            gamma_q = 1 + 4 * torch.rand(shape_q, generator=generator)
            gates = {"gamma_k": gamma_k, "gamma_v": gamma_v, "gamma_q": gamma_q}
            options |= {name: gate.to(device) for name, gate in gates.items()}
        bounds = [cumulated(lengths, device) for lengths in (self.queries, self.keys)]
        longest = [max(lengths, default=0) for lengths in (self.queries, self.keys)]
        return (q, k, v, *bounds, *longest), options


def cumulated(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def each_alone(attend: Any, tensors: tuple[Any, ...], options: dict[str, Any]) -> Result:
    """A dense implementation, called for each sequence: out (Tq, Hq, D) and lse (Tq, Hq)."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, *_ = tensors
    outs, lses = [], []
    for of_q, of_k in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        q_rows, k_rows = slice(*of_q), slice(*of_k)
        alone = dict(options)
        for name, rows in (("gamma_q", q_rows), ("gamma_k", k_rows), ("gamma_v", k_rows)):
            if name in options:
                gate = options[name][rows]
                alone[name] = gate if gate.dim() == 1 else gate.T[None]
        heads_first = [x[rows].transpose(0, 1)[None] for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows))]
        out, lse = attend(*heads_first, **alone)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].T)
    return torch.cat(outs), torch.cat(lses)


def attend(tensors: tuple[Any, ...], options: dict[str, Any], backend: str, gate_form: str = "log-bias") -> Result:
    found = anchored_attention_varlen(*tensors, **options, backend=backend, gate_form=gate_form, return_lse=True)
    assert isinstance(found, tuple)
    return found


def assert_each_as_exact_as_eager(found: Result, tensors: tuple[Any, ...], options: dict[str, Any]) -> None:
    forms = reference_attention, eager_attention, fp32_roundings
    assert_results_as_exact_as_eager(found, *(each_alone(form, tensors, options) for form in forms))


ADVERSARIAL = [
    Packed("ungated", gate="none"),
    Packed("not-causal", causal=False),
    Packed("gates-per-head", kv_heads=2, gate="per-head"),
    Packed("gates-per-head-gqa", query_heads=4, kv_heads=2, gate="per-head", queries=(5, 8), keys=(20, 8)),
    Packed("gqa-7-to-1", query_heads=7, kv_heads=1, queries=(3, 4), keys=(5, 40)),
    Packed("one-sequence", (37,), (50,)),
    Packed("one-token-each", (1, 1, 1), (1, 1, 1)),
    Packed("a-tile-each", (32, 32), (32, 32)),
    Packed("one-beyond-a-tile", (33, 31), (65, 33)),
    Packed("dead-rows-when-queries-exceed-keys", (20, 3, 40), (7, 3, 39)),
    Packed("no-queries-in-the-middle", (6, 0, 5), (6, 8, 9)),
    Packed("no-keys-in-the-middle", (6, 7, 5), (6, 0, 9)),
    Packed("nothing-in-the-middle", (6, 0, 0, 5), (6, 0, 0, 9)),
    Packed("no-keys-not-causal", (6, 7, 5), (6, 0, 9), causal=False),
    Packed("first-and-last-empty", (0, 6, 0), (0, 11, 0)),
    Packed("first-without-keys-last-without-queries", (4, 6, 0), (0, 11, 5)),
    Packed("gate-0-on-dominating-keys", gate="zero"),
    Packed("all-gates-0", gate="all-zero", causal=False),
    Packed("gates-up-to-1e6", gate="huge"),
    Packed("gates-up-to-1e6-bf16", gate="huge", dtype=torch.bfloat16),
    Packed("bf16", dtype=torch.bfloat16),
    Packed("fp16", dtype=torch.float16),
    Packed("window", (20, 37, 3), (50, 37, 3), window=7),
    Packed("window-of-1", window=1),
    Packed("window-dead-rows", (20, 9), (6, 30), window=3),
    Packed("softcap", softcap=1.5, logits=4.0),
    Packed("softcap-window-bf16", (20, 9), (40, 30), softcap=1.5, logits=4.0, window=9, dtype=torch.bfloat16),
    Packed("logits-times-1000", logits=1000.0),
    Packed("fused-qkv-strides", (9, 0, 23), (9, 0, 23), 2, 2, layout="fused"),
    Packed("fused-qkv-strides-gqa-bf16", (9, 23), (9, 23), 4, 2, layout="fused", gate="per-head", dtype=torch.bfloat16),
    Packed("head-dim-80", (9, 4), (9, 40), head_dim=80),
    Packed("head-dim-128", (9, 4), (9, 40), head_dim=128, dtype=torch.float16),
]
BOUNDED = [problem for problem in ADVERSARIAL if problem.gate not in ("zero", "all-zero", "huge")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", ADVERSARIAL, ids=str)
def test_each_sequence_matches_the_specification(problem: Packed, backend: str, device: torch.device) -> None:
    tensors, options = problem.make(device)
    assert_each_as_exact_as_eager(attend(tensors, options, backend), tensors, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", BOUNDED[:6] + [p for p in BOUNDED if "16" in p.name or "middle" in p.name], ids=str)
def test_post_exp_matches_the_specification(problem: Packed, backend: str, device: torch.device) -> None:
    tensors, options = problem.make(device)
    assert_each_as_exact_as_eager(attend(tensors, options, backend, "post-exp"), tensors, options)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.sampled_from([0.5, 20.0]),
    gate=st.sampled_from(["none", "shared", "per-head", "zero"]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_lengths(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    window: int | None,
    softcap: float | None,
    gate: str,
    backend: str,
    device: torch.device,
) -> None:
    queries, keys = zip(*lengths, strict=True)
    problem = Packed("any", queries, keys, *heads, 16, dtype, causal, window if causal else None, softcap, gate)
    tensors, options = problem.make(device)
    assert_each_as_exact_as_eager(attend(tensors, options, backend), tensors, options)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    ("queries", "keys"), [((0, 0), (0, 0)), ((), ()), ((0,), (7,)), ((7,), (0,))], ids=["all", "none", "q", "k"]
)
def test_empty_sides(queries: tuple[int, ...], keys: tuple[int, ...], backend: str, device: torch.device) -> None:
    tensors, options = Packed("empty", queries, keys).make(device)
    out, lse = attend(tensors, options, backend)
    assert torch.equal(out, torch.zeros_like(tensors[0]))
    assert torch.equal(lse, torch.full(out.shape[:2], -INF, device=device))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nothing_leaks_between_sequences(poisoned: int, poison: float, backend: str, device: torch.device) -> None:
    """K, V and q of a neighbour hold NaN or inf, and its gates 1e30: the others come out bit for bit the same."""
    problem = Packed("poison", (5, 20, 3), (9, 21, 4), causal=poisoned != 1)
    (q, k, v, *rest), options = problem.make(device)
    clean = attend((q, k, v, *rest), options, backend)
    of_q, of_k = (list(pairwise(cu.tolist()))[poisoned] for cu in rest[:2])
    q[slice(*of_q)] = poison
    k[slice(*of_k)] = poison
    v[slice(*of_k)] = poison
    options["gamma_k"][slice(*of_k)] = 1e30
    options["gamma_v"][slice(*of_k)] = 1e30
    others = [row for row in range(len(q)) if not of_q[0] <= row < of_q[1]]
    for found, expected in zip(attend((q, k, v, *rest), options, backend), clean, strict=True):
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_longer_max_seqlens_change_nothing(backend: str, device: torch.device) -> None:
    (*tensors, longest_q, longest_k), options = Packed("max-seqlen").make(device)
    exact = attend((*tensors, longest_q, longest_k), options, backend)
    larger = attend((*tensors, longest_q + 40, longest_k + 100), options, backend)
    assert all(torch.equal(a, b) for a, b in zip(exact, larger, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sequence_is_the_dense_call(backend: str, device: torch.device) -> None:
    (q, k, v, *rest), options = Packed("dense", (23,), (40,)).make(device)
    out, lse = attend((q, k, v, *rest), options, backend)
    dense = anchored_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), **options, return_lse=True, backend=backend
    )
    assert isinstance(dense, tuple)
    torch.testing.assert_close(out, dense[0][0].transpose(0, 1))
    torch.testing.assert_close(lse, dense[1][0].T)


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    tensors, options = Packed("bits", (30, 0, 9), (70, 3, 40), dtype=torch.bfloat16).make(device)
    first, second = (attend(tensors, options, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_an_output_without_lse(backend: str, device: torch.device) -> None:
    tensors, options = Packed("scale").make(device)
    out = anchored_attention_varlen(*tensors, **options, scale=0.4, backend=backend)
    assert isinstance(out, torch.Tensor)
    found = attend(tensors, options | {"scale": 0.4}, backend)
    assert torch.equal(out, found[0])
    assert_each_as_exact_as_eager(found, tensors, options | {"scale": 0.4})


GRADIENTS = [
    Packed("gradients", (3, 0, 2), (4, 2, 2), 2, 1, 4, torch.float64),
    Packed("gradients-per-head", (2, 2), (3, 0), 2, 2, 4, torch.float64, False, gate="per-head"),
    Packed("gradients-window-softcap", (3, 2), (5, 1), 2, 1, 4, torch.float64, window=2, softcap=0.7),
]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("problem", GRADIENTS, ids=str)
def test_gradients(problem: Packed, backend: str, device: torch.device) -> None:
    (*tensors, cu_q, cu_k, longest_q, longest_k), options = problem.make(device)
    gates = [options.pop(name).double() for name in ("gamma_k", "gamma_v")]
    del options["gamma_q"]
    inputs = [x.detach().requires_grad_() for x in (*tensors, *gates)]

    def result(*inputs: torch.Tensor) -> Result:
        *qkv, gamma_k, gamma_v = inputs
        gated = options | {"gamma_k": gamma_k, "gamma_v": gamma_v}
        return attend((*qkv, cu_q, cu_k, longest_q, longest_k), gated, backend)

    def specification(*inputs: torch.Tensor) -> Result:
        *qkv, gamma_k, gamma_v = inputs
        gated = options | {"gamma_k": gamma_k, "gamma_v": gamma_v}
        return each_alone(reference_attention, (*qkv, cu_q, cu_k), gated)

    assert torch.autograd.gradcheck(lambda *x: result(*x)[0], inputs, fast_mode=backend == "sdpa")
    gradients = []
    for out, lse in (result(*inputs), specification(*inputs)):
        lse = lse.double().masked_fill(lse == -INF, 0)
        gradients.append(torch.autograd.grad((out.sin().sum() + lse.cos().sum()), inputs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_gradient_of_one_sequence_stays_in_it(backend: str, device: torch.device) -> None:
    (*tensors, cu_q, cu_k, longest_q, longest_k), options = Packed("own", (5, 6), (9, 7)).make(device)
    k, v = (x.clone() for x in tensors[1:])
    k[9:], v[9:] = NAN, INF
    inputs = [x.requires_grad_() for x in (tensors[0], k, v, options["gamma_k"], options["gamma_v"])]
    out, lse = attend((*inputs[:3], cu_q, cu_k, longest_q, longest_k), options, backend)
    gradients = torch.autograd.grad(out[:5].sum() + lse[:5].sum(), inputs)
    for gradient, first in zip(gradients, (5, 9, 9, 9, 9), strict=True):
        assert gradient[:first].isfinite().all()
        assert gradient[:first].any()


def test_compiles_without_a_break_and_once_for_other_lengths(device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*tensors: Any, **options: Any) -> Any:
        return anchored_attention_varlen(*tensors, **options, backend="triton", return_lse=True)

    problem = Packed("compiled", (4, 9), (12, 9))
    with torch.no_grad():
        for queries in ((4, 9), (9, 4), (5, 10), (3, 20)):
            tensors, options = replace(problem, queries=queries, keys=tuple(n + 6 for n in queries)).make(device)
            assert_each_as_exact_as_eager(compiled(*tensors, **options), tensors, options)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("far_tensor", [0, 1, 2], ids=["q", "k", "v"])
def test_tokens_beyond_31_bits(far_tensor: int, device: torch.device, far_store: torch.Tensor) -> None:
    # the second sequence begins beyond 2**31 elements
    long, short = (515, 12), (3, 20)
    queries, keys = (long, short) if far_tensor == 0 else (short, long)
    tensors, options = Packed("far", queries, keys, 1, 1, dtype=torch.float16, causal=False, gate="none").make(device)
    near = tensors[far_tensor]
    far = far_store.as_strided(near.shape, (2**22, 16, 1)).copy_(near)
    expected = attend(tensors, options, "triton")
    found = attend((*tensors[:far_tensor], far, *tensors[far_tensor + 1 :]), options, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
