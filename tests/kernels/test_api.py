"""Errors, dispatch, and the operator under torch.compile."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Problem, assert_as_exact_as_eager
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from videoanchor_triton.kernels import dispatch
from videoanchor_triton.kernels.api import anchored_attention, anchored_attention_varlen
from videoanchor_triton.kernels.api_cache import anchored_attention_decode
from videoanchor_triton.kernels.dispatch import available_backends, choose_backend, triton_refusal
from videoanchor_triton.kernels.ops import anchored_attention_op, backward_op, varlen_op
from videoanchor_triton.kernels.ops_cache import decode_op

Q, K = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16)
NAN, INF = float("nan"), float("inf")


def gate(value: float, at: tuple[int, ...] = (1, 3), shape: tuple[int, ...] = (2, 5)) -> torch.Tensor:
    ones = torch.ones(shape)
    ones[at] = value
    return ones


def triton_with(x: torch.Tensor) -> dict[str, Any]:
    return {"q": x, "k": x, "v": x, "backend": "triton"}


INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "backend": (ValueError, "backend must be one of", {"backend": "flash"}),
    "gate-form": (ValueError, "gate_form must be one of", {"gate_form": "pre-exp"}),
    "q-dimensions": (ValueError, "q must have 4 dimensions", {"q": Q[0]}),
    "q-list": (TypeError, "q must be a tensor", {"q": [1.0]}),
    "q-integers": (TypeError, "q must be a floating tensor", {"q": Q.long()}),
    "k-dtype": (TypeError, "k must have q's dtype", {"k": K.half()}),
    "k-batch": (ValueError, "k must have shape", {"k": K[:1]}),
    "k-head-dim": (ValueError, "k must have shape", {"k": K[..., :8]}),
    "k-device": (ValueError, "k must be on q's device", {"k": K.to("meta")}),
    "v-shape": (ValueError, "v must have k's shape", {"v": K[:, :, :4]}),
    "heads": (ValueError, "q's heads must be a multiple", {"q": torch.zeros(2, 3, 3, 16)}),
    "no-kv-heads": (ValueError, "q's heads must be a multiple", {"k": K[:, :0], "v": K[:, :0]}),
    "gate-too-long": (ValueError, "gamma_k must have shape", {"gamma_k": torch.ones(6)}),
    "gate-batch": (ValueError, "gamma_v must have shape", {"gamma_v": torch.ones(3, 5)}),
    "gate-of-3-heads": (ValueError, r"\(2, 2, N <= 5\) or \(2, 4, N <= 5\), got", {"gamma_k": torch.ones(2, 3, 5)}),
    "gate-scalar": (ValueError, "gamma_k must have shape", {"gamma_k": torch.ones(())}),
    "gate-integers": (TypeError, "gamma_k must be a floating tensor", {"gamma_k": torch.ones(5, dtype=torch.long)}),
    "gate-negative": (ValueError, r"gamma_k must be finite and at least 0 .* \[1, 3\]", {"gamma_k": gate(-1)}),
    "gate-nan": (ValueError, "gamma_v must be finite", {"gamma_v": gate(NAN)}),
    "gate-inf": (ValueError, "gamma_k must be finite", {"gamma_k": gate(INF)}),
    "gate-0-post-exp": (ValueError, "post-exp", {"gamma_k": gate(0), "gate_form": "post-exp"}),
    "gate-huge-post-exp": (ValueError, "post-exp", {"gamma_k": gate(2.0**21), "gate_form": "post-exp"}),
    "gamma-q-length": (ValueError, "gamma_q must have shape", {"gamma_q": torch.ones(2)}),
    "gamma-q-negative": (ValueError, "gamma_q must be finite", {"gamma_q": -torch.ones(3)}),
    "mask-dtype": (TypeError, "key_padding_mask must be a bool", {"key_padding_mask": torch.ones(2, 5)}),
    "mask-shape": (ValueError, "key_padding_mask must have shape", {"key_padding_mask": torch.ones(5) > 0}),
    "scale-0": (ValueError, "scale must be finite and > 0", {"scale": 0.0}),
    "scale-nan": (ValueError, "scale must be finite and > 0", {"scale": NAN}),
    "window-0": (ValueError, "window must be None or an int", {"window": 0, "causal": True}),
    "window-float": (ValueError, "window must be None or an int", {"window": 2.0, "causal": True}),
    "window-not-causal": (ValueError, "window needs causal=True", {"window": 2}),
    "triton-head-dim": (ValueError, "head dim is 24.*use backend='sdpa'", triton_with(torch.zeros(2, 2, 5, 24))),
    "triton-dtype": (ValueError, "dtype is torch.float64", triton_with(torch.zeros(2, 2, 5, 16).double())),
    "hopper-target": (ValueError, "backend='hopper' cannot take this call", {"backend": "hopper"}),
    "softcap-0": (ValueError, "softcap must be None or finite", {"softcap": 0.0}),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_refused(name: str) -> None:
    kind, message, change = INVALID[name]
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": K}
    with pytest.raises(kind, match=message):
        anchored_attention(**(arguments | change))


@pytest.mark.parametrize("shape", [(2, 5), (2, 2, 5)], ids=["per-batch", "per-head"])
def test_hidden_gate_values_are_not_refused(shape: tuple[int, ...]) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    bad = gate(NAN, (1, ..., 3), shape)  # pyright: ignore[reportArgumentType]
    out = anchored_attention(Q, K, K, gamma_k=bad, gamma_v=bad, key_padding_mask=mask)
    assert isinstance(out, torch.Tensor)
    assert not out.isnan().any()
    with pytest.raises(ValueError, match="gamma_k must be finite"):
        anchored_attention(Q, K, K, gamma_k=bad, key_padding_mask=~mask)


def test_a_shared_gate_is_refused_where_any_sequence_sees_the_key() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    with pytest.raises(ValueError, match="gamma_k must be finite"):
        anchored_attention(Q, K, K, gamma_k=gate(NAN, (3,), (5,)), key_padding_mask=mask)


@pytest.mark.parametrize("queries", [2, 20], ids=["decode", "prefill"])
def test_triton_is_differentiable(queries: int, device: torch.device) -> None:
    tensors, options = Problem("grad", queries=queries).make(device)
    for x in (*tensors, options["gamma_k"], options["gamma_v"]):
        x.requires_grad_()
    leaves = [*tensors, options["gamma_k"], options["gamma_v"]]
    grads = {}
    for backend in ("triton", "reference"):
        out, lse = anchored_attention(*tensors, **options, return_lse=True, backend=backend)
        grads[backend] = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    for mine, exact in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    assert "TRITON_INTERPRET" in (triton_refusal(torch.device("cpu")) or "")
    assert available_backends("cpu")["triton"].startswith("no: the tensors are on cpu")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1; use backend='sdpa'"):
        anchored_attention(Q, K, K, backend="triton")


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120"), ((7, 5), None)],
)
def test_gpus_map_to_the_nearest_known_tiles(
    capability: tuple[int, int], target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert dispatch.triton_target(torch.device("cuda"))[0] == target
    assert (triton_refusal(torch.device("cuda")) is None) == (target is not None)


@pytest.mark.parametrize(
    ("op", "level"), [(None, "INFO"), ("decode", "WARNING"), ("packed sequences", "WARNING")], ids=str
)
def test_a_fallback_on_a_gpu_is_logged_once(
    op: str | None, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a warning where the other backend reads lengths on the host."""
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: f"of a test of {op}")
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        q = torch.empty(1, 1, 1, 24)
        on_gpu = type(
            "OnGpu", (), {"device": torch.device("cuda"), "requires_grad": False, "dtype": q.dtype, "shape": q.shape}
        )
        assert [choose_backend("auto", on_gpu(), op) for _ in range(2)] == ["sdpa", "sdpa"]  # pyright: ignore[reportArgumentType]
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage().endswith(f": of a test of {op}")
    assert ("no CUDA graph" in record.getMessage()) == (level == "WARNING")


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("value", [1e40, 1e-50, 1e-42])
def test_fp64_gates_that_fp32_cannot_hold_are_refused(value: float, backend: str, device: torch.device) -> None:
    q = torch.randn(1, 1, 3, 16, device=device)
    gates = torch.ones(3, dtype=torch.float64, device=device)
    gates[1] = value
    offsets, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3], [3]))
    packed = q[0, 0][:, None]
    for name in ("gamma_k", "gamma_v", "gamma_q"):
        options: dict[str, Any] = {name: gates, "backend": backend, "return_lse": True}
        for attend in (
            lambda options: anchored_attention(q, q, q, **options),
            lambda options: anchored_attention_varlen(packed, packed, packed, offsets, offsets, 3, 3, **options),
            lambda options: anchored_attention_decode(q, q, q, lengths, **options),
        ):
            if device.type == "cpu":
                with pytest.raises(ValueError, match=rf"{name} must be .* fp32 must hold it .* at \[1\]"):
                    attend(options)
            else:
                assert any(x.isnan().any() for x in attend(options))
    if backend != "triton":
        wide = q.double()
        assert anchored_attention(wide, wide, wide, gamma_v=gates, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gates_of_any_dtype_are_those_of_fp32(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    (q, k, v), options = Problem("dtypes", queries=20, keys=30).make(device)
    gates = [options[name].to(dtype).requires_grad_() for name in ("gamma_k", "gamma_v")]
    rounded = [gate.detach().float().requires_grad_() for gate in gates]
    found = []
    for gamma_k, gamma_v in (gates, rounded):
        out, lse = anchored_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v, return_lse=True, backend=backend)
        found.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (gamma_k, gamma_v))))
    assert [x.dtype for x in found[0]] == [torch.float32, torch.float32, dtype, dtype]
    torch.testing.assert_close(found[0], tuple(x.to(y.dtype) for x, y in zip(found[1], found[0], strict=True)))


