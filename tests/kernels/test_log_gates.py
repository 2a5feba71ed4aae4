"""Logarithms instead of factors, and gates of their own for each query head: every call, backend and gradient."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Problem, assert_as_exact_as_eager, assert_results_as_exact_as_eager
from test_varlen import Packed, each_alone
from torch._dynamo.testing import CompileCounter

from videoanchor_triton.kernels import self_check
from videoanchor_triton.kernels.api import anchored_attention, anchored_attention_varlen
from videoanchor_triton.kernels.api_cache import anchored_attention_decode
from videoanchor_triton.kernels.gates import choose_gate_form
from videoanchor_triton.kernels.ops import anchored_attention_op, varlen_op
from videoanchor_triton.kernels.ops_cache import decode_op
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import eager_attention, fp32_roundings

NAN, INF = float("nan"), float("inf")
BACKENDS = ("triton", "sdpa")
small = partial(Problem, batch=2, query_heads=4, kv_heads=2, queries=34, keys=50, head_dim=16)

DENSE = [
    small("log", gate="log"),
    small("log-shorter-than-keys", gate="log", gate_keys=41),
    small("log-bf16", gate="log", dtype=torch.bfloat16),
    small("log-fp16", gate="log", dtype=torch.float16),
    small("log-padding-holds-nan", gate="log", padding="left-nan"),
    small("log-window-softcap", gate="log", window=9, softcap=3.0),
    small("log-few-queries", gate="log", queries=3),
    small("log-per-kv-head", gate="log-bounded"),
    small("log-of-query-heads", gate="log-per-query-head"),
    small("log-of-query-heads-not-causal-fp16", gate="log-per-query-head", causal=False, dtype=torch.float16),
    small("log-of-query-heads-padding-holds-nan", gate="log-per-query-head", padding="left-nan"),
    small("log-of-query-heads-softcap", gate="log-per-query-head", softcap=3.0),
    small("log-of-query-heads-one-query", gate="log-per-query-head", queries=1),
    small("query-heads", gate="per-query-head"),
    small("query-heads-square-bf16", gate="per-query-head", queries=50, dtype=torch.bfloat16),
    small("query-heads-fp16", gate="per-query-head", dtype=torch.float16, gate_keys=41),
    small("query-heads-window", gate="per-query-head", window=9),
    small("query-heads-few-queries", gate="per-query-head", queries=3, query_heads=6),
    small("query-heads-one-kv-head", gate="per-query-head", kv_heads=1),
    small("query-heads-mha", gate="per-query-head", kv_heads=4),
]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", DENSE, ids=str)
def test_dense_calls_match_the_specification(problem: Problem, backend: str, device: torch.device) -> None:
    tensors, options = problem.make(device)
    found = anchored_attention(*tensors, **options, return_lse=True, backend=backend)
    assert isinstance(found, tuple)
    assert_as_exact_as_eager(found, tensors, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [p for p in DENSE if p.bounded and p.queries > 16], ids=str)
def test_post_exp_matches_the_specification(problem: Problem, backend: str, device: torch.device) -> None:
    tensors, options = problem.make(device)
    found = anchored_attention(*tensors, **options, return_lse=True, backend=backend, gate_form="post-exp")
    assert isinstance(found, tuple)
    assert_as_exact_as_eager(found, tensors, options)


def test_the_specification_is_a_bias_of_each_query_head(device: torch.device) -> None:
    """Against a softmax written out, of both kinds of gates."""
    (q, k, v), options = small("written-out", gate="log-per-query-head", causal=False).make(device)
    bias, gamma_v = options["log_gamma_k"].double(), options["gamma_v"].double()
    of_heads = [x.double().repeat_interleave(2, 1) for x in (k, v)]
    logits = q.double() @ of_heads[0].mT * 0.25 + bias[:, :, None]
    expected = logits.softmax(-1) @ (of_heads[1] * gamma_v[..., None])
    options.pop("gamma_q")
    gates = {"gamma_k": bias.exp()} | {name: x for name, x in options.items() if name != "log_gamma_k"}
    for given in (options, gates):
        out, lse = reference_attention(q, k, v, **given)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, logits.logsumexp(-1))


PACKED = [
    Packed("packed-log", gate="log"),
    Packed("packed-log-fp16", gate="log", dtype=torch.float16, query_heads=4, kv_heads=2),
    Packed("packed-query-heads", gate="per-query-head", query_heads=4, kv_heads=2),
    Packed("packed-log-of-query-heads", gate="log-per-query-head", query_heads=6, kv_heads=2, window=7),
]


def packed(problem: Packed, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors, options = replace(problem, gate="shared").make(device)
    generator = torch.Generator().manual_seed(0)
    tokens = tensors[1].shape[0]
    shape = (tokens, problem.query_heads) if problem.gate.endswith("query-head") else (tokens,)
    options["gamma_v"] = 1 + torch.rand(shape, generator=generator).to(device)
    options["gamma_k"] = 1 + 9 * torch.rand(shape, generator=generator).to(device)
    if problem.gate.startswith("log"):
        options["log_gamma_k"] = 200 * torch.rand(shape, generator=generator).to(device) - 100
        options["log_gamma_k"][5::7] = -INF
        del options["gamma_k"]
    return tensors, options


def alone(form: Any, tensors: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """`each_alone`, which knows factors only: of logarithms they come in fp64."""
    log_gamma_k = options.get("log_gamma_k")
    if log_gamma_k is None:
        return each_alone(form, tensors, options)
    given = {name: x for name, x in options.items() if name != "log_gamma_k"}

    def with_logs(*args: torch.Tensor, gamma_k: torch.Tensor, **rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return form(*args, log_gamma_k=gamma_k, **rest)

    return each_alone(with_logs, tensors, given | {"gamma_k": log_gamma_k})


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", PACKED, ids=str)
def test_packed_calls_match_the_specification(problem: Packed, backend: str, device: torch.device) -> None:
    tensors, options = packed(problem, device)
    found = anchored_attention_varlen(*tensors, **options, backend=backend, return_lse=True)
    assert isinstance(found, tuple)
    forms = reference_attention, eager_attention, fp32_roundings
    assert_results_as_exact_as_eager(found, *(alone(form, tensors, options) for form in forms))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("gate", ["log", "per-query-head", "log-per-query-head"])
@pytest.mark.parametrize(
    ("queries", "page_size"), [(1, None), (1, 1), (3, 3), (3, 48), (20, None), (20, 48)], ids=lambda x: f"{x}"
)
def test_caches_match_the_specification(
    queries: int, page_size: int | None, gate: str, backend: str, device: torch.device
) -> None:
    """Gates are slices of a larger buffer, which are read by their strides; NaN lies around them and in unused keys."""
    problem = small(f"cache-{gate}", queries=queries, keys=48, gate=gate)
    (q, k, v), options = problem.make(device)
    del options["gamma_q"], options["window"]
    lengths = [37, 48]
    for name in options.keys() & {"gamma_k", "log_gamma_k", "gamma_v"}:
        value = options[name]
        buffer = torch.full((*value.shape[:-1], 3 * value.shape[-1]), NAN, device=device)
        buffer[..., 48 : 48 + 48] = value
        options[name] = buffer[..., 48 : 48 + 45]
    caches, table = [x.clone() for x in (k, v)], None
    for cache in caches:
        cache[0, :, lengths[0] :] = NAN
    if page_size is not None:
        pages = 48 // page_size
        order = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(1))
        table = order.view(2, pages).to(device, torch.int32)
        for i, cache in enumerate(caches):
            paged = cache.unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1)
            caches[i] = torch.empty_like(paged)
            caches[i][order.to(device)] = paged
    k_cache, v_cache = caches
    found = anchored_attention_decode(
        q, k_cache, v_cache, torch.tensor(lengths, dtype=torch.int32, device=device), table, **options, backend=backend,
        return_lse=True,
    )  # fmt: skip
    assert isinstance(found, tuple)
    for b, n in enumerate(lengths):
        tensors = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        of_entry = {name: x[b : b + 1, ..., :n] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        out, lse = (x[b : b + 1] for x in found)
        assert_as_exact_as_eager((out, lse), tensors, of_entry)


def test_decode_reads_slices_of_gates_where_they_lie(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of log gates or value gates a step: the operator gets views of the buffers."""
    seen: list[Any] = []
    api_cache = pytest.importorskip("videoanchor_triton.kernels.api_cache")
    monkeypatch.setattr(api_cache, "decode_op", lambda *args: seen.extend(args) or (args[0], args[0][..., 0]))
    logs, values = torch.zeros(2, 90, device=device), torch.ones(2, 4, 90, device=device)
    q, cache = torch.zeros(2, 4, 1, 16, device=device), torch.zeros(2, 2, 64, 16, device=device)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    anchored_attention_decode(
        q, cache, cache, lengths, log_gamma_k=logs[:, 7:60], gamma_v=values[..., 7:60], backend="triton"
    )
    log_gamma_k, gamma_v = seen[5:7]
    assert log_gamma_k.shape == (2, 2, 53)
    assert log_gamma_k.data_ptr() == logs[:, 7:].data_ptr()
    assert gamma_v.shape == (2, 4, 53)
    assert gamma_v.data_ptr() == values[..., 7:].data_ptr()


