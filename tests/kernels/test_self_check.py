"""The check of first calls: right results never warn, a planted fault is found, answered for, and told once."""

import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Problem

from videoanchor_triton.kernels import ops, ops_cache, self_check, validation
from videoanchor_triton.kernels.api import anchored_attention, anchored_attention_varlen
from videoanchor_triton.kernels.api_cache import anchored_attention_decode

WRONG = "a Triton kernel gave wrong results"
NAN, INF = float("nan"), float("inf")
Verdicts = dict[self_check.Variant, bool]
Tensors = list[torch.Tensor]
small = partial(Problem, batch=1, query_heads=2, kv_heads=1, queries=34, keys=50, head_dim=16)


@pytest.fixture(autouse=True)
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Verdicts:
    """Those of the test, in which first calls are checked."""
    monkeypatch.setenv(self_check.SWITCH, "first")
    found: Verdicts = {}
    monkeypatch.setattr(self_check, "_right", found)
    return found


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WRONG)
        yield


RIGHT = [
    small("plain"),
    small("ungated-not-causal", gate="none", causal=False),
    small("dead-rows-when-queries-exceed-keys", queries=40, keys=20),
    small("gate-per-head-bf16", batch=2, query_heads=4, kv_heads=2, gate="per-head", dtype=torch.bfloat16),
    small("gates-shorter-than-keys", gate_keys=41),
    small("gates-of-length-0", gate_keys=0),
    small("log-gates-padding-nan", batch=2, gate="log", padding="left-nan"),
    small("log-gates-of-query-heads-bf16", query_heads=4, kv_heads=2, gate="log-per-query-head", dtype=torch.bfloat16),
    small("gates-of-query-heads", query_heads=4, kv_heads=2, gate="per-query-head", gate_keys=41),
    small("gates-of-query-heads-decode", queries=2, query_heads=4, kv_heads=2, gate="per-query-head"),
    small("gates-within-post-exp-limits-fp16", gate="wide", dtype=torch.float16),
    small("gates-up-to-1e6-bf16", gate="huge", dtype=torch.bfloat16),
    small("gate-0-on-dominating-keys", gate="zero"),
    small("all-gates-0", gate="all-zero", causal=False),
    small("values-beyond-fp16", gate="beyond-fp16", dtype=torch.float16),
    small("value-gates-beyond-fp16", gate="huge-value", dtype=torch.float16),
    small("logits-times-1000-bf16", logits=1000.0, dtype=torch.bfloat16),
    small("padding-holds-nan", batch=2, padding="left-nan"),
    small("all-keys-padded", batch=2, padding="all"),
    small("window-softcap-padding", batch=2, padding="left-nan", window=9, softcap=3.0),
    small("softcap-saturated-bf16", softcap=0.5, logits=10.0, dtype=torch.bfloat16),
    small("decode-fp16", queries=1, keys=90, dtype=torch.float16),
    small("decode-window-padding-nan", batch=2, queries=3, window=20, padding="left-nan"),
]


