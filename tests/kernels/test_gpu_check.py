"""The GPU check itself: at tiny sizes in the interpreter, and its parts that need no kernel."""

import csv
import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

ROOT = Path(__file__).parents[2]
gpu_check: Any = importlib.import_module("benchmarks.gpu_check")
record: Any = importlib.import_module("benchmarks.helpers.record")
worker: Any = importlib.import_module("benchmarks.helpers.worker")
contenders: Any = importlib.import_module("benchmarks.attention.helpers.contenders")
measure: Any = importlib.import_module("benchmarks.helpers.measure")
checks: Any = importlib.import_module("benchmarks.attention.helpers.checks")
findings: Any = importlib.import_module("benchmarks.attention.helpers.findings")
mixed: Any = importlib.import_module("benchmarks.attention.helpers.mixed")
sanity_paged: Any = importlib.import_module("videoanchor_triton.kernels.sanity_paged")

GPU = torch.device("cuda")
ROW = record.Row("prefill", "a case", "ours, gated")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def written(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "gpu_check.json").read_text())["rows"]


@pytest.mark.timeout(1200)  # every check of the command, in the interpreter
def test_runs_without_a_gpu(tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu"]) == 0, (tmp_path / "gpu_check.csv").read_text()
    content, rows = json.loads((tmp_path / "gpu_check.json").read_text()), written(tmp_path)
    assert {row["section"] for row in rows} == set(gpu_check.SECTIONS)
    ours = [row for row in rows if record.Row(**row).ours]
    absent = re.compile("hopper|two cards|by position|vLLM")
    assert all(row["status"] == "ok" for row in ours if not absent.search(row["case"] + row["contender"]))
    assert all(row["reason"] for row in rows if row["status"] != "ok")
    counted = [row for row in rows if row["unit"] == "operators an iteration"]  # not a time: counted without a GPU too
    assert [row["rate"] > 0 for row in counted] == [True]
    assert all(row["ms"] is None and (row["rate"] is None or row in counted) for row in rows)
    assert not (ROOT / ".git").exists() or re.fullmatch("[0-9a-f]{7,40}", content["commit"])
    assert content["dirty"] in ("true", "false", "unknown")
    with (tmp_path / "gpu_check.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert table[0]["device"] == content["device"]
    assert "Nothing was timed." in (tmp_path / "summary.md").read_text()


def test_a_wrong_result_is_a_row_without_a_time_and_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "wrong_worker.py"
    script.write_text(
        "import sys\nfrom benchmarks.attention.helpers import contenders\nfrom benchmarks.helpers import worker\n"
        "right = contenders.va.anchored_attention\n"
        "contenders.va.anchored_attention = lambda *a, **b: right(*a, **b) * (1.05 if 'gamma_v' in b else 1)\n"
        "contenders.CONTENDERS = {'prefill': contenders.CONTENDERS['prefill'][:3]}\n"
        "sys.exit(worker.main())\n"
    )
    monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, str(script)])
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu", "--sections", "prefill"]) == 1
    rows = [row for row in written(tmp_path) if not row["contender"].startswith("candidate")]
    assert [row["status"] for row in rows] == 2 * ["wrong", "wrong", "ok"]
    assert all(row["ms"] is None and row["error"] > row["allowed"] for row in rows if row["status"] == "wrong")


def test_every_check_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("anchored_attention", "anchored_attention_varlen", "anchored_attention_decode", "merge_attention"):
        right = getattr(checks.va, name)

        def wrong(*given: Any, right: Any = right, **options: Any) -> Any:
            out, lse = right(*given, **options)
            return out * 1.05, lse + 0.05

        monkeypatch.setattr(checks.va, name, wrong)
    right = sanity_paged.anchored_attention_paged
    monkeypatch.setattr(
        sanity_paged, "anchored_attention_paged", lambda *given, **o: [1.05 * x for x in right(*given, **o)]
    )
    tasks = {task.row.case: task for task in checks.correctness(torch.device("cpu"))}
    for case in (
        "prefill, per-batch gate",
        "decode, per-batch gate",
        "varlen, causal",
        "cache, contiguous",
        "cache, page size 16, CUDA graph",
        "paged, mixed batch",
        "paged, int8 per token",
        "merge, two parts",
        "backward, causal",
        "varlen, gradients",
    ):
        assert tasks[case].run(tasks[case].row).status == "wrong", case


def done(row: Any) -> Any:
    return replace(row, status="ok")


def fails(_row: Any) -> Any:
    raise ValueError("the op\nis missing")


