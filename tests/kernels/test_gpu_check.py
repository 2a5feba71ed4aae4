"""The GPU check itself, at tiny sizes in the interpreter."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def test_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = content["rows"]
    assert {row["section"] for row in rows} == {"correctness", "prefill", "decode"}
    assert all(row["correct"] for row in rows if row["contender"].startswith(("triton", "ours")))
    assert all(row["reason"] for row in rows if not row["correct"])
    assert all(row["ms_p50"] is None and row["rate"] is None for row in rows)
    assert not (SCRIPT.parents[1] / ".git").exists() or re.fullmatch("[0-9a-f]{7,40}", content["commit"])
    with (tmp_path / "gpu_check.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert table[0]["device"] == content["device"]


def test_a_kernel_that_does_not_launch_is_a_row_with_its_reason(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv = ['gpu_check.py', '--out', {str(tmp_path)!r}, '--quick', '--device', 'cpu']\n"
        f"import importlib.util as u; spec = u.spec_from_file_location('gpu_check', {str(SCRIPT)!r})\n"
        "module = u.module_from_spec(spec); sys.modules['gpu_check'] = module; spec.loader.exec_module(module)\n"
        "module.LAUNCH_SECONDS = 0.01\n"
        "sys.exit(module.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert rows
    assert all("did not end within" in row["reason"] and row["error"] is None for row in rows)
