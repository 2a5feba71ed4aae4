"""Serving in gpu_check.py: an engine of vLLM with the plug-in, in a process of its own, eager and with CUDA graphs."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention.helpers.engines import absence
from benchmarks.helpers.channel import alive
from benchmarks.helpers.measure import Task, judged
from benchmarks.helpers.record import FAILED, OK, SKIPPED, Row

PROGRAM = Path(__file__).with_name("engine.py")
ENGINE_SECONDS = 280.0
TURNS = ("gated", "strengths of 0", "no gates")


def serving_tasks(device: torch.device) -> Iterator[Task]:
    """The check of an engine, eager and with graphs, then how many tokens a second it answers in each turn."""
    runs: dict[str, dict[str, Any]] = {}
    kinds = ("eager", "graphs") if device.type == "cuda" else ("eager",)
    for kind in kinds:
        row = Row("serving", "vLLM, tiny Qwen2.5-VL", f"ours, {kind}")
        yield Task(row, f"serving, {kind}", _check(kind, device, runs))
    for turn in TURNS:
        row = Row("serving", "vLLM, tiny Qwen2.5-VL", f"ours, tokens, {turn}")
        yield Task(row, "serving, eager", _rate(turn, device, runs))


def _engine(kind: str, device: torch.device, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if kind not in runs:
        alive(f"an engine of vLLM, {kind}", ENGINE_SECONDS + 10)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(PROGRAM), "--out", folder, "--device", device.type]
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            done = subprocess.run(
                [*command, *(["--graphs"] if kind == "graphs" else [])],
                env=environment,
                capture_output=True,
                text=True,
                timeout=ENGINE_SECONDS,
            )
            path = Path(folder, "engine.json")
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            runs[kind] = json.loads(path.read_text()) if path.exists() else {"failed": f"the engine ended: {said}"}
    return runs[kind]


def _check(kind: str, device: torch.device, runs: dict[str, dict[str, Any]]) -> Callable[[Row], Row]:
    """Logprobs against those of `va.enable`; other tokens are an infinite error."""

    def run(row: Row) -> Row:
        if reason := absence("vllm"):
            return replace(row, status=SKIPPED, reason=reason)
        result = _engine(kind, device, runs)
        if "failed" in result:
            return replace(row, status=FAILED, reason=result["failed"])
        same = result["equal"] == result["compared"]
        return judged(row, result["error"] if same else float("inf"), result["allowed"])

    return run


def _rate(turn: str, device: torch.device, runs: dict[str, dict[str, Any]]) -> Callable[[Row], Row]:
    def run(row: Row) -> Row:
        checked = _check("eager", device, runs)(row)
        if checked.status != OK or device.type != "cuda":
            return replace(checked, error=None, allowed=None)
        rate = runs["eager"]["tokens per second"][turn]
        return replace(row, status=OK, rate=rate, unit="tokens a second")

    return run
