"""Faults planted in the Hopper kernel: each must be found by the emulator or by the fp64 specification."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from gluon_emulator import FaultError
from hopper_emulated import BASE, SCHEDULES, check, emulated

from videoanchor_triton.kernels import hopper_kernel

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
        "add_columns(b_sum, b_p, b_gate, GATE)",
        "add_columns(b_sum, b_p, b_gate, 0)",
        replace(HUNT, gate="per-batch"),
    ),
    "no gate in the scores": ("b_s * scale_log2 + b_gate", "b_s * scale_log2", HUNT),
    "gate of the first head": ("i_h // groups.gate", "0", PER_HEAD),
    "values of the wrong head": ("i_h // groups.v", "i_h // groups.k", replace(PER_HEAD, gate="per-query-head")),
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
def test_the_emulator_finds(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
            emulated(monkeypatch, schedule, faulty.hopper_kernel)
            for form in ("post-exp", "log-bias") if problem.bounded else ("log-bias",):
                check(problem, form)

    with pytest.raises((FaultError, AssertionError)):
        run_all()
