"""The kernels compiled for real targets, without a GPU: fits in shared memory, tensor cores, no spill in a loop, loads
ahead of the mathematics, a gate that costs few instructions.

Spills and instruction counts are those of a compiler: they are held for the Triton of constraints.txt, and for the
oldest one on the targets that `make test-triton-3.6` compiles for.
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

from videoanchor_triton.kernels.tiles import PREFILL

# all that is compiled is compiled at once, for the first test: minutes, and several times that beside other work
pytestmark = pytest.mark.timeout(1800)
CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
OLDEST = triton.__version__ == "3.6.0"
MEASURED = OLDEST or f"triton=={triton.__version__}" in CONSTRAINTS
SERVERS = ("sm_80", "sm_90")
TARGETS = SERVERS if OLDEST else tuple(target for target in PREFILL if target != "interpreter")
PAGES = (1, 8, 16, 48, 64, 256)
WIDE = (64, 80, 128, 256)  # what several targets compile; the other head dims have the tiles of the next of these
HEAD_DIMS = {target: (16, 32, *WIDE, 96) if target in SERVERS else WIDE for target in TARGETS}
Case = tuple[str, str, int, str]
CASES: list[Case] = [
    *(
        (kernel, target, d, "bf16")
        for target in TARGETS
        for d in HEAD_DIMS[target]
        for kernel in ("ungated", "post-exp")
    ),
    *((kernel, target, 128, "bf16") for target in TARGETS for kernel in ("log-bias", "dq", "dk-dv")),
    *((kernel, "sm_90", d, "bf16") for d in (64, 256) for kernel in ("dq", "dk-dv")),
    *((f"{form} stages-3", "sm_90", d, "bf16") for d in (64, 128) for form in ("ungated", "post-exp")),
    *(("log-bias padded window softcap", target, 128, "bf16") for target in TARGETS if target != "sm_90"),
    ("post-exp varlen window softcap", "sm_90", 128, "bf16"),
    ("log-bias varlen", "sm_90", 256, "bf16"),
    ("log-bias window", "sm_80", 128, "bf16"),
    ("split", "sm_80", 128, "fp16"),
    ("split", "sm_90", 128, "fp16"),
    ("split varlen", "sm_90", 128, "fp16"),
    *((kernel, "sm_90", 128, "fp16") for kernel in ("dq", "dk-dv", "decode positions")),
    *((f"prescale {form}", "sm_90", 128, "bf16") for form in ("log-bias", "post-exp")),
    ("prescale split", "sm_90", 80, "fp16"),
    ("log-bias", "sm_90", 64, "fp32"),
    ("decode positions", "sm_90", 128, "fp32"),
    *(
        (f"page-{n} {form}", target, 128, "bf16")
        for target in SERVERS
        for n in PAGES
        for form in ("ungated", "written")
    ),
    *((f"decode {form}", target, 128, "bf16") for target in TARGETS for form in ("ungated", "positions")),
    *((f"page-64 {form}", "sm_90", 128, "bf16") for form in ("apart", "positions")),
    ("page-16 written window softcap sinks lse", "sm_90", 80, "fp16"),
    ("page-64 written rows-128", "sm_90", 128, "bf16"),
    *((kernel, target, 128, "bf16") for target in SERVERS for kernel in ("plan", "merge", "write")),
    ("write fp8", "sm_90", 128, "bf16"),
]
if not OLDEST:
    CASES += [
        ("log-bias varlen window softcap", "sm_100", 128, "bf16"),
        ("log-bias padded", "sm_100", 64, "bf16"),
        ("log-bias", "sm_89", 256, "fp16"),
        *(
            (f"page-256 {form}", target, 128, "bf16")
            for target in ("sm_100", "sm_120")
            for form in ("ungated", "written")
        ),
        *(
            (f"page-64 written {cache}", target, 128, "bf16")
            for target in ("sm_89", "sm_90")
            for cache in ("fp8", "int8")
        ),
        *(
            (f"page-64 written {cache} tokens", t, 128, "bf16")
            for t in ("sm_100", "sm_120")
            for cache in ("fp8", "int8")
        ),
    ]
WITHOUT_PRODUCTS = ("prescale", "plan", "merge", "write")
Reports = dict[tuple[Any, ...], dict[str, Any]]
SCRIPT = """
import json, sys
from dataclasses import asdict
from videoanchor_triton.kernels import aot
for used in aot.compile_all(json.loads(sys.argv[1])):
    print(json.dumps(asdict(used) | {"instructions": used.instructions}))
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