def run(tensors: tuple[torch.Tensor, ...], options: dict[str, Any], gate_form: str = "log-bias") -> Tensors:
    """out, lse and the gradients by the kernels."""
    options = {name: x for name, x in options.items() if name != "gamma_q"}
    leaves = [x.detach().requires_grad_() for x in tensors]
    gates = {name: x.detach().requires_grad_() for name, x in options.items() if "gamma" in name}
    attended = partial(anchored_attention, backend="triton", gate_form=gate_form, return_lse=True)
    out, lse = attended(*leaves, **(options | gates))
    generator = torch.Generator().manual_seed(1)
    d_out = 1e-2 * torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    d_lse = torch.ones_like(lse).masked_fill(lse == -INF, NAN)
    return [out, lse, *torch.autograd.grad((out, lse), [*leaves, *gates.values()], (d_out, d_lse))]


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("problem", RIGHT, ids=str)
def test_right_results_pass(problem: Problem, device: torch.device, verdicts: Verdicts) -> None:
    run(*problem.make(device))
    if problem.bounded and problem.queries > 16:
        run(*problem.make(device), gate_form="post-exp")
    seen = set() if problem.gate == "all-zero" else {"backward", "paged" if problem.queries < 17 else "prefill"}
    assert {variant[0] for variant in verdicts} == seen, "a call without a visible key says nothing"
    assert all(verdicts.values())


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_extreme_gates_pass(factor: float, device: torch.device, verdicts: Verdicts) -> None:
    tensors, options = small("extreme").make(device)
    run(tensors, options | {"gamma_k": options["gamma_k"] * factor})
    assert list(verdicts.values()) == [True, True]


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, 3e38])
def test_what_no_kernel_can_do_right_passes(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    for place in range(3):
        (q, k, v), options = small("bad", dtype=dtype).make(device)
        (q, k, v)[place][:, :, 30, 3] = bad
        for tensors in ((q, k, v), (q[:, :, -2:], k, v)):
            gates = {name: x for name, x in options.items() if name != "gamma_q"}
            anchored_attention(*tensors, **gates, backend="triton")


def problem_of(kind: str, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensors]:
    """A call of the op `kind`, which takes the backend."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    gates: dict[str, Any] = {
        name: 1 + torch.rand(80, generator=generator).to(device) for name in ("gamma_k", "gamma_v")
    }
    if kind in ("prefill", "decode", "backward"):
        q, k, v = draw(2, 2, 3 if kind == "decode" else 34, 16), draw(2, 1, 80, 16), draw(2, 1, 80, 16)
        if kind == "backward":
            return lambda backend: gradients_of(anchored_attention, (q, k, v), gates, backend)
        return lambda backend: [*anchored_attention(q, k, v, **gates, causal=True, return_lse=True, backend=backend)]
    if kind.startswith("packed"):
        q, k, v = draw(80, 2, 16), draw(80, 1, 16), draw(80, 1, 16)
        offsets = torch.tensor([0, 44, 80], dtype=torch.int32, device=device)
        attend = partial(anchored_attention_varlen, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
        attend = partial(attend, max_seqlen_q=44, max_seqlen_k=44)
        if kind == "packed-backward":
            return lambda backend: gradients_of(attend, (q, k, v), gates, backend)
        return lambda backend: [*attend(q, k, v, **gates, causal=True, return_lse=True, backend=backend)]
    lengths = torch.tensor([75, 33], dtype=torch.int32, device=device)
    table = None if kind == "cache" else torch.tensor([[4, 1, 0, 2, 3], [9, 8, 7, -5, 99]], dtype=torch.int32)
    shape = (2, 2, 80, 16) if table is None else (10, 2, 16, 16)
    caches = q, k, v = draw(2, 4, 1, 16), draw(*shape), draw(*shape)
    table = None if table is None else table.to(device)
    attend = partial(anchored_attention_decode, *caches, lengths, table, **gates, return_lse=True)
    return lambda backend: [*attend(backend=backend)]


def gradients_of(attend: Any, tensors: tuple[torch.Tensor, ...], gates: dict[str, Any], backend: str) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in (*tensors, *gates.values())]
    gates = dict(zip(gates, leaves[3:], strict=True))
    out, lse = attend(*leaves[:3], **gates, causal=True, return_lse=True, backend=backend)
    return [*torch.autograd.grad((out.float() + lse[..., None]).square().sum(), leaves)]


FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "2% off": lambda x: x.mul_(1.02),
    "rows of another place": lambda x: x.copy_(x.roll(*((16, -2) if x.dim() == 4 and x.shape[2] > 16 else (1, 0)))),
    "another head": lambda x: x.copy_(x.roll(1, 1)),
    "nan": lambda x: x.fill_(NAN),
}
LAUNCHES = {"prefill": "prefill", "packed": "prefill", "packed-backward": "backward", "backward": "backward"}
MODULES = {"cache": ops_cache, "pages": ops_cache}
PLACES = {"prefill": 6, "paged": 3}  # of out among a launcher's arguments
KINDS = ("prefill", "decode", "packed", "cache", "pages", "backward", "packed-backward")


def plant(kind: str, fault: Callable[[torch.Tensor], Any], patch: pytest.MonkeyPatch) -> list[str]:
    """Let the launcher of `kind` spoil what it computes; gives the launches."""
    name = LAUNCHES.get(kind, "paged")
    module = MODULES.get(kind, ops)
    launcher, launches = getattr(module, name), []

    def faulty(*args: Any, **options: Any) -> Any:
        launches.append(name)
        found = launcher(*args, **options)
        if found is None:
            fault(args[PLACES[name]])
            return None
        spoilt: list[Any] = [x if x is None else x.clone() for x in found]
        for x in spoilt[:3]:
            fault(x)
        return tuple(spoilt)

    patch.setattr(module, name, faulty)
    return launches


@pytest.mark.parametrize(
    ("fault", "dtype"), [*((fault, torch.float32) for fault in FAULTS), ("2% off", torch.bfloat16)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_kernel_is_found_and_answered_for(
    kind: str, fault: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = problem_of(kind, dtype, device)
    launches = plant(kind, FAULTS[fault], monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"{WRONG} on .* with Triton .*videoanchor check") as told:
        first = call("triton")
    assert len([w for w in told if WRONG in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WRONG)
        second = call("triton")
    assert len(launches) == 1
    for mine, again, theirs in zip(first, second, call("sdpa"), strict=True):
        assert mine.dtype == theirs.dtype
        close = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine, theirs, rtol=close, atol=close * theirs.abs().max().item())
        assert torch.equal(mine, again)


@pytest.mark.parametrize("kind", ["cache", "pages"])
def test_a_length_beyond_the_cache_is_not_the_kernels_fault(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, verdicts: Verdicts
) -> None:
    monkeypatch.setattr(validation, "values_are_free", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 1, n, 16, generator=generator).to(device) for n in (1, 32))
    lengths = torch.tensor([40, 9], dtype=torch.int32, device=device)
    table = None if kind == "cache" else torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    k = k if table is None else k.view(4, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WRONG)
        out = anchored_attention_decode(q, k, k, lengths, table, backend="triton")
    assert isinstance(out, torch.Tensor)
    assert out[0].isnan().all()
    assert list(verdicts.values()) == [True]


def test_threads_that_call_first_at_once_warn_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = problem_of("decode", torch.float32, device)
    expected, together = call("sdpa"), threading.Barrier(3)

    def wrong(*args: Any, **_: Any) -> None:  # no kernel: the interpreter runs one at a time
        args[3].fill_(1)
        args[4].fill_(1)
        together.wait(30)

    monkeypatch.setattr(ops, "paged", wrong)
    found: list[Tensors] = []
    threads = [threading.Thread(target=lambda: found.append(call("triton"))) for _ in range(3)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([w for w in told if WRONG in str(w.message)]) == 1
    assert len(found) == 3
    for out, _ in found:
        torch.testing.assert_close(out, expected[0])


@pytest.mark.parametrize(
    ("setting", "checks"), [("off", 0), ("first", 1), ("always", 3), (None, 1), ("shown right", 0)]
)
def test_how_often_a_call_is_checked(
    setting: str | None, checks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(self_check.SWITCH)
    if setting == "shown right":
        monkeypatch.setattr(self_check, "SHOWN_RIGHT", {self_check._card(device)})
    elif setting is not None:
        monkeypatch.setenv(self_check.SWITCH, setting)
    asked: list[str] = []
    compare = ops.dense_error
    monkeypatch.setattr(ops, "dense_error", lambda *args: (asked.append("dense"), compare(*args))[1])
    call = problem_of("decode", torch.float32, device)
    for _ in range(3):
        call("triton")
    assert len(asked) == checks


def test_a_setting_that_does_not_exist(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.SWITCH, "on")
    with pytest.raises(ValueError, match="VIDEOANCHOR_SELF_CHECK must be first, off or always, got 'on'"):
        problem_of("decode", torch.float32, device)("triton")


def test_a_call_that_shows_nothing_leaves_the_next_one_to_be_checked(device: torch.device, verdicts: Verdicts) -> None:
    q, k = torch.zeros(1, 1, 1, 16, device=device), torch.randn(1, 1, 20, 16, device=device)
    anchored_attention(q, k, torch.zeros_like(k), backend="triton")
    assert not verdicts
    anchored_attention(q, k, k, backend="triton")
    assert list(verdicts.values()) == [True]


def test_a_wrong_kernel_is_answered_for_in_a_compiled_graph(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    call = problem_of("decode", torch.float32, device)
    launches = plant("decode", FAULTS["2% off"], monkeypatch)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=WRONG):
        found = compiled("triton"), compiled("triton")
    for out, lse in found:
        torch.testing.assert_close([out, lse], call("sdpa"))
    assert len(launches) == 1
