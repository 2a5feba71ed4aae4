"""The Hopper kernel: emulated against the fp64 specification, compiled for sm_90, and run on a Hopper GPU if any."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_emulated import BASE, BF16, FORMS, FP16, MASKS, SCHEDULES, SMALL, check, emulated
from oracle import Problem, assert_as_exact_as_eager

from videoanchor_triton.kernels import hopper, measured
from videoanchor_triton.kernels.gates import pad_gate
from videoanchor_triton.kernels.hopper import hopper_enabled, hopper_prefill, hopper_refusal

PROBLEMS = [
    BASE,
    replace(BASE, name="not-causal", causal=False, dtype=FP16),
    replace(BASE, name="square", query_heads=4, kv_heads=4, queries=70),
    replace(BASE, name="many-tiles", query_heads=1, kv_heads=1, queries=33, keys=200),
    replace(BASE, name="head-dim-128", head_dim=128),
    replace(BASE, name="head-dim-128-not-causal", head_dim=128, causal=False, dtype=FP16),
    replace(BASE, name="tile-aligned", queries=64, keys=64),
    replace(BASE, name="one-beyond-a-tile", queries=65, keys=65),
    replace(BASE, name="one-key", keys=1),
    replace(BASE, name="one-query-one-key", queries=1, keys=1),
    replace(BASE, name="rows-without-a-key", queries=100, keys=40),
    replace(BASE, name="more-queries-than-keys", queries=70, keys=40, causal=False),
    replace(BASE, name="gqa-7-to-1", query_heads=7, kv_heads=1, queries=20),
    replace(BASE, name="gate-per-head", query_heads=4, kv_heads=2, batch=2, gate="per-head", queries=20),
    replace(BASE, name="gate-per-query-head", query_heads=4, kv_heads=2, batch=2, gate="per-query-head", queries=20),
    replace(BASE, name="gate-per-batch", batch=3, queries=20),
    replace(BASE, name="gate-0-on-dominating-keys", gate="zero"),
    replace(BASE, name="all-gates-0", gate="all-zero", causal=False),
    replace(BASE, name="gate-0-on-a-prefix", gate="some-zero"),
    replace(BASE, name="gates-up-to-1e6", gate="huge"),
    replace(BASE, name="gates-within-post-exp-limits", gate="wide"),
    replace(BASE, name="gates-shorter-than-keys", gate_keys=41),
    replace(BASE, name="logits-times-1000", logits=1000.0),
    replace(BASE, name="bnhd-strides", batch=2, layout="bnhd", queries=20),
    replace(BASE, name="fused-qkv-strides", batch=2, layout="fused", queries=20),
]
RUNS = [
    pytest.param(problem, form, schedule, id=f"{problem}-{form}-{schedule.replace(' ', '-').replace(',', '')}")
    for i, problem in enumerate(PROBLEMS)
    for j, form in enumerate(FORMS if i < 8 else [*FORMS][1:])
    for schedule in ([*SCHEDULES] if i == 0 else [[*SCHEDULES][(i + j) % 3]])
    if (form != "post-exp" or problem.bounded) and (form != "ungated" or problem.gate == BASE.gate)
]


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """emulate(schedule): see `emulated`."""
    return partial(emulated, monkeypatch)


@pytest.mark.parametrize(("problem", "form", "schedule"), RUNS)
def test_as_exact_as_eager(problem: Problem, form: str, schedule: str, emulate: Any) -> None:
    emulate(schedule)
    check(problem, form)


@pytest.mark.parametrize("keys", [16, 30, 48, 64, 79])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_visits(keys: int, schedule: str, emulate: Any) -> None:
    """From one to five for the last program, fewer for those before it; the queries stand anywhere in a tile."""
    emulate(schedule)
    for queries in (16, 40, keys + 16):
        check(replace(BASE, queries=queries, keys=keys), "post-exp")


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_stages(stages: int, schedule: str, emulate: Any) -> None:
    emulate(schedule)
    check(replace(BASE, keys=120), "post-exp", SMALL._replace(stages=stages))


@pytest.mark.parametrize("layout", ["padded", "per-head", "one-for-all", "unaligned", "strided"])
def test_gate_layouts(layout: str, emulate: Any) -> None:
    """A gate of any strides gives what a padded contiguous one gives, and nothing beyond Nk is read."""
    emulate("loader first, late")
    q, k, v = (torch.randn(2, heads, length, 64).to(BF16) for heads, length in ((4, 20), (2, 37), (2, 37)))
    gamma = 1 + torch.rand(2, 2 if layout in ("per-head", "strided") else 1, 37)
    if layout == "one-for-all":
        gamma = gamma[:1]
    whole = gamma.expand(2, 2, 37).contiguous()
    gate = {
        "padded": pad_gate(gamma, 48, float("nan")),
        "per-head": pad_gate(gamma, 40, float("nan")),
        "one-for-all": gamma.expand(2, 2, 37),
        "unaligned": pad_gate(gamma, 38, float("nan"))[..., :37],
        "strided": torch.stack([gamma, torch.full_like(gamma, float("nan"))], -1)[..., 0],
    }[layout]
    results = []
    for given in (gate, pad_gate(whole, 48)):
        out, lse = torch.full_like(q, float("nan")), torch.full((2, 4, 20), float("nan"))
        hopper_prefill(q, k, v, given, out, lse, MASKS, FORMS["post-exp"], SMALL)
        results.append((out, lse))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][0].isnan().any()


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_rows_just_past_the_tail_are_not_read(layout: str, emulate: Any) -> None:
    """Rows past the last query and key, of the same buffer and of the next batch entry, hold NaN."""
    emulate("loader first, at once")

    def draw(heads: int, length: int) -> torch.Tensor:
        shape = (2, heads, length + 9, 64) if layout == "bhnd" else (2, length + 9, heads, 64)
        store = torch.full(shape, float("nan"), dtype=BF16)
        x = store if layout == "bhnd" else store.transpose(1, 2)
        x[0, :, :length] = torch.randn(heads, length, 64).to(BF16)
        return x[:, :, :length]

    q, k, v = draw(2, 21), draw(1, 37), draw(1, 37)
    out, lse = torch.zeros_like(q), torch.zeros(2, 2, 21)
    hopper_prefill(q, k, v, None, out, lse, MASKS, FORMS["ungated"], SMALL)
    assert_as_exact_as_eager((out[:1], lse[:1]), (q[:1], k[:1], v[:1]), {"causal": True})
    assert out[1].isnan().all()


def test_strides_of_single_heads_do_not_matter(emulate: Any) -> None:
    emulate("loader first, late")
    q, k, v = (torch.randn(1, 1, length, 64).to(BF16) for length in (20, 37, 37))
    odd = [x.as_strided(x.shape, (3, 5, 64, 1)) for x in (q, k, v)]
    assert hopper_refusal(odd[0], odd[1], odd[2], "sm_90") is None
    out, lse = torch.full_like(q, float("nan")), torch.full((1, 1, 20), float("nan"))
    hopper_prefill(odd[0], odd[1], odd[2], None, out, lse, MASKS, FORMS["ungated"], SMALL)
    assert_as_exact_as_eager((out, lse), (q, k, v), {"causal": True})


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target": "sm_100"}, "target is sm_100"),
    "dtype": ({"dtype": torch.float32}, "dtype is torch.float32"),
    "head-dim": ({"head_dim": 96}, "head dim is 96"),
    "window": ({"window": 5}, "no window"),
    "softcap": ({"softcap": 5.0}, "no softcap"),
    "padding": ({"padding": True}, "no padding"),
    "varlen": ({"varlen": True}, "no varlen"),
    "row-stride": ({"width": 68}, "multiples of 16 bytes"),
    "base": ({"begin": 4, "width": 72}, "k does not begin at a multiple of 16 bytes"),
    "repeated": ({"repeat": True}, "multiples of 16 bytes"),
    "no-keys": ({"keys": 0}, "no keys"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_kernel_does_not_take(name: str) -> None:
    change, reason = REFUSALS[name]
    options = {"target": "sm_90", "window": None, "softcap": None, "padding": False, "varlen": False}
    options |= {key: value for key, value in change.items() if key in options}
    head_dim, begin = change.get("head_dim", 64), change.get("begin", 0)
    shape = (2, 2, change.get("keys", 20), change.get("width", head_dim))
    k = torch.zeros(shape, dtype=change.get("dtype", BF16))[..., begin : begin + head_dim]
    k = k[:, :1].expand(2, 2, 20, 64) if change.get("repeat") else k
    q = torch.zeros((2, 2, 20, head_dim), dtype=k.dtype)
    refusal = hopper_refusal(q, k, k, **options)
    assert refusal is not None
    assert reason in refusal


def test_an_unknown_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 20, 64, dtype=BF16)
    for version in ("3.5.1", "3.10.0"):
        monkeypatch.setattr("triton.__version__", version)
        assert f"Triton is {version}" in str(hopper_refusal(x, x, x, "sm_90"))
    monkeypatch.setitem(sys.modules, "videoanchor_triton.kernels.hopper_kernel", None)
    monkeypatch.delattr("videoanchor_triton.kernels.hopper_kernel")
    assert "Gluon is missing" in str(hopper_refusal(x, x, x, "sm_90"))
    monkeypatch.undo()
    assert hopper_refusal(x, x, x, "sm_90") is None


def test_a_compiled_graph_may_ask(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors have no address yet: one that is not aligned is accepted, and copied at the launch."""
    monkeypatch.setenv(hopper.SWITCH, "1")

    @torch.compile(fullgraph=True, backend="eager")
    def accepted(x: torch.Tensor) -> torch.Tensor:
        return x if hopper_enabled(x.shape[-1]) and hopper_refusal(x, x, x, "sm_90") is None else x - x

    x = torch.randn(1, 1, 20, 72).to(BF16)[..., 4:68]
    assert torch.equal(accepted(x), x)
    emulate("loader first, late")
    out, lse = torch.full((1, 1, 20, 64), float("nan"), dtype=BF16), torch.full((1, 1, 20), float("nan"))
    hopper_prefill(x, x, x, None, out, lse, MASKS, FORMS["ungated"], SMALL)
    assert_as_exact_as_eager((out, lse), (x, x, x), {"causal": True})


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hopper.SWITCH, raising=False)
    assert not hopper_enabled(128)
    monkeypatch.setitem(measured.HOPPER, ("sm_90", 64), True)
    assert hopper_enabled(64)
    assert not hopper_enabled(128)
    for setting, enabled in (("1", True), ("0", False)):
        monkeypatch.setenv(hopper.SWITCH, setting)
        assert hopper_enabled(64) is enabled
    monkeypatch.setenv(hopper.SWITCH, "yes")
    with pytest.raises(ValueError, match="VIDEOANCHOR_HOPPER must be 0 or 1, got 'yes'"):
        hopper_enabled(64)


ON_GPU = """
import test_hopper
from dataclasses import replace
from functools import partial
import torch
for form in test_hopper.FORMS:
    for problem in test_hopper.PROBLEMS:
        if problem.bounded or form != "post-exp":
            for factor in (1, 9):
                larger = replace(problem, queries=factor * problem.queries, keys=factor * problem.keys)
                hopper_emulated.check(larger, form, None, torch.device("cuda"))
"""


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_on_a_gpu() -> None:
    """In a process of its own: a wrong barrier would hang the GPU."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", ON_GPU],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
