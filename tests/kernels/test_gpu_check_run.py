"""benchmarks/gpu_check.py and its worker process: what hangs, crashes or is interrupted, and how a run goes on."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
gpu_check: Any = importlib.import_module("benchmarks.gpu_check")
record: Any = importlib.import_module("benchmarks.helpers.record")
watch: Any = importlib.import_module("benchmarks.helpers.watch")

ROW = record.Row("prefill", "a case", "ours, gated")


def written(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "gpu_check.json").read_text())["rows"]


def fake_worker(folder: Path, body: str, **environment: str) -> list[str]:
    """A worker of three tasks that needs no torch: `body` decides what happens to task i."""
    script = folder / "fake_worker.py"
    plan = [asdict(replace(ROW, case=str(i))) for i in range(3)]
    script.write_text(
        "import json, os, sys, time\n"
        "order = json.load(sys.stdin)\n"
        "died = [key[1] for key in order['died']]\n"
        f"plan = [row for row in {plan!r} if [row['section'], row['case'], row['contender']] not in order['done']]\n"
        "say = lambda message: print(json.dumps(message), flush=True)\n"
        "done = lambda row, **found: say({'row': row | {'status': 'ok'} | found})\n"
        f"say({{'environment': {{'device': 'none'}} | {environment!r}, 'plan': plan}})\n"
        "for row in plan:\n    i = int(row['case'])\n" + "".join(f"    {line}\n" for line in body.splitlines())
    )
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("if i == 1: time.sleep(1000)", "no answer within 3 s"),
        ("if i == 1: os._exit(7)\nprint('of task', i, file=sys.stderr)", "status 7: of task 0"),
        ("if i == 1: sys.exit('CUDA error: illegal access')", "status 1: CUDA error: illegal access"),
    ],
    ids=["hangs", "crashes", "poisoned"],
)
def test_a_task_that_hangs_or_crashes_is_a_row_and_the_next_ones_run(
    body: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body += "\ndone(row, reason=','.join(died))"
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, body))
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 3.0)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    rows = written(tmp_path)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert reason in rows[1]["reason"]
    assert record.Row(**rows[1]).died
    assert rows[2]["reason"] == "1", "the next worker is told"


def test_a_crash_is_not_given_the_last_words_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "if i == 0: sys.exit('CUDA error: of the first')\nif i == 1: os._exit(7)\ndone(row)"
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, body))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    ends = [row["reason"].removeprefix("the process ended with status ") for row in written(tmp_path)]
    assert ends == ["1: CUDA error: of the first", "7: no message", ""]


def test_a_long_task_that_says_it_is_alive_is_not_taken_for_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = (
        "if i == 1:\n"
        "    for n in range(6):\n"
        "        say({'alive': f'part {n}', 'seconds': None}); time.sleep(0.5)\n"
        "    say({'alive': 'one more', 'seconds': 1000}); time.sleep(3)\n"
        "done(row)"
    )
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, body))
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 2.5)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert "... part 5\n" in capsys.readouterr().out


@pytest.mark.parametrize("late", ["time.sleep(1000)", "break"], ids=["while a task runs", "between tasks"])
def test_what_the_time_budget_leaves_out_is_written(late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, f"if i == 1: {late}\ndone(row)"))
    # the budget is over once the first row is written
    over = tmp_path / "summary.md"
    clock = SimpleNamespace(time=lambda: 1e6 * over.exists())
    monkeypatch.setattr(gpu_check, "time", clock)
    monkeypatch.setattr(watch, "time", clock)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    found = [(row["case"], row["reason"]) for row in written(tmp_path)]
    assert found == [("0", ""), ("1", "time budget"), ("2", "time budget")]
    monkeypatch.setattr(gpu_check, "time", time)
    monkeypatch.setattr(watch, "time", time)
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "done(row, reason='later')"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert [row["reason"] for row in written(tmp_path)] == ["", "later", "later"]


def test_a_second_call_goes_on_and_tries_no_crash_again_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "if i == 1: os._exit(7)\ndone(row, ms=1.0)"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    before = written(tmp_path)
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "done(row, ms=2.0)"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert written(tmp_path) == before
    assert "3 rows of an earlier call stand" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(tmp_path), "--retry"]) == 0
    assert [(row["case"], row["ms"]) for row in written(tmp_path)] == [("0", 1.0), ("2", 1.0), ("1", 2.0)]


def test_results_of_another_commit_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "done(row)", commit="a"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "done(row, reason='new')", commit="b"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "results of another run (commit a there, b here): give another --out or --anew" in capsys.readouterr().err
    assert not any(row["reason"] for row in written(tmp_path))
    assert gpu_check.main(["--out", str(tmp_path), "--anew"]) == 0
    assert all(row["reason"] == "new" for row in written(tmp_path))
    (tmp_path / "gpu_check.json").write_text("{}")
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "gpu_check.json is not what this version writes" in capsys.readouterr().err


def test_a_worker_that_cannot_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, "-c", "raise SystemExit('no GPU is visible')"])
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no GPU is visible" in said
    assert not (tmp_path / "gpu_check.json").exists()


def test_a_full_disk_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "done(row)"))
    write = Path.write_text
    full = [False, True, True]

    def limited(path: Path, text: str, **options: Any) -> int:
        if path.name == "gpu_check.json.new" and full and full.pop(0):
            write(path, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", limited)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0, "there was room again at the end"
    assert [row["case"] for row in written(tmp_path)] == ["0", "1", "2"]
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, "done(row)"))
    full += [False, True, True, True]
    assert gpu_check.main(["--out", str(tmp_path), "--anew"]) == 2
    assert [row["case"] for row in written(tmp_path)] == ["0"], "what was on disk stays"
    assert not list(tmp_path.glob("*.new"))
    said = capsys.readouterr()
    assert said.out.count("prefill     2 | ours") == 2
    assert "error: not all rows above are in" in said.err


def test_a_killed_run_leaves_its_rows_and_no_worker(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nif i == 1: time.sleep(1000)\ndone(row)"
    # the worker's own way to end with its parent
    body = f"sys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks.helpers.channel import end_with_parent\n" + (
        f"end_with_parent()\n{body}"
    )
    command = fake_worker(tmp_path, body)
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks import gpu_check\n"
        f"gpu_check.WORKER = {command!r}\nsys.exit(gpu_check.main(['--out', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    results = tmp_path / "gpu_check.json"
    while not results.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [row["case"] for row in written(tmp_path)] == ["0"]
    worker = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 60
    while running(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(worker)


def running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "gpu_check.json"
    body = (
        "if i == 2:\n"
        f"    while not os.path.exists({str(results)!r}) or '\"ok\"' not in open({str(results)!r}).read(): pass\n"
        f"    os.kill({os.getpid()}, 2)\n"
        "    time.sleep(1000)\n"
        "done(row)"
    )
    monkeypatch.setattr(gpu_check, "WORKER", fake_worker(tmp_path, body))
    # a process that a shell started in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu_check.main(["--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [row["case"] for row in written(tmp_path)][:1] == ["0"]