GRADIENTS = [
    small("gradients-log", gate="log", batch=1),
    small("gradients-log-one-query", gate="log", queries=1),
    small("gradients-log-padding", gate="log", padding="left-nan"),
    small("gradients-query-heads", gate="per-query-head"),
    small("gradients-log-of-query-heads", gate="log-per-query-head", gate_keys=41, window=20),
    small("gradients-log-of-query-heads-softcap", gate="log-per-query-head", softcap=3.0, causal=False),
]


def gates_of(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in options.items() if name in ("gamma_k", "log_gamma_k", "gamma_v")}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", GRADIENTS, ids=str)
def test_gradients(problem: Problem, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of log_gamma_k are of itself. The self-check compares them too."""
    monkeypatch.setenv(self_check.SWITCH, "always")
    tensors, options = problem.make(device)
    gates = gates_of(options)
    leaves = [x.detach().requires_grad_() for x in (*tensors, *gates.values())]
    grads = []
    for attend in (partial(anchored_attention, return_lse=True, backend=backend), reference_attention):
        given = options | dict(zip(gates, leaves[3:], strict=True))
        out, lse = attend(*leaves[:3], **given)
        loss = out.double().square().sum() + lse.double().masked_fill(lse == -INF, 0).sin().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for mine, exact in zip(*grads, strict=True):
        assert mine.shape == exact.shape
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=2e-4 * exact.nan_to_num().abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", PACKED, ids=str)
def test_packed_gradients(problem: Packed, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.SWITCH, "always")
    tensors, options = packed(replace(problem, dtype=torch.float32), device)
    gates = gates_of(options)
    leaves: list[Any] = [x.detach().requires_grad_() for x in (*tensors[:3], *gates.values())]
    given = options | dict(zip(gates, leaves[3:], strict=True))
    grads = []
    for result in (
        anchored_attention_varlen(*leaves[:3], *tensors[3:], **given, backend=backend, return_lse=True),
        alone(reference_attention, (*leaves[:3], *tensors[3:]), given),
    ):
        out, lse = result
        loss = out.double().square().sum() + lse.double().masked_fill(lse == -INF, 0).sin().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=2e-4 * exact.abs().max().item())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_gradient_of_a_logarithm_is_that_of_its_factor_times_it(backend: str, device: torch.device) -> None:
    (q, k, v), options = small("chain-rule", gate="log-bounded").make(device)
    logs = options["log_gamma_k"].requires_grad_()
    factors = logs.detach().exp().requires_grad_()
    of_logs, of_factors = (
        torch.autograd.grad(anchored_attention(q, k, v, **gate, causal=True, backend=backend).square().sum(), [x])[0]
        for x, gate in ((logs, {"log_gamma_k": logs}), (factors, {"gamma_k": factors}))
    )
    torch.testing.assert_close(of_logs, of_factors * factors, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 30], ids=["decode", "prefill"])
@pytest.mark.parametrize("size", [1e4, -1e4, 3e7, -3e37])
def test_logarithms_of_any_size(
    size: float, queries: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Equal for all keys they cancel in out. Of keys at 0 beside keys far below these alone count."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, generator=generator).to(device, dtype) for n in (queries, 40, 40))
    plain = anchored_attention(q, k[:, :, :20], v[:, :, :20], backend=backend)
    assert isinstance(plain, torch.Tensor)
    logs = torch.zeros(40, device=device)
    logs[20:] = -abs(size)
    for shift in (0.0, 1024.0):
        out, lse = anchored_attention(q, k, v, log_gamma_k=logs + shift, return_lse=True, backend=backend)
        torch.testing.assert_close(out, plain, rtol=1e-2, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)
        assert lse.isfinite().all()
    out, lse = anchored_attention(q, k, v, log_gamma_k=torch.full_like(logs, size), return_lse=True, backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(lse, torch.full_like(lse, size), rtol=1e-3, atol=0)


INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "both": (ValueError, "log_gamma_k must be None where gamma_k is given.*got both", {"gamma_k": torch.ones(6)}),
    "nan": (ValueError, r"log_gamma_k must be finite and at most 2\*\*126 in size, or -inf, .* at \[2\]", {"at": NAN}),
    "inf": (ValueError, "log_gamma_k must be finite", {"at": INF}),
    "too-large": (ValueError, "log_gamma_k must be finite", {"at": 1e38}),
    "fp64": (ValueError, "log_gamma_k must be finite .* fp32 must hold it", {"at": 1e39}),
    "integers": (TypeError, "log_gamma_k must be a floating tensor", {"log_gamma_k": torch.zeros(6).long()}),
    "list": (TypeError, "log_gamma_k must be a tensor", {"log_gamma_k": [0.0]}),
    "shape": (ValueError, "log_gamma_k must have shape", {"log_gamma_k": torch.zeros(7)}),
    "device": (ValueError, "log_gamma_k must be on q's device", {"log_gamma_k": torch.zeros(6, device="meta")}),
    "three-heads": (ValueError, "log_gamma_k must have shape.* 4", {"log_gamma_k": "three-heads"}),
    "post-exp": (ValueError, "log_gamma_k must be finite and within .*post-exp", {"at": 14.0, "gate_form": "post-exp"}),
    "post-exp-hidden": (ValueError, "log_gamma_k must be .*post-exp", {"at": -INF, "gate_form": "post-exp"}),
}


@pytest.mark.parametrize("call", ["dense", "packed", "cache"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_logarithms_are_refused(name: str, call: str) -> None:
    kind, message, change = INVALID[name]
    if call == "cache" and "gate_form" in change:
        pytest.skip("decode has no gate_form")
    options: dict[str, Any] = {"log_gamma_k": torch.zeros(6)} | change
    if "at" in options:
        options["log_gamma_k"] = torch.zeros(6, dtype=torch.float64)
        options["log_gamma_k"][2] = options.pop("at")
    if options["log_gamma_k"] is INVALID["three-heads"][2]["log_gamma_k"]:
        options["log_gamma_k"] = torch.zeros(6, 3) if call == "packed" else torch.zeros(1, 3, 6)
    q, k = torch.zeros(1, 4, 6, 16), torch.zeros(1, 2, 6, 16)
    packed_q, packed_k = (x[0].transpose(0, 1) for x in (q, k))
    marks = torch.tensor([0, 6], dtype=torch.int32)
    attend: Any = {
        "dense": partial(anchored_attention, q, k, k),
        "packed": partial(anchored_attention_varlen, packed_q, packed_k, packed_k, marks, marks, 6, 6),
        "cache": partial(anchored_attention_decode, q[:, :, :1], k, k, marks[1:]),
    }[call]
    with pytest.raises(kind, match=message):
        attend(**options)


def test_the_largest_post_exp_gate_is_within_as_a_logarithm() -> None:
    q = torch.zeros(1, 1, 2, 16)
    edges = torch.tensor([2.0**20, 2.0**-20]).log()
    anchored_attention(q, q, q, log_gamma_k=edges, gate_form="post-exp")
    assert choose_gate_form(log_gamma_k=edges) == "post-exp"
    assert choose_gate_form(log_gamma_k=edges * 1.001) == choose_gate_form(log_gamma_k=edges - INF) == "log-bias"
    with pytest.raises(ValueError, match="log_gamma_k must be finite"):
        choose_gate_form(log_gamma_k=edges * NAN)
    with pytest.raises(ValueError, match="gamma_k or log_gamma_k must be given"):
        choose_gate_form()


@pytest.mark.parametrize("gate", ["log-per-query-head", "log"])
@pytest.mark.parametrize("queries", [2, 17], ids=["few", "prefill"])
def test_opcheck(queries: int, gate: str, device: torch.device) -> None:
    problem = Problem("opcheck", query_heads=2, kv_heads=1, queries=queries, keys=20, head_dim=16, gate=gate)
    (q, k, v), options = problem.make(device)
    tensors = [x.requires_grad_() for x in (q, k, v, options["log_gamma_k"], options["gamma_v"])]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    given = (*tensors, None, 0.25, True, None, None, False, True, False)
    torch.library.opcheck(anchored_attention_op, given, test_utils=checks)


def test_opcheck_of_packed_calls_and_caches(device: torch.device) -> None:
    (q, k, v, *offsets), options = packed(PACKED[3], device)
    tensors = [x.requires_grad_() for x in (options["log_gamma_k"], options["gamma_v"])]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    given = (q, k, v, *offsets, *tensors, 0.25, True, None, None, False, True)
    torch.library.opcheck(varlen_op, given, test_utils=checks)
    q, cache = torch.randn(2, 4, 2, 16, device=device), torch.randn(2, 2, 16, 16, device=device)
    lengths = torch.tensor([16, 5], dtype=torch.int32, device=device)
    gates = torch.randn(2, 1, 16, device=device).expand(2, 2, 16), torch.rand(2, 4, 40, device=device)[..., 3:19]
    given = (q, cache, cache + 1, lengths, None, *gates, 0.25, True, 4, None)
    torch.library.opcheck(decode_op, given, test_utils=checks[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break_and_once_for_growing_keys(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(*tensors: torch.Tensor, **options: Any) -> Any:
        return anchored_attention(*tensors, **options, return_lse=True, backend=backend)

    with torch.no_grad():
        for keys in (40, 41, 57):
            tensors, options = small("compiled", gate="log-per-query-head", keys=keys).make(device)
            assert_as_exact_as_eager(attend(*tensors, **options), tensors, options)
    assert counter.frame_count <= 2
