"""The kernels compiled for real targets, without a GPU: fits in shared memory, tensor cores, no spill in a loop.

Spills and instruction counts are those of one compiler, the Triton of constraints.txt; others may differ.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import triton

from videoanchor_triton.kernels.tiles import HEAD_DIMS, PREFILL

# all that is compiled is compiled at once, for the first test: minutes, and several times that beside other work
pytestmark = pytest.mark.timeout(1800)
CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
MEASURED = f"triton=={triton.__version__}" in CONSTRAINTS
TARGETS = [target for target in PREFILL if target != "interpreter"]
CASES = [
    *((kernel, target, d, "bf16") for target in TARGETS for d in HEAD_DIMS for kernel in ("ungated", "post-exp")),
    *((kernel, target, 128, "bf16") for target in TARGETS for kernel in ("log-bias", "decode")),
    *((kernel, target, 128, "bf16") for target in ("sm_80", "sm_90") for kernel in ("page-16", "page-64")),
    *((kernel, target, 128, "bf16") for target in TARGETS for kernel in ("dq", "dk-dv")),
    *((kernel, "sm_90", d, "bf16") for d in (64, 256) for kernel in ("dq", "dk-dv")),
    *(("log-bias padded window softcap", target, 128, "bf16") for target in TARGETS if target != "sm_90"),
    ("post-exp varlen window softcap", "sm_90", 128, "bf16"),
    ("log-bias varlen", "sm_90", 256, "bf16"),
    ("log-bias varlen window softcap", "sm_100", 128, "bf16"),
    ("log-bias padded", "sm_100", 64, "bf16"),
    ("log-bias window", "sm_80", 128, "bf16"),
    ("log-bias", "sm_89", 256, "fp16"),
    ("split", "sm_80", 128, "fp16"),
    ("split", "sm_90", 128, "fp16"),
    ("split varlen", "sm_90", 128, "fp16"),
    *((kernel, "sm_90", 128, "fp16") for kernel in ("dq", "dk-dv", "decode")),
    *((f"prescale {form}", "sm_90", 128, "bf16") for form in ("log-bias", "post-exp")),
    ("prescale split", "sm_90", 80, "fp16"),
    ("decode", "sm_90", 80, "fp16"),
    ("log-bias", "sm_90", 64, "fp32"),
    ("decode", "sm_90", 128, "fp32"),
]
Reports = dict[tuple[Any, ...], dict[str, Any]]
SCRIPT = """
import json, sys
from dataclasses import asdict
from videoanchor_triton.kernels import aot
for used in aot.compile_all(json.loads(sys.argv[1])):
    print(json.dumps(asdict(used) | {"limit": aot.SHARED_LIMIT[used.target]}))
"""


@pytest.fixture(scope="module")
def reports() -> Reports:
    """All reports, from other processes: the interpreter, which this one may run under, replaces the compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    halves = CASES[::2], CASES[1::2]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", SCRIPT, json.dumps(half)], stdout=subprocess.PIPE, env=environment
                )
            )
            for half in halves
        ]
        with ThreadPoolExecutor(len(halves)) as readers:
            outputs = [output for output, _ in readers.map(subprocess.Popen.communicate, processes)]
    assert all(process.returncode == 0 for process in processes)
    lines = [map(json.loads, output.splitlines()) for output in outputs]
    return {
        case: report
        for half, found in zip(halves, lines, strict=True)
        for case, report in zip(half, found, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles_within_the_target(case: tuple[str, str, int, str], reports: Reports) -> None:
    used = reports[case]
    assert used["spills"] == 0 or not MEASURED
    assert used["shared"] <= used["limit"]
    assert used["registers"] <= (512 if case[1] == "gfx942" else 255)
    products = case[3] != "fp32" and not case[0].startswith("prescale")
    assert (used["tensor_core"] > 0) == products, "fp32 must not be rounded to TF32"


@pytest.mark.skipif(not MEASURED, reason="instructions are counted with the Triton of constraints.txt")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_gate_adds_little_to_the_main_loop(target: str, head_dim: int, reports: Reports) -> None:
    plain, gated = (sum(reports[form, target, head_dim, "bf16"]["loop"].values()) for form in ("ungated", "post-exp"))
    assert plain > 100
    assert gated <= 1.08 * plain
    if (target, head_dim) == ("sm_90", 128):
        assert gated <= plain + 40


def test_hopper_prefill_uses_warpgroup_products_without_padding(reports: Reports) -> None:
    """Per key tile: D / 16 products for QK, and 128 / 16 for PV, of D0 and of D1 each."""
    products = {64: 4 + 8, 80: 5 + 16, 96: 6 + 16, 128: 8 + 8}
    for head_dim, expected in products.items():
        loop = reports["post-exp", "sm_90", head_dim, "bf16"]["loop"]
        assert sum(count for name, count in loop.items() if name.startswith("HGMMA")) == expected
    assert sum(reports["post-exp", "sm_90", 128, "bf16"]["loop"].values()) < 640