measured = pytest.mark.skipif(not MEASURED, reason="instructions are counted with the Tritons that the file names")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles_within_the_target(case: Case, reports: Reports) -> None:
    used = reports[case]
    assert used["spills"] == 0 or not MEASURED
    assert used["shared"] <= used["limit"]
    assert used["registers"] <= (512 if case[1] == "gfx942" else 255)
    products = case[3] != "fp32" and not case[0].startswith(WITHOUT_PRODUCTS)
    assert (used["tensor_core"] > 0) == products, "fp32 must not be rounded to TF32"


@measured
@pytest.mark.parametrize("target", TARGETS)
def test_the_gate_adds_little_to_prefill(target: str, reports: Reports) -> None:
    for head_dim in HEAD_DIMS[target]:
        plain, gated = (reports[form, target, head_dim, "bf16"]["instructions"] for form in ("ungated", "post-exp"))
        assert plain > 100
        assert gated <= 1.085 * plain, head_dim


@measured
def test_prefill_at_two_stages_and_at_three(reports: Reports) -> None:
    """Three load a full iteration ahead; at two K is waited for just after its load was issued."""
    for head_dim in (64, 128):
        for stages, most in (("", 1.07), (" stages-3", 1.11)):
            plain, gated = (reports[f"{form}{stages}", "sm_90", head_dim, "bf16"] for form in ("ungated", "post-exp"))
            assert gated["instructions"] <= most * plain["instructions"]
            assert plain["instructions"] <= 493 or head_dim != 128
            for used in (plain, gated):
                assert (used["buffers"], used["ahead"]) == ((3, 1) if stages else (2, 0))


@measured
def test_products_of_a_warpgroup_run_side_by_side(reports: Reports) -> None:
    """Per key tile: D / 16 products for QK, and 128 / 16 for PV, of D0 and of D1 each, and few waits for them.

    ptxas makes each product wait for the one before where it finds something between them that it does not like.
    """
    products = {64: 4 + 8, 80: 5 + 16, 96: 6 + 16, 128: 8 + 8}
    for (kernel, target, head_dim, dtype), used in reports.items():
        loop = used["loop"]
        made = sum(count for name, count in loop.items() if name.startswith("HGMMA"))
        if target == "sm_90" and made and not kernel.startswith(("dq", "dk-dv", "page", "decode")):
            assert sum(count for name, count in loop.items() if name.startswith("WARPGROUP.DEPBAR")) <= 4, kernel
            if kernel == "post-exp" and dtype == "bf16" and head_dim in products:
                assert made == products[head_dim]


@measured
@pytest.mark.parametrize("target", SERVERS)
def test_the_gate_adds_little_to_pages(target: str, reports: Reports) -> None:
    """16 x 128 tiles, V' in the cache: K, V and gate of a tile are loaded a full iteration ahead."""
    for page in PAGES:
        plain, gated = (reports[f"page-{page} {form}", target, 128, "bf16"] for form in ("ungated", "written"))
        assert gated["instructions"] <= 1.06 * plain["instructions"], page
        for used in (plain, gated):
            assert used["ahead"] >= 1, page
            assert used["buffers"] >= 2, page
    most = {"sm_80": 412, "sm_90": 400}[target]
    assert reports["page-256 ungated", target, 128, "bf16"]["instructions"] <= most


@measured
@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0].startswith(("decode", "page")) and case[3] != "fp32"]
)
def test_pages_are_loaded_ahead(case: Case, reports: Reports) -> None:
    assert reports[case]["ahead"] in (None, 1, 2)