def test_available_backends_says_a_line_for_each(device: torch.device) -> None:
    lines = available_backends(device)
    assert list(lines) == ["triton", "hopper", "sdpa", "reference"]
    assert all(line and "\n" not in line for line in lines.values())


def test_without_triton_the_rest_works() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch\n"
        "from videoanchor_triton import anchored_attention, anchored_attention_decode, available_backends\n"
        "assert available_backends('cpu')['triton'] == 'no: triton is not installed'\n"
        "x = torch.ones(1, 1, 2, 8)\n"
        "assert anchored_attention(x, x, x, gamma_k=torch.ones(2)).shape == x.shape\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


SMALL = Problem("opcheck", query_heads=2, kv_heads=1, queries=17, keys=20, head_dim=16, padding="left")
CHEAP = ("test_schema", "test_faketensor")  # the second set of flags


@pytest.mark.parametrize("problem", [SMALL, replace(SMALL, queries=2, layout="bnhd")], ids=["prefill", "decode"])
def test_opcheck(problem: Problem, device: torch.device) -> None:
    (q, k, v), options = problem.make(device)
    tensors = [x.requires_grad_() for x in (q, k, v, options["gamma_k"], options["gamma_v"])]
    mask = options["key_padding_mask"]
    torch.library.opcheck(anchored_attention_op, (*tensors, mask, 0.25, True, 9, None, True, False, False))
    ungated = (q, k, v, None, None, None, 0.25, False, None, 5.0, False, False, False)
    torch.library.opcheck(anchored_attention_op, ungated, test_utils=CHEAP)


