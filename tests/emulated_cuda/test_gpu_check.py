"""benchmarks/gpu_check.py from start to end on the emulated card, with planted faults, and its step of compilation."""

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emulated_cuda.emulated_worker import FAULTS, HANG_SECONDS

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
gpu_check: Any = importlib.import_module("benchmarks.gpu_check")
record: Any = importlib.import_module("benchmarks.helpers.record")


@pytest.mark.timeout(600)
def test_a_run_names_each_fault_and_loses_no_other_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, str(HERE / "emulated_worker.py")])
    write, writes = Path.write_text, []

    def full_for_a_while(path: Path, text: str, **options: Any) -> int:
        writes.append(path)
        if 20 < len(writes) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full_for_a_while)
    assert gpu_check.main(["--out", str(tmp_path), "--small", "--minutes", "60"]) == 1
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["device"] == "Emulated CUDA device"
    assert content["sizes"] == "small"
    rows = {row.key: row for row in (record.Row(**row) for row in content["rows"])}
    assert len(rows) == len(content["rows"]), "no worker runs again what another did"
    dies, wrong, hangs, crashes = (rows.pop(key) for key in FAULTS)
    assert (dies.status, wrong.status, hangs.status, crashes.status) == ("failed", "wrong", "failed", "failed")
    assert "Triton Error [CUDA]: an illegal memory access" in dies.reason
    assert wrong.ms is None
    assert hangs.reason == f"no answer within {HANG_SECONDS:g} s"
    assert "status -6" in crashes.reason
    assert {row.section for row in rows.values()} == set(gpu_check.SECTIONS)
    struck = {row.key: row.reason for row in rows.values() if row.status not in ("ok", "skipped")}
    # the two kernels that took a process with them, in their other tasks
    assert struck == {key: reason for key, reason in struck.items() if reason.startswith("not run: ")}
    assert {reason.split(": ")[1].split(" hung")[0] for reason in struck.values()} == {"ours, ungated", "backward"}
    assert all(row.reason and row.reason != record.TIME_BUDGET for row in rows.values() if row.status == "skipped")
    summary = (tmp_path / "summary.md").read_text()
    assert all(", ".join(key) in summary for key in FAULTS)


def program(what: str, *fault: str, cache: Path) -> dict[str, Any]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "tests", ROOT / "tests" / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compiling_program.py"), what, *fault]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KERNELS = {"plan_kernel": 1, "paged_kernel": 1, "merge_kernel": 1, "prescale_kernel": 1, "prefill_kernel": 1}


def test_what_was_compiled_ahead_is_found_by_the_launches_of_another_process(tmp_path: Path) -> None:
    ahead = program("compile", cache=tmp_path)
    assert ahead["compiled"] == KERNELS
    assert ahead["launched"] == 0
    assert [(row["case"], row["status"], row["reason"]) for row in ahead["rows"]] == [
        ("decode", "ok", f"3 kernels, {os.cpu_count()} at a time"),
        ("prefill", "ok", f"2 kernels, {os.cpu_count()} at a time"),
    ]
    assert {"alive": "compiled 3 of 3 kernels", "seconds": 300.0} in ahead["said"]
    later = program("launch", cache=tmp_path)
    assert (later["compiled"], later["found"]) == ({}, KERNELS)
    assert later["launched"] > 0


def test_a_compilation_that_fails_is_a_row_and_the_others_are_done(tmp_path: Path) -> None:
    ahead = program("compile", "fault", cache=tmp_path)
    assert ahead["compiled"] == {name: 1 for name in KERNELS if name != "paged_kernel"}
    assert [row["status"] for row in ahead["rows"]] == ["failed", "ok"]
    reason = ahead["rows"][0]["reason"]
    assert reason.endswith("did not compile: paged_kernel: RuntimeError: PTX is not what it takes")