def test_the_worker_goes_on_after_a_failure() -> None:
    tasks = [measure.Task(ROW, "a", done), measure.Task(ROW, "b", fails), measure.Task(ROW, "a", done)]
    later = float("inf")
    assert [row.status for row in worker.run(tasks, later, set())] == ["ok", "failed", "ok"]
    assert [row.reason for row in worker.run(tasks, later, set())] == ["", "ValueError: the op", ""]
    assert [row.status for row in worker.run(tasks, later, {"a"})] == ["failed", "failed", "failed"]
    assert not list(worker.run(tasks, 0.0, set()))


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "HIP error: invalid device function",
    ],
    ids=["Triton", "torch", "HIP"],
)
@pytest.mark.parametrize("seen", ["in its task", "afterwards"])
def test_an_error_that_stays_ends_the_process_before_the_next_kernel_is_blamed(
    text: str, seen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = SimpleNamespace(dead=False)

    def kills(row: Any) -> Any:
        context.dead = True
        if seen == "in its task":
            raise RuntimeError(text)
        return done(row)

    def synchronize(_device: int) -> None:
        if context.dead:
            raise RuntimeError(text if seen == "afterwards" else "CUDA error: the context is gone")

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(worker.os, "_exit", ended)
    tasks = [measure.Task(ROW, name, task) for name, task in (("a", done), ("b", kills), ("c", done))]
    rows = worker.run(tasks, float("inf"), set())
    assert next(rows).status == "ok"
    with pytest.raises(SystemExit):
        next(rows)
    assert capsys.readouterr().err == f"RuntimeError: {text.splitlines()[0]}\n"


def test_a_driver_that_nvidia_smi_does_not_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: Any = importlib.import_module("benchmarks.helpers.environment")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for answer, driver in (("", "unknown"), ("580.1\n580.1", "580.1")):
        monkeypatch.setattr(environment, "_output", lambda *_, answer=answer: answer)
        assert environment.environment(GPU, "")["driver"] == driver


def test_a_correctness_check_that_the_budget_cut_off_is_not_a_success() -> None:
    cut = replace(ROW, status="skipped", reason="time budget")
    assert not cut.bad
    assert replace(cut, section="correctness").bad
    assert not replace(cut, section="correctness", reason="the Hopper path needs a GPU of sm_90").bad
    assert replace(ROW, status="wrong").bad
    assert not replace(ROW, status="wrong", contender="SDPA dense mask").bad


def test_the_plan_for_a_gpu_holds_every_case() -> None:
    tasks = worker.tasks(GPU, list(gpu_check.SECTIONS))
    keys = [(task.row.section, task.row.case, task.row.contender) for task in tasks]
    assert len(set(keys)) == len(keys)
    prefill = {
        (row.query_heads, row.kv_heads, row.head_dim, row.causal, row.keys)
        for row in (task.row for task in tasks)
        if row.section == "prefill"
    }
    lengths = (2048, 8192, 32768, 131072)
    assert prefill == {
        (*h, d, c, n) for h in ((28, 4), (32, 8)) for d in (64, 128) for c in (False, True) for n in lengths
    }
    decode = {(row.kv_heads, row.batch, row.keys) for row in (task.row for task in tasks) if row.section == "decode"}
    assert decode == {(h, b, n) for h in (4, 8) for b in (1, 8, 64) for n in lengths[1:]}
    timed = {task.row.case for task in tasks if task.row.section == "mixed"}
    assert timed >= {batch.name for batch in mixed.batches(True).values()}
    assert {row.batch for row in (task.row for task in tasks) if row.case == "a decode of 128k, 63 of 1k"} == {64}
    largest = contenders.Shape(64, 32, 8, 128, 1, 131072, True)
    assert largest.cache_bytes == pytest.approx(34.4e9, rel=0.01)


def test_what_matters_most_comes_first_and_is_checked_just_before_it_is_timed() -> None:
    tasks = worker.with_compilation(worker.tasks(GPU, list(gpu_check.SECTIONS)))
    steps = []
    for task in tasks:
        step = task.row.section
        if step == "correctness":
            step += f" of {worker.GROUPS[worker.place(task)[2]]}"
        elif step in ("mixed", "decode", "scores", "prefill", "backward"):
            step += ("", " of candidates", " of SDPA", " of FlexAttention")[worker.place(task)[0]]
        if not steps or steps[-1] != step:
            steps.append(step)
    first = "ceiling, compile, sanity, model, compile, correctness of mixed, mixed, compile, correctness of decode, "
    first += "decode, scores, compile,"
    assert ", ".join(steps).startswith(
        first + " correctness of prefill, prefill, compile, correctness of backward, backward, serving, compile, "
    )
    theirs = [step for step in steps if "SDPA" in step or "Flex" in step]
    assert steps[-len(theirs) :] == theirs
    assert ["Flex" in step for step in theirs] == sorted("Flex" in step for step in theirs)


def test_work_counts_visible_pairs() -> None:
    def flop(**change: Any) -> float:
        return replace(contenders.Shape(2, 4, 2, 16, 5, 5, True), **change).flop

    assert flop() == 4 * 2 * 4 * 16 * 15
    assert flop(causal=False) == 4 * 2 * 4 * 16 * 25
    assert flop(queries=1) == 4 * 2 * 4 * 16 * 5


@pytest.mark.parametrize("length", [1, 127, 128, 500])
def test_the_block_mask_built_by_hand_is_that_of_torch(length: int) -> None:
    device = torch.device("cpu")
    found = contenders.causal_blocks(length, device)
    exact = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, length, length, device="cpu")
    assert found.seq_lengths == exact.seq_lengths
    assert torch.equal(found.to_dense(), exact.to_dense())
    blocks = found.full_kv_num_blocks.shape[-1]
    for block in range(blocks):
        assert found.kv_indices[0, 0, block, : found.kv_num_blocks[0, 0, block]].tolist() == [block]
        full = found.full_kv_indices[0, 0, block, : found.full_kv_num_blocks[0, 0, block]]
        assert sorted(full.tolist()) == list(range(block))


