"""Every implementation against the fp64 specification, on random and on adversarial problems."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Problem, assert_as_exact_as_eager

from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tiles import FEW_QUERIES, HEAD_DIMS

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FORMS = ("triton/log-bias", "triton/post-exp", "sdpa/log-bias", "sdpa/post-exp")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# two heads, not four: in the interpreter every program counts
small = partial(Problem, query_heads=2, kv_heads=1)
ADVERSARIAL = [
    small("ungated", gate="none"),
    small("ungated-not-causal", gate="none", causal=False),
    small("not-causal", causal=False),
    small("square", queries=70),
    Problem("more-than-a-chunk-of-queries", batch=1, query_heads=2, kv_heads=1, queries=290, keys=300, head_dim=16),
    small("dead-rows-when-queries-exceed-keys", queries=70, keys=40),
    Problem("dead-chunk-when-queries-exceed-keys", batch=1, query_heads=2, kv_heads=1, queries=300, keys=20),
    small("one-key", keys=1, causal=False),
    small("one-key-causal", keys=1),
    small("one-query-one-key", queries=1, keys=1),
    small("tile-aligned", queries=64, keys=64),
    small("one-beyond-a-tile", queries=65, keys=65),
    Problem("bnhd-strides", layout="bnhd"),
    Problem("fused-qkv-strides", layout="fused"),
    Problem("last-dimension-not-contiguous", layout="column"),
    Problem("gqa-7-to-1", query_heads=7, kv_heads=1),
    Problem("mha", query_heads=3, kv_heads=3),
    small("gate-shared", gate="shared"),
    Problem("gate-per-head", gate="per-head"),
    Problem("gates-not-contiguous", gate="strided"),
    small("gates-shorter-than-keys", gate_keys=41),
    small("gates-of-length-0", gate_keys=0),
    small("gates-within-post-exp-limits", gate="wide", dtype=torch.float16),
    small("gates-within-post-exp-limits-bf16", gate="wide", dtype=torch.bfloat16),
    small("gates-up-to-1e6", gate="huge"),
    small("gates-up-to-1e6-bf16", gate="huge", dtype=torch.bfloat16),
    small("gate-0-on-dominating-keys", gate="zero"),
    small("gate-0-on-a-prefix", gate="some-zero"),
    small("all-gates-0", gate="all-zero", causal=False),
    small("logits-times-1000", logits=1000.0),
    small("logits-times-1000-bf16", logits=1000.0, dtype=torch.bfloat16),
    Problem("left-padding", padding="left"),
    small("left-padding-square", padding="left", queries=70),
    small("scattered-padding", padding="scattered", causal=False),
    small("all-keys-padded", padding="all"),
    small("padding-holds-nan", padding="left-nan"),
    small("padding-holds-nan-gate-0", padding="left-nan", gate="zero"),
    Problem("padding-holds-nan-fused-qkv-strides", padding="left-nan", layout="fused"),
    Problem("window", window=11),
    small("window-of-1", window=1),
    Problem("window-of-a-tile", window=32, queries=100, keys=130, query_heads=2),
    small("window-beyond-all", window=10_000),
    small("window-dead-rows", window=5, queries=60, keys=40),
    small("window-left-padding-nan", window=30, padding="left-nan"),
    small("softcap", softcap=2.0),
    small("softcap-saturated-bf16", softcap=0.5, logits=10.0, dtype=torch.bfloat16),
    small("softcap-hardly-bends", softcap=500.0),
    small("softcap-ungated-not-causal", softcap=1.5, logits=4.0, gate="none", causal=False),
    small("softcap-gate-0", softcap=1.5, logits=4.0, gate="zero"),
    small("softcap-window-padding-nan", softcap=3.0, window=9, padding="left-nan"),
    Problem("decode", queries=1, keys=200),
    small("decode-ungated", queries=1, keys=200, gate="none"),
    Problem("decode-many-splits", batch=1, query_heads=2, kv_heads=1, queries=1, keys=1500, head_dim=16),
    small("decode-4-rows-causal", queries=4, keys=90),
    Problem("decode-16-rows-gqa-7", queries=16, keys=90, query_heads=7, kv_heads=1),
    small("decode-dead-rows", queries=9, keys=5),
    Problem("decode-gate-per-head", queries=3, gate="per-head"),
    small("decode-gates-shorter-than-keys", queries=1, keys=120, gate_keys=57),
    small("decode-gate-0", queries=2, gate="zero"),
    small("decode-all-gates-0", queries=1, gate="all-zero"),
    small("decode-gates-up-to-1e6-bf16", queries=2, gate="huge", dtype=torch.bfloat16),
    small("decode-value-gates-beyond-fp16", queries=2, gate="huge-value", dtype=torch.float16),
    small("value-gates-beyond-fp16", gate="huge-value", dtype=torch.float16),
    *(
        small(f"gated-values-beyond-fp16-{name}", gate="beyond-fp16", dtype=torch.float16, **changes)
        for name, changes in {
            "causal": {"queries": 70},
            "not-causal": {"causal": False},
            "window-padding-nan": {"window": 30, "padding": "left-nan"},
            "softcap": {"softcap": 1.5, "logits": 4.0},
            "gates-shorter-than-keys": {"gate_keys": 41},
            "decode": {"queries": 3},
            "decode-one-query-padding-nan": {"queries": 1, "keys": 150, "padding": "left-nan"},
            "decode-softcap": {"queries": 2, "softcap": 1.5},
            "D80": {"head_dim": 80},
        }.items()
    ),
    small("decode-logits-times-1000", queries=2, logits=1000.0),
    small("decode-padding-holds-nan", queries=1, keys=150, padding="left-nan"),
    small("decode-all-keys-padded", queries=1, padding="all"),
    small("decode-window", queries=4, keys=150, window=40),
    small("decode-window-of-1", queries=1, window=1),
    small("decode-window-padding", queries=1, keys=90, window=70, padding="left-nan"),
    small("decode-softcap", queries=4, softcap=1.5, logits=4.0),
    small("decode-softcap-window-padding-nan", queries=2, softcap=3.0, window=9, padding="left-nan"),
    Problem("decode-bnhd-strides", queries=1, layout="bnhd"),
    Problem("decode-gates-not-contiguous", queries=2, gate="strided"),
]
EVERY_SIZE = [
    Problem(f"{kind}-D{head_dim}-{name}", batch=1, queries=queries, keys=50, head_dim=head_dim, dtype=dtype)
    for kind, queries in (("prefill", 40), ("decode", 2))
    for head_dim in HEAD_DIMS
    for name, dtype in DTYPES.items()
]
# the post-exp form is promised a bounded gate, and Triton's decode has one form only
CASES = [
    (problem, form)
    for problem in ADVERSARIAL + EVERY_SIZE
    for form in FORMS
    if "log-bias" in form or (problem.bounded and (form == "sdpa/post-exp" or problem.queries > FEW_QUERIES))
]


@pytest.mark.parametrize(("problem", "form"), CASES, ids=str)
def test_matches_the_specification(problem: Problem, form: str, device: torch.device) -> None:
    backend, gate_form = form.split("/")
    tensors, options = problem.make(device)
    found = anchored_attention(*tensors, **options, backend=backend, gate_form=gate_form, return_lse=True)
    assert isinstance(found, tuple)
    assert_as_exact_as_eager(found, tensors, options)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(1, 300),
    keys=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (2, 1)]),
    head_dim=st.sampled_from([16, 80]),
    dtype=st.sampled_from(list(DTYPES.values())),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 300),
    softcap=st.none() | st.floats(0.5, 30),
    padding=st.sampled_from([None, "left", "scattered"]),
    gate=st.sampled_from(["none", "shared", "per-head", "wide", "strided"]),
    gate_keys=st.none() | st.integers(0, 300),
    form=st.sampled_from(FORMS),
)
def test_matches_the_specification_for_any_shape(
    form: str, device: torch.device, heads: tuple[int, int], **changes: Any
) -> None:
    changes["window"] = changes["window"] if changes["causal"] else None
    if changes["gate_keys"] is not None:
        changes["gate_keys"] = min(changes["gate_keys"], changes["keys"])
    problem = Problem("any", batch=1, query_heads=heads[0], kv_heads=heads[1], **changes)
    tensors, options = problem.make(device)
    backend, gate_form = form.split("/")
    found = anchored_attention(*tensors, **options, backend=backend, gate_form=gate_form, return_lse=True)
    assert isinstance(found, tuple)
    assert_as_exact_as_eager(found, tensors, options)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(0, 20, 30), (2, 0, 30), (2, 20, 0), (2, 1, 0), (2, 0, 0)], ids=str
)
def test_empty_sizes(batch: int, queries: int, keys: int, backend: str, device: torch.device) -> None:
    q = torch.randn(batch, 4, queries, 16, device=device)
    k = torch.randn(batch, 2, keys, 16, device=device)
    gate = torch.ones(batch, keys, device=device)
    out, lse = anchored_attention(q, k, k, gamma_k=gate, gamma_v=gate, causal=True, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full(q.shape[:3], float("-inf"), device=device))


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_gamma_q_changes_the_lse_only(backend: str, device: torch.device) -> None:
    tensors, options = small("gamma-q", queries=20).make(device)
    gamma_q = options.pop("gamma_q")
    plain = anchored_attention(*tensors, **options, return_lse=True, backend=backend)
    for gate in (gamma_q, gamma_q[0], gamma_q[:, None].expand(-1, 2, -1)):
        out, lse = anchored_attention(*tensors, **options, gamma_q=gate, return_lse=True, backend=backend)
        assert torch.equal(out, plain[0])
        expected = plain[1] + (gate if gate.dim() != 2 else gate[:, None]).log()
        torch.testing.assert_close(lse, expected.expand_as(lse))


@pytest.mark.parametrize("queries", [2, 40], ids=["decode", "prefill"])
def test_the_same_call_gives_the_same_bits(queries: int, device: torch.device) -> None:
    tensors, options = small("bits", batch=1, queries=queries, keys=600, dtype=torch.bfloat16).make(device)
    first = anchored_attention(*tensors, **options, return_lse=True, backend="triton")
    second = anchored_attention(*tensors, **options, return_lse=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("queries", [1, 20], ids=["decode", "prefill"])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_log_gates_are_not_rounded_to_half_precision(
    dtype: torch.dtype, backend: str, queries: int, device: torch.device
) -> None:
    """Two keys whose log gates near 13.8 lie less than one rounding of bf16 apart: the eager form is off by 3%."""
    gamma_k = torch.full((8, 2), 1e6, device=device)
    gamma_k[:, 1] *= torch.linspace(1, 1.06, 8, device=device)
    q = torch.zeros(8, 1, queries, 16, dtype=dtype, device=device)
    k = torch.zeros(8, 1, 2, 16, dtype=dtype, device=device)
    v = torch.ones_like(k)
    v[:, :, 1] = -1
    out = anchored_attention(q, k, v, gamma_k=gamma_k, backend=backend)
    assert isinstance(out, torch.Tensor)
    exact = (gamma_k[:, 0] - gamma_k[:, 1]) / gamma_k.sum(1)
    assert (out - exact[:, None, None, None]).abs().max() <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("queries", [20, 4, 1])
@pytest.mark.parametrize("gamma_k", [1.0, 1e-4])
def test_a_value_beyond_fp16_touches_no_row_that_does_not_see_it(
    gamma_k: float, queries: int, backend: str, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 20, 16, generator=generator).half().to(device)
    v, gates = torch.ones_like(k), {name: torch.ones(20, device=device) for name in ("gamma_k", "gamma_v")}
    v[:, :, -1], gates["gamma_v"][-1], gates["gamma_k"][-1] = 1000, 100, gamma_k
    options: dict[str, Any] = gates | {"causal": True}
    out = anchored_attention(q[:, :, -queries:], k, v, **options, backend=backend)
    exact, _ = reference_attention(q[:, :, -queries:], k, v, **options)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out[:, :, :-1], torch.ones_like(out[:, :, :-1]))
    torch.testing.assert_close(out[:, :, -1].double(), exact[:, :, -1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("queries", [20, 1], ids=["prefill", "decode"])
def test_the_lse_of_16_bits_is_that_of_fp32(queries: int, backend: str, device: torch.device) -> None:
    """Logits near 150, of which a rounding in bf16 is 0.5."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator).to(device, torch.bfloat16) for n in (queries, 64, 64))
    _, lse = anchored_attention(8 * q, k, v, scale=1.0, return_lse=True, backend=backend)
    _, exact = reference_attention(8 * q, k, v, scale=1.0)
    assert exact.max() > 100
    assert (lse - exact).abs().max() < 1e-4
