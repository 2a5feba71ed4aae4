"""Engines in processes of their own, and how their answers compare with the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import vllm_media
from vllm_media import GATED, Request
from vllm_reference import Reference

HERE = Path(__file__).parent
LOGPROBS = 1e-4  # fp32


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs vLLM, so that it finds the scorers of the tests."""
    path = os.pathsep.join([str(HERE), *filter(None, [more.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")])])
    dropped = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"}  # of the test's own process
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": path, **more}


def run_engine(
    folder: Path,
    checkpoint: Path,
    requests: str = "QWEN",
    gate: dict[str, Any] | None = GATED,
    n: int = 12,
    rounds: int = 1,
    env: dict[str, str] | None = None,
    check: bool = True,
    lora: Path | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """What `engine_program.py` says of an engine with these options; with check=False what it printed if it failed."""
    case: dict[str, Any] = {"requests": ["vllm_media", requests], "gate": gate, "n": n, "rounds": rounds}
    case["lora"] = str(lora) if lora else None
    (folder / "case.json").write_text(json.dumps(case | {"engine": {"model": str(checkpoint), **engine}}))
    command = [sys.executable, str(HERE / "engine_program.py"), str(folder / "case.json"), str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**(env or {})), timeout=500)
    if done.returncode and not check:
        return {"failed": done.stdout + done.stderr}
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "out.json").read_text())


def assert_answers(out: dict[str, Any], reference: Reference, how: str, requests: str = "QWEN") -> None:
    """Each request of each round: the same greedy tokens, and logprobs within `LOGPROBS`."""
    named: dict[str, Request] = getattr(vllm_media, requests)
    n = len(next(iter(out["rounds"][0].values()))["tokens"])
    for name, request in named.items():
        expected = reference.answer(request, out["rounds"][0][name]["prompt"], n, how)
        for one in out["rounds"]:
            got = one[name]
            assert got["prompt"] == out["rounds"][0][name]["prompt"], name
            assert got["tokens"] == expected.tokens, name
            error = max(abs(a - b) for a, b in zip(got["logprobs"], expected.logprobs, strict=True))
            assert error < LOGPROBS, (name, error)
