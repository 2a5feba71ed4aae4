"""The list of small calls: right as the kernels are, and wrong with an error of 2% planted in any of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from videoanchor_triton.kernels import dispatch, ops, ops_cache, ops_paged, sanity
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.sanity import Finding, Form
from videoanchor_triton.kernels.sanity_paged import Quantised, with_sinks

CPU = torch.device("cpu")
INTERPRETED = list(sanity._forms("triton", torch.float32, large=False))
ON_A_CARD = list(sanity._forms("sdpa", torch.bfloat16, large=True))
WRITTEN = {"prefill": 6, "paged": 3}  # where the launchers take `out`
EVERY = 1.02
Launcher = Callable[..., Any]


def planted(
    launcher: Callable[..., Any], place: int | None, spoil: Callable[[torch.Tensor], Any]
) -> Callable[..., Any]:
    """The launcher, with its `out` (or, without a place, its first gradient) spoilt."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        returned = launcher(*args, **kwargs)
        spoil(returned[0] if place is None else args[place])
        return returned

    return launch


def plant(monkeypatch: pytest.MonkeyPatch, form: Form, spoil: Callable[[torch.Tensor], Any]) -> None:
    if form.kernel == "sdpa":
        monkeypatch.setattr(dispatch, "sdpa_attention", planted(dispatch.sdpa_attention, None, spoil))
    elif form.kernel == "merge":
        monkeypatch.setattr(sanity, "merge_attention", planted(sanity.merge_attention, None, spoil))
    elif form.kernel == "backward":
        monkeypatch.setattr(ops, "backward", planted(ops.backward, None, spoil))
    else:
        name = "paged" if form.kernel in ("decode", "paged") else "prefill"
        for module in (ops, ops_cache, ops_paged):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, planted(getattr(module, name), WRITTEN[name], spoil))


@pytest.mark.parametrize("form", INTERPRETED, ids=lambda form: form.name)
def test_right_and_2_percent_wrong(form: Form, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    found = form.check(device)
    assert found.right, found
    plant(monkeypatch, form, lambda out: out.mul_(EVERY))
    found = form.check(device)
    assert not found.right, found


@pytest.mark.parametrize("form", [form for form in ON_A_CARD if not form.gradients], ids=lambda form: form.name)
def test_2_percent_are_seen_in_16_bits(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a card's sizes and dtypes, where a right result is off by most."""
    assert form.check(CPU).right
    plant(monkeypatch, form, lambda out: out.mul_(EVERY))
    assert not form.check(CPU).right


@pytest.mark.parametrize("form", [INTERPRETED[0], INTERPRETED[-1]], ids=lambda form: form.name)
def test_nan_is_wrong(form: Form, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    plant(monkeypatch, form, lambda out: out[..., -1:, :].fill_(float("nan")))
    assert not form.check(device).right


def test_each_backend_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(target: str | None) -> list[Form]:
        monkeypatch.setattr(sanity, "triton_target", lambda _: (target, ""))
        found = sanity.forms(CPU)
        assert len({form.name for form in found}) == len(found)
        return found

    assert {form.call["backend"] for form in listed(None)} == {"sdpa"}
    assert {form.call["backend"] for form in listed("interpreter")} == {"triton"}
    assert torch.bfloat16 not in {form.dtype for form in listed("interpreter")}
    fp8 = {target: any("float8" in form.name for form in listed(target)) for target in ("sm_80", "sm_89", "gfx942")}
    assert fp8 == {"sm_80": False, "sm_89": True, "gfx942": False}
    ampere, hopper = listed("sm_80"), listed("sm_90")
    assert {form.dtype for form in ampere} == {torch.bfloat16, torch.float16, torch.float32}
    assert {form.name for form in ampere if form.kernel == "sdpa"} == set(sanity.FALLBACKS)
    assert {form.kernel for form in hopper} - {form.kernel for form in ampere} == {"hopper"}


@pytest.mark.parametrize("quantised", [Quantised(torch.int8, True), Quantised(torch.float8_e4m3fn, False)], ids=str)
def test_what_a_quantised_cache_holds_is_exact_in_16_bits(quantised: Quantised) -> None:
    x = quantised.held(torch.randn(1, 2, 50, 16))
    assert torch.equal(x.to(torch.bfloat16).float(), x)
    assert torch.equal(quantised.held(x), x)
    assert x.abs().max() > 1


def test_a_sink_is_a_key_of_value_0() -> None:
    q, k, v = (torch.randn(1, 1, n, 16, dtype=torch.float64) for n in (3, 5, 5))
    sink = torch.tensor(0.7)
    found = with_sinks(reference_attention(q, k, v, scale=1.0), (sink.item(),))
    scores = torch.cat([q @ k.mT, sink.double().expand(1, 1, 3, 1)], -1)
    torch.testing.assert_close(found[1], scores.logsumexp(-1))
    torch.testing.assert_close(found[0], scores.softmax(-1)[..., :-1] @ v)


def test_what_fails_raises(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(ops, "prefill", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        INTERPRETED[0].check(device)


def test_nothing_is_not_right() -> None:
    assert not Finding("out", float("nan"), 1.0).right
    assert sanity._worst([("a", 0.0, 0.0), ("b", 1.0, 2.0), ("c", float("nan"), 2.0)]).what == "c"
