"""The pass of the solver in Triton, compiled without a GPU; its numbers are in test_solver.py."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.compiler import ASTSource
from videoanchor_triton.anchor.fused import BLOCK, update_state_kernel
from videoanchor_triton.kernels.aot import TARGETS

types = dict.fromkeys(("state", "product", "reflected", "settings"), "*fp32")
types |= {"own": "*i64", "n_atoms": "i32", "HAS_OWN": "constexpr", "BLOCK": "constexpr"}
types = {name: types[name] for name in update_state_kernel.arg_names}
for target in TARGETS.values():
    triton.compile(ASTSource(update_state_kernel, types, {"HAS_OWN": True, "BLOCK": BLOCK}), target=target)
print("compiled", len(TARGETS))
"""


def test_the_triton_pass_compiles_for_every_target():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "compiled 7\n", done.stderr
