"""The Hopper kernel: emulated against the fp64 specification, compiled for sm_90, and run on a Hopper GPU if any."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gluon_emulator import Emulator, FaultError
from oracle import Problem, assert_as_exact_as_eager

from videoanchor_triton.kernels import hopper, hopper_kernel, measured
from videoanchor_triton.kernels.gates import expand_gate, pad_gate
from videoanchor_triton.kernels.hopper import hopper_enabled, hopper_prefill, hopper_refusal
from videoanchor_triton.kernels.operands import Masks
from videoanchor_triton.kernels.tiles import Tile

FORMS = {"ungated": 0, "log-bias": 1, "post-exp": 2}
# the order in which partitions go on (two warpgroups and the loader), and which copies land first if they are late
SCHEDULES: dict[str, tuple[tuple[int, int, int], str | None]] = {
    "loader first, at once": ((2, 1, 0), None),
    "loader first, late": ((2, 0, 1), "newest"),
    "loader last, late": ((0, 1, 2), "oldest"),
}
SMALL = Tile(32, 16, 4, 2)
BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
MASKS = Masks(0.125, True, None, None)
BASE = Problem("causal", batch=1, query_heads=2, kv_heads=1, head_dim=64, dtype=BF16)
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


def gate_of(gamma_k: torch.Tensor, problem: Problem, form: str) -> torch.Tensor:
    """gamma_k as the launcher gets it: (B, heads, more than Nk) with NaN beyond the keys."""
    heads = problem.kv_heads if problem.gate == "per-head" else 1
    gate = expand_gate(pad_gate(gamma_k, problem.keys), problem.batch, heads)
    gate = gate.log2() if form == "log-bias" else gate
    return pad_gate(gate, -(-(problem.keys + 5) // 16) * 16, float("nan"))


def check(problem: Problem, form: str, tile: Tile | None = SMALL, device: torch.device = CPU) -> None:
    """Raise unless the kernel is as exact as the same-precision eager form."""
    (q, k, v), options = replace(problem, gate="none" if form == "ungated" else problem.gate).make(device)
    options.pop("gamma_q", None)
    values, gate = v, None
    if form != "ungated":
        gate = gate_of(options["gamma_k"], problem, form)
        weight = options["gamma_v"] * options["gamma_k"] if form == "post-exp" else options["gamma_v"]
        weight = expand_gate(pad_gate(weight, problem.keys), problem.batch, problem.kv_heads)
        values = (v.float() * weight[..., None]).to(v.dtype)
    out = torch.full_like(q.transpose(1, 2).contiguous(), float("nan")).transpose(1, 2)
    lse = torch.full(q.shape[:3], float("nan"), device=device)
    assert hopper_refusal(q, k, values, "sm_90") is None
    masks = Masks(q.shape[-1] ** -0.5, problem.causal, None, None)
    hopper_prefill(q, k, values, gate, out, lse, masks, FORMS[form], tile)
    assert_as_exact_as_eager((out, lse), (q, k, v), options)


def check_turns(starts: list[int]) -> None:
    """Raise unless the warpgroups started their products by turns: `starts` names the warpgroup of each product.

    One product in the first visit, two in each other one, and last of all the values of the last tile, out of turn.
    """
    visits = len(starts) // 4
    in_turn = [w for i, w in enumerate(starts) if w in starts[i + 1 :]]
    if in_turn != [0, 1] + [0, 0, 1, 1] * (visits - 1):
        raise FaultError(f"the warpgroups did not take turns: {starts}")


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """emulate(schedule) lets the launcher run the emulated kernel; `kernel` replaces the product's."""

    def replace_kernel(schedule: str, kernel: Any = hopper_kernel.hopper_kernel) -> None:
        monkeypatch.setattr(hopper_kernel, "hopper_kernel", Emulator(kernel, *SCHEDULES[schedule], check_turns))

    return replace_kernel


@pytest.mark.parametrize(("problem", "form", "schedule"), RUNS)
def test_as_exact_as_eager(problem: Problem, form: str, schedule: str, emulate: Any) -> None:
    emulate(schedule)
    check(problem, form)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_stages(stages: int, schedule: str, emulate: Any) -> None:
    emulate(schedule)
    check(replace(BASE, keys=120), "post-exp", SMALL._replace(stages=stages))