def test_times_are_quantiles_of_as_many_runs_as_the_first_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    durations: list[float] = []
    clock = SimpleNamespace(now=0.0, runs=0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def run() -> None:
        clock.now += durations[clock.runs]
        clock.runs += 1

    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, device: empty(16 if device == "cuda" else size, dtype=dtype)
    )
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    for first, runs in ((1000.0, measure.LEAST_RUNS), (6.0, 10), (0.001, measure.MOST_RUNS)):
        durations[:] = [first, *(first + 0.001 * i for i in range(1, 100))]
        clock.runs = 0
        row = measure.timed(replace(ROW, status="ok"), run, 2e9, "TFLOP/s", GPU)
        assert clock.runs == runs
        middle = first + 0.001 * (runs - 1) / 2
        assert row.ms == pytest.approx(middle)
        assert row.ms_p20 == pytest.approx(first + 0.001 * (runs - 1) * 0.2)
        assert row.ms_p80 == pytest.approx(first + 0.001 * (runs - 1) * 0.8)
        assert row.rate == pytest.approx(2 / middle)


def test_what_is_not_right_is_not_timed() -> None:
    def run() -> None:
        raise AssertionError("was run")

    for row in (replace(ROW, status="wrong"), replace(ROW, status="failed")):
        assert measure.timed(row, run, 2e9, "TFLOP/s", GPU) is row


def test_headlines_name_the_case_that_is_furthest_from_the_aim() -> None:
    def row(case: str, contender: str, ms: float, **more: Any) -> Any:
        values = {"status": "ok", "query_heads": 28, "kv_heads": 4, "head_dim": 128, "causal": False, "keys": 8192}
        return record.Row("prefill", case, contender, ms=ms, rate=1000 / ms, unit="TFLOP/s", **(values | more))

    rows = [
        row("a", "ours, gated, post-exp", 1.0),
        row("a", "ours, gated, log-bias", 2.0),
        row("a", "ours, ungated", 0.9),
        row("a", "SDPA cuDNN, ungated", 1.5),
        row("b", "ours, hopper, gated", 1.0),
        row("b", "ours, hopper, ungated", 1.0),
        row("b", "SDPA cuDNN, ungated", 0.5),
        row("c", "ours, gated, post-exp", 9.0, keys=2048),
        row("c", "ours, ungated", 1.0, keys=2048),
    ]
    found = {headline.name: headline for headline in record.headlines(rows)}
    cost = found["prefill N >= 8k, gated / ungated time"]
    assert (cost.value, cost.case, cost.met) == (pytest.approx(1 / 0.9), "prefill a", False)
    cudnn = found["prefill N >= 8k, cuDNN ungated time / ours gated"]
    assert (cudnn.value, cudnn.case, cudnn.met) == (0.5, "prefill b", False)
    speed = found["prefill N >= 8k, D=128, not causal, TFLOP/s gated"]
    assert (speed.value, speed.met) == (1000.0, True)
    assert not any("Flex" in name for name in found)
    times = {
        "ours, written": 1.0,
        "ours, ungated": 0.9,
        "ours, fp8 per token, ungated": 0.1,
        "vLLM Triton, ungated": 2.0,
    }
    rows = [replace(row("a batch", name, ms), section="mixed") for name, ms in times.items()]
    found = {headline.name: headline for headline in record.headlines(rows)}
    assert found["mixed batches, gated / ungated time"].value == pytest.approx(1 / 0.9)
    assert found["mixed batches, fastest of theirs ungated / ours gated"].value == pytest.approx(2.0)


def test_the_worst_finding_is_the_one_furthest_over_its_allowance() -> None:
    empty, fine, wrong, unknown = (0.0, 0.0), (0.5, 1.0), (2e-3, 1e-3), (float("nan"), 1.0)
    assert findings.worst([empty, fine]) == fine
    assert findings.worst([fine, wrong, empty]) == wrong
    assert findings.worst([wrong, (1e-9, 0.0), fine]) == (1e-9, 0.0)
    assert findings.worst([fine, unknown]) is unknown
    assert measure.judged(ROW, *unknown).status != record.OK