def packed(device: torch.device) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Tensors of varlen_op (q, k, v, per-head gates) that require grad, and its offsets and longest lengths."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=generator) for n, h in ((9, 4), (14, 2), (14, 2)))
    gates = (1 + torch.rand(14, 2, generator=generator) for _ in range(2))
    offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4, 4, 9], [0, 5, 8, 14]))
    return tuple(x.to(device).requires_grad_() for x in (q, k, v, *gates)), (*offsets, 5, 6)


def test_opcheck_of_varlen(device: torch.device) -> None:
    (q, k, v, *gates), offsets = packed(device)
    torch.library.opcheck(varlen_op, (q, k, v, *offsets, *gates, 0.25, True, 3, None, False, False))
    half_gated = (q, k, v, *offsets, None, gates[1][:, 0], 0.25, False, None, 5.0, True, False)
    torch.library.opcheck(varlen_op, half_gated, test_utils=CHEAP)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_opcheck_of_a_cache(paged: bool, device: torch.device) -> None:
    q, cache = torch.randn(2, 4, 2, 16, device=device), torch.randn(2, 2, 16, 16, device=device)
    lengths = torch.tensor([16, 5], dtype=torch.int32, device=device)
    table = torch.tensor([[1], [0]], dtype=torch.int32, device=device) if paged else None
    gamma = torch.rand(2, 16, device=device)
    torch.library.opcheck(decode_op, (q, cache, cache + 1, lengths, table, gamma, gamma, 0.25, True, 4, None))
    half_gated = (q, cache, cache + 1, lengths, table, None, gamma, 0.25, False, None, 5.0)
    torch.library.opcheck(decode_op, half_gated, test_utils=CHEAP)