# each fault of the kernel's source, and the gate form and the problem that show it
HUNT = replace(BASE, name="hunt", query_heads=1, queries=33, keys=100, gate="zero")
DEAD = replace(BASE, name="dead", queries=70, keys=20)
PER_HEAD = replace(BASE, name="per-head", query_heads=4, kv_heads=2, gate="per-head")
ALL_ZERO = replace(BASE, name="all-zero", gate="all-zero", causal=False)
WAIT = "    mbarrier.wait(ring.ready.index(i % STAGES), (i // STAGES) & 1)\n"
FREE = "    mbarrier.arrive(ring.empty.index(i % STAGES), count=1)\n"
WAIT_K = "        await_tile(shared.k, i)\n"
WAIT_V = "        await_tile(shared.v, i - 1)\n"
FREE_K = "    free_tile(shared.k, i)\n"
FREE_V = "        free_tile(shared.v, i - 1)\n"
AWAIT_TURN = "        await_turn(shared.turns, i, GROUP)\n"
PASS_TURN = "        pass_turn(shared.turns, GROUP)\n"
START = """\
        b_s = start_scores(q_tile, shared.k.tiles, i)
        b_p, b_acc = start_values(b_pairs, shared.v.tiles, b_acc, i - 1)
"""
FIRST = "    b_s = start_scores(q_tile, shared.k.tiles, 0)\n"
VISITS = "span.n_masked, span.n_tiles, o_position"
TURN = "mbarrier.wait(turns.index(GROUP), (i & 1) ^ (1 - GROUP))"
READ_GATE = """\
    if GATE != 0:
        # [1, BN]
        b_gate = shared.gates.index(i % STAGES).reshape([1, BN]).load(layout)
        # orders this read before the copy that overwrites the gate
        fence_async_shared()
    # the scores and the gate are in registers
"""
FINISH_V = "        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])\n"
FAULTS = {
    "no wait for q": ("    mbarrier.wait(shared.q_ready, 0)\n", "", HUNT),
    "no wait for k": (WAIT_K, "", HUNT),
    "no wait for the first k": ("    await_tile(shared.k, 0)\n", "", HUNT),
    "no wait for v": (WAIT_V, "", HUNT),
    "no wait for the last v": ("    await_tile(shared.v, span.n_tiles - 1)\n", "", HUNT),
    "no wait for an empty k": ("        mbarrier.wait(shared.k.empty.index(stage), drained)\n", "", HUNT),
    "no wait for an empty v": ("        mbarrier.wait(shared.v.empty.index(stage), drained)\n", "", HUNT),
    "no arrival for k": (FREE_K, "", HUNT),
    "no arrival for v": (FREE_V, "", HUNT),
    "early arrival for k": (READ_GATE + FREE_K, FREE_K + READ_GATE, HUNT),
    "early arrival for v": (FINISH_V, FREE_V + FINISH_V, HUNT),
    "phase of a tile": (WAIT, WAIT.replace("& 1)", "& 1 ^ 1)"), HUNT),
    "phase of empty": ("(i // STAGES) & 1 ^ 1", "(i // STAGES) & 1", HUNT),
    "phase never changes": (WAIT, WAIT.replace("(i // STAGES) & 1", "0"), HUNT),
    "no wait for the turn": (AWAIT_TURN, "", HUNT),
    "no wait for the first turn": ("    await_turn(shared.turns, 0, GROUP)\n", "", HUNT),
    "turn not passed": (PASS_TURN, "", HUNT),
    "first turn not passed": (FIRST + PASS_TURN[4:], FIRST, HUNT),
    "last turn not passed": (PASS_TURN, "        if i < span.n_tiles - 1:\n    " + PASS_TURN, HUNT),
    "turn passed before the products": (START + PASS_TURN, PASS_TURN + START, HUNT),
    "turn passed between the products": (START + PASS_TURN, PASS_TURN.join(START.splitlines(keepends=True)), HUNT),
    "turn passed to itself": ("turns.index(1 - GROUP), count", "turns.index(GROUP), count", HUNT),
    "phase of a turn": (TURN, TURN.replace("i & 1", "(i + 1) & 1"), HUNT),
    "phase of a turn never changes": (TURN, TURN.replace("i & 1", "0"), HUNT),
    "both warpgroups begin": (TURN, TURN.replace("1 - GROUP", "1"), HUNT),
    "neither warpgroup begins": (TURN, TURN.replace("1 - GROUP", "0"), HUNT),
    "a turn takes two arrivals": ("turns = make_barriers(2, 1)", "turns = make_barriers(2, 2)", HUNT),
    "a visit less for warpgroup 0": (VISITS, VISITS.replace("n_tiles", "n_tiles - 1 + GROUP"), HUNT),
    "a visit less for warpgroup 1": (VISITS, VISITS.replace("n_tiles", "n_tiles - GROUP"), HUNT),
    "one warpgroup empties": ("make_barriers(STAGES, 2)", "make_barriers(STAGES, 1)", HUNT),
    "bytes of the gate": ("k.block_type.nbytes + gate.block_type.nbytes", "k.block_type.nbytes", HUNT),
    "bytes of q": ("2 * q.block_type.nbytes", "q.block_type.nbytes", HUNT),
    "stage of k": ("k_tile = k_tiles.index(i % STAGES)", "k_tile = k_tiles.index(0)", HUNT),
    "stage of v": (
        "b_p, warpgroup_mma(b_p, v_tiles.index(i %",
        "b_p, warpgroup_mma(b_p, v_tiles.index((i + 1) %",
        HUNT,
    ),
    "stage of the gate": ("shared.gates.index(i % STAGES).r", "shared.gates.index((i + 1) % STAGES).r", HUNT),
    "stage of the arrival": (FREE, FREE.replace("i % STAGES", "0"), HUNT),
    "values of the wrong tile": ("shared.v.tiles, b_acc, i - 1)", "shared.v.tiles, b_acc, i)", HUNT),
    "scores not awaited": ("warpgroup_mma_wait(1, deps=[b_s])", "warpgroup_mma_wait(2, deps=[b_s])", HUNT),
    "values not awaited": (FINISH_V, FINISH_V.replace("wait(0", "wait(1"), HUNT),
    "half of q": ("span.i_first + shared.q.shape[3], 0]", "span.i_first, 0]", HUNT),
    "no mask of the tail": ("(o_n < span.Nk)[None, :]", "(o_n >= 0)[None, :]", replace(HUNT, causal=False)),
    "no causal mask": ("        if CAUSAL:\n            m_pairs", "        if False:\n            m_pairs", HUNT),
    "causal mask off by one": ("<= o_position[:, None]", "< o_position[:, None]", HUNT),
    "too few masked tiles": (
        "i_edge = gl.minimum(Nk, gl.maximum(position + 1",
        "i_edge = gl.minimum(Nk, gl.maximum(position + 17",
        HUNT,
    ),
    "too few tiles": (
        "i_end = gl.minimum(Nk, gl.maximum(position + BM",
        "i_end = gl.minimum(Nk, gl.maximum(position + BM // 2",
        HUNT,
    ),
    "no tile where no row sees a key": ("gl.maximum(gl.cdiv(i_end, BN), 1)", "gl.cdiv(i_end, BN)", DEAD),
    "top-left alignment": ("o_position = o_m + (span.Nk - span.Nq)", "o_position = o_m", HUNT),
    "no gate in the sum": (
        "(b_p * gl.convert_layout(b_gate, accumulator_layout(8)) if GATE == 2 else b_p)",
        "b_p",
        replace(HUNT, gate="per-batch"),
    ),
    "no gate in the scores": ("b_s * scale_log2 + b_gate", "b_s * scale_log2", HUNT),
    "gate of the first head": ("i_h // groups.gate", "0", PER_HEAD),
    "keys of the wrong head": ("i_h // groups.k", "i_h % 2", PER_HEAD),
    "accumulator not rescaled": (
        "        b_acc = b_acc * gl.convert_layout(b_decay",
        "        _ = b_acc * gl.convert_layout(b_decay",
        HUNT,
    ),
    "sum not rescaled": ("b_sum = b_sum * gl.convert_layout(b_decay", "_ = b_sum * gl.convert_layout(b_decay", HUNT),
    "a maximum of -inf": ("gl.full([ROWS], LOWEST,", 'gl.full([ROWS], float("-inf"),', ALL_ZERO),
    "division by 0": ("gl.where(b_sum == 0.0, 1.0, b_sum)", "b_sum", DEAD),
    "rows beyond the queries": ("mask=(o_row < span.Nq)[:, None]", "mask=(o_row >= 0)[:, None]", HUNT),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds(fault: str, emulate: Any, tmp_path: Path) -> None:
    old, new, problem = FAULTS[fault]
    source = Path(hopper_kernel.__file__).read_text()
    assert source.count(old) == 1, "the kernel has changed: adapt the fault"
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{hopper_kernel.__package__}.faulty", path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)

    def run_all() -> None:
        for schedule in SCHEDULES:
            emulate(schedule, faulty.hopper_kernel)
            for form in ("post-exp", "log-bias") if problem.bounded else ("log-bias",):
                check(problem, form)

    with pytest.raises((FaultError, AssertionError)):
        run_all()


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
import torch
for form in test_hopper.FORMS:
    for problem in test_hopper.PROBLEMS:
        if problem.bounded or form != "post-exp":
            for factor in (1, 9):
                larger = replace(problem, queries=factor * problem.queries, keys=factor * problem.keys)
                test_hopper.check(larger, form, None, torch.device("cuda"))
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
