"""`videoanchor check`: what it says of a sound machine, and of kernels that are wrong, die or hang."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import videoanchor

from videoanchor_triton.app import cli
from videoanchor_triton.app.check import children, report
from videoanchor_triton.app.check.children import Answer, Child, Children
from videoanchor_triton.app.machine import one_device
from videoanchor_triton.integrations.errors import InputError

CHILD = [sys.executable, "-P", "-c"]
STUB = """
import os, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[-2]))
pipe.send(None)
while True:
    task = pipe.recv()
    if task == "hang":
        time.sleep(600)
    if task == "die":
        print("Triton Error [CUDA]: an illegal memory access was encountered", file=sys.stderr)
        os.abort()
    if task == "fail":
        pipe.send({"status": "failed", "reason": "ValueError: no"})
        os._exit(1)
    pipe.send({"status": "right", "pid": os.getpid()})
"""
PLANTED = """
import os, sys, time
sys.path.insert(0, sys.argv[-3])
from videoanchor_triton.app.check import child, tasks
from videoanchor_triton.kernels import ops, ops_cache
prefill, paged = ops.prefill, ops.paged

def wrong(*args, **kwargs):
    prefill(*args, **kwargs)
    args[6].mul_(1.02)

def dies(*args, **kwargs):
    if kwargs.get("block_table") is not None:
        os.write(2, b"Triton Error [CUDA]: an illegal memory access was encountered\\n")
        os.abort()
    if kwargs.get("seqlens_k") is not None:
        time.sleep(600)
    if args[0].shape[2] > 1:
        raise RuntimeError("PassManager::run failed")
    paged(*args, **kwargs)

ops.prefill, ops.paged, ops_cache.paged = wrong, dies, dies
listed = tasks.forms
chosen = ("prefill, no gate", "decode, cache", "decode, pages", "decode, several queries", "decode")
tasks.forms = lambda device: [form for form in listed(device) if form.name in chosen]
child.main()
"""


class Hurried(Child):
    """Waits less for the task that hangs than for those that are only slow on a busy machine."""

    def give(self, task: str, started: bool) -> None:
        super().give(task, started)
        if started:
            self.hurry()

    def answer(self) -> Answer | None:
        said = super().answer()
        self.hurry()
        return said

    def hurry(self) -> None:
        if self.task == "form: decode, cache":
            self.deadline = time.monotonic() + 2


def test_a_sound_machine(tmp_path: Path) -> None:
    done = videoanchor("check", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["right"]
    assert found["verdict"].startswith(f"Right on {found['devices'][0]['device']}")
    assert {"python", "torch", "triton", "transformers", "videoanchor-triton", "cuda", "driver"} <= set(
        found["versions"]
    )
    assert {row["status"] for row in found["forms"]} == {"right"}
    assert [row["name"] for row in found["times"]] == ["prefill", "decode"]
    assert all(value > 0 for row in found["times"] for value in row["milliseconds"].values())
    assert found["scores"]["certified"]
    assert found["scores"]["subspaces_found"]
    for stage in ("the device", "attention", "times", "scores"):
        assert stage in done.stderr
    text = "\n".join(report.lines(found))
    assert found["verdict"] in text
    assert "648 tokens" in text


def test_planted_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named with what happened and what to use instead, and costs the others nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(children, "Child", Hurried)
    monkeypatch.setattr(children, "COMMAND", [*CHILD, PLANTED, str(Path(__file__).parents[1])])
    assert cli.main(["check", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()

    def line(name: str) -> str:
        return next(line for line in lines if line.startswith(f"  {name} "))

    assert "wrong" in line("prefill, no gate")
    assert "allowed" in line("prefill, no gate")
    assert "illegal memory access" in line("decode, pages")
    assert "SIGABRT" in line("decode, pages")
    assert "hung" in line("decode, cache")
    assert "not compiled" in line("decode, several queries")
    assert " right " in line("decode")
    for name in ("prefill, no gate", "decode, pages", "decode, cache", "decode, several queries"):
        assert "use backend='sdpa' instead" in line(name)
        assert name in lines[-1]
    assert any(line.startswith("  prefill   gated sdpa") for line in lines)
    assert any(line.startswith("scores of 648 tokens: ") and "certified" in line for line in lines)
    assert lines[-1].startswith("NOT right on cpu")


def test_tasks_that_fail_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "COMMAND", [*CHILD, STUB])
    monkeypatch.setattr(children, "TASK_SECONDS", 5.0)
    with Children("cpu") as pool:
        found = dict(pool.answers(["hang", "one", "die", "two", "fail", "three"], jobs=2))
        assert {name for name, answer in found.items() if "pid" in answer} == {"one", "two", "three"}
        assert "hung" in found["hang"]["reason"]
        assert "SIGABRT" in found["die"]["reason"]
        assert "illegal memory access" in found["die"]["reason"]
        assert found["fail"] == {"status": "failed", "reason": "ValueError: no"}
        assert dict(pool.answers(["again"]))["again"]["pid"] in {found[name]["pid"] for name in ("one", "two", "three")}
        processes = [child.process for child in pool._idle]
    assert processes
    assert all(process.returncode is not None for process in processes)


def test_no_task_begins_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "TOTAL_SECONDS", -1.0)
    with Children("cpu") as pool:
        assert [answer["reason"][:7] for _, answer in pool.answers(["one", "two"])] == ["not run", "not run"]


def test_no_such_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = videoanchor("check", "--device", "nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert "videoanchor check: device nonsense: expected auto, cpu, cuda or cuda:N\n" in done.stderr
    with pytest.raises(InputError, match="device mps: expected auto, cpu, cuda or cuda:N"):
        one_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert one_device("cuda:1") == torch.device("cuda", 1)
    assert one_device("auto") == one_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(InputError, match="device cuda:2: 2 CUDA devices are visible, numbered from 0"):
        one_device("cuda:2")


def test_a_device_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(children, "COMMAND", [*CHILD, "raise SystemExit('no driver')"])
    assert cli.main(["check"]) == 1
    error = capsys.readouterr().err
    assert "videoanchor check: the device cannot be used: the process died: exit code 1, no driver" in error


def test_a_kernel_that_is_off_does_not_count() -> None:
    def row(name: str, status: str) -> dict[str, Any]:
        return {"name": name, "status": status, "what": "out", "error": 1.0, "allowed": 0.5}

    times = {**row("prefill", "wrong"), "shape": "small", "milliseconds": {"ungated sdpa": 1.0}}
    found: dict[str, Any] = {
        "devices": [{"device": "cuda:0", "name": "a card"}],
        "kernels": "compiled",
        "forms": [row("prefill", "right"), row("hopper, no gate", "wrong")],
        "times": [],
        "scores": {"name": "scores", "status": "right", "reason": "not run"},
        "unused": ["hopper, no gate"],
    }
    assert report.verdict(found) == "Right on cuda:0 (a card), all 2 checks: attention runs by the Triton kernels"
    assert "this kernel is off" in "\n".join(report.lines(found))
    assert report.failures({**found, "unused": []})
    assert "wrong and not timed: out off by" in "\n".join(report.lines({**found, "times": [times]}))