def test_opcheck_of_the_backward(device: torch.device) -> None:
    tensors, options = SMALL.make(device)
    gated = (*tensors, options["gamma_k"], options["gamma_v"], options["key_padding_mask"])
    found = anchored_attention_op(*gated, 0.25, True, None, None, False, False, False)
    upstream = [torch.randn_like(x) for x in found]
    options = 0.25, True, None, None, False, None, None, None, None
    torch.library.opcheck(backward_op, (*gated, *found, *upstream, *options))
    wide = (*gated[:3], gated[3].double(), gated[4].double(), gated[5])
    torch.library.opcheck(backward_op, (*wide, *found, *upstream, *options), test_utils=CHEAP)


def test_opcheck_of_the_packed_backward(device: torch.device) -> None:
    tensors, (*offsets, longest_q, longest_k) = packed(device)
    q, k, v, gamma_k, _ = (x.detach() for x in tensors)
    found = varlen_op(q, k, v, *offsets, longest_q, longest_k, gamma_k, None, 0.25, True, None, 5.0, False, False)
    upstream = [torch.randn_like(x) for x in found]
    options = 0.25, True, None, 5.0, False, *offsets, longest_q, longest_k
    torch.library.opcheck(backward_op, (q, k, v, gamma_k, None, None, *found, *upstream, *options))


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("queries", [1, 17], ids=["decode", "prefill"])
def test_compiles_without_a_break_and_once_for_growing_keys(backend: str, queries: int, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(*tensors: torch.Tensor, **options: Any) -> Any:
        return anchored_attention(*tensors, **options, return_lse=True, backend=backend)

    with torch.no_grad():
        for keys in (40, 41, 42, 57, 64):
            tensors, options = replace(SMALL, queries=queries, keys=keys, gate_keys=30).make(device)
            assert_as_exact_as_eager(attend(*tensors, **options), tensors, options)
    assert counter.frame_count <= 2


def test_gradients_compile_without_a_break_and_once_for_growing_keys(device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma_k: torch.Tensor, offsets: torch.Tensor) -> Any:
        dense = anchored_attention(q, k, v, gamma_k=gamma_k, causal=True, return_lse=True, backend="triton")
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        longest = q.shape[0], k.shape[0]
        out, lse = anchored_attention_varlen(
            q, k, v, offsets[0], offsets[1], *longest, gamma_v=gamma_k, return_lse=True, backend="triton"
        )
        return out.sin().sum() + lse.sum() + sum(x.square().sum() for x in dense)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for keys in (20, 21, 26):
        problem = replace(SMALL, batch=1, keys=keys, gate="shared", padding=None)
        (q, k, v), options = problem.make(device)
        inputs = [x.requires_grad_() for x in (q, k, v, options["gamma_k"])]
        offsets = torch.tensor([[0, 17], [0, keys]], dtype=torch.int32, device=device)
        found, expected = (torch.autograd.grad(form(*inputs, offsets=offsets), inputs) for form in (compiled, loss))
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2
