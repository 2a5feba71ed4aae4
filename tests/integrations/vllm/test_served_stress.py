"""A thousand requests of mixed lengths, aborts and preemptions in a cache that is too small for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_media import QWEN
from vllm_reference import Reference
from vllm_runs import HERE, environment

pytestmark = pytest.mark.timeout(900)


def test_a_thousand_requests(qwen: Path, tmp_path: Path) -> None:
    """Each answer begins as that of the dense gate; no block is lost; memory does not grow."""
    command = [sys.executable, str(HERE / "stress_program.py"), str(qwen), "1000", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads((tmp_path / "out.json").read_text())
    reference = Reference(qwen)
    for name, request in QWEN.items():
        expected = reference.answer(request, out["prompts"][name], 24, "dense").tokens
        assert out["answered"][name]
        assert all(tokens == expected[: len(tokens)] for tokens in out["answered"][name]), name
    assert out["wrong_length"] == 0
    assert out["given_up"] > 40
    assert out["metrics"]["vllm:num_preemptions"] > 20
    free, left = out["blocks"]
    assert free == left
    assert out["scored"]["unscored"] == 0
    early, late = out["memory"][len(out["memory"]) // 4], out["memory"][-1]
    assert late - early < 64 << 20, out["memory"]
