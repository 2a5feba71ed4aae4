"""Compile the kernels for a named target without a GPU, and report what they use.

`python -m videoanchor_triton.kernels.aot` prints a table of registers, spills, shared memory and the instructions of
the main loop. TRITON_INTERPRET must not be set: the interpreter replaces the compiler.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import decode, prefill
from .tiles import HEAD_DIMS, Tile, decode_tile, prefill_tile, split_head_dim

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
SHARED_LIMIT["gfx942"] = 65536
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
CASES = [
    (kernel, target, head_dim, "bf16")
    for target in TARGETS
    for head_dim in HEAD_DIMS
    for kernel in ("log-bias", "post-exp", "decode")
]
TENSOR_CORE = re.compile(r"(H|UTCH?|Q|I)G?MMA|UTC\w*MMA|v_mfma|v_wmma")
LOCAL_MEMORY = re.compile(r"LDL|STL")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses.

    `spills` counts the local-memory instructions inside loops (for AMD, the spilled registers). `loop` counts the
    instructions of the shortest loop with a tensor-core product (empty for AMD).
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    registers: int
    spills: int
    shared: int
    tensor_core: int
    loop: dict[str, int]


def compile_kernel(
    kernel: triton.JITFunction, target: str, dtypes: dict[str, str | None], constants: dict[str, Any], tile: Tile
) -> CompiledKernel:
    """Compile for `target`. `dtypes` names the pointers ("fp32"; None where the launcher passes None)."""
    constants = constants | {name: None for name, dtype in dtypes.items() if dtype is None}
    signature, aligned = {}, []
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in dtypes:
            signature[name] = f"*{dtypes[name]}"
            aligned.append(i)
        elif name == "scale_log2":
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if re.fullmatch(r"stride_\w[bh]", name) else "i32"
            if re.fullmatch(r"stride_[qkvo]\w", name):
                aligned.append(i)
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def compile_prefill(
    target: str,
    head_dim: int,
    dtype: str = "bf16",
    gate: int = prefill.POST_EXP,
    tile: Tile | None = None,
    causal: bool = True,
    window: bool = False,
) -> Report:
    """Compile prefill in one gate form; `dtype` is "bf16", "fp16" or "fp32", `tile` replaces the table's."""
    tile = tile or prefill_tile(target, head_dim, ELEMENT[dtype])
    d0, d1 = split_head_dim(head_dim)
    constants = {
        "D0": d0,
        "D1": d1,
        "BM": tile.queries,
        "BN": tile.keys,
        "GATE": gate,
        "CAUSAL": causal,
        "WINDOW": window,
        "STAGES": tile.stages,
    }
    dtypes = dict.fromkeys(("q", "k", "v", "out"), dtype) | {"lse": "fp32", "gate": "fp32" if gate else None}
    form = {prefill.NO_GATE: "ungated", prefill.LOG_BIAS: "log-bias", prefill.POST_EXP: "post-exp"}[gate]
    return report(
        form, target, head_dim, dtype, compile_kernel(prefill.prefill_kernel, target, dtypes, constants, tile)
    )


def compile_decode(
    target: str,
    head_dim: int,
    dtype: str = "bf16",
    rows: int = 16,
    tile: Tile | None = None,
    gate: bool = True,
    padding: bool = False,
) -> Report:
    """Compile decode's split kernel for `rows` packed rows; arguments as for prefill."""
    tile = tile or decode_tile(target, head_dim, ELEMENT[dtype], rows)
    constants = {
        "D": head_dim,
        "BD": decode.padded_head_dim(head_dim),
        "BM": tile.queries,
        "BN": tile.keys,
        "CAUSAL": False,
        "WINDOW": False,
        "STAGES": tile.stages,
    }
    dtypes: dict[str, str | None] = dict.fromkeys(("q", "k", "v"), dtype) | dict.fromkeys(
        ("part_out", "part_lse"), "fp32"
    )
    dtypes |= dict.fromkeys(("gamma_k", "gamma_v"), "fp32" if gate else None) | {"seen": "u8" if padding else None}
    return report(
        "decode", target, head_dim, dtype, compile_kernel(decode.split_kernel, target, dtypes, constants, tile)
    )


def report(kernel: str, target: str, head_dim: int, dtype: str, compiled: CompiledKernel) -> Report:
    """Read the resources of a compiled kernel from its assembly."""
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        registers, spills = int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
        opcodes, loop = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE), Counter[str]()
    else:
        cubin = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+)", run_tool("cuobjdump", "-res-usage", cubin))
        registers = int(usage[1]) if usage else -1
        opcodes, loops = disassemble(run_tool("nvdisasm", "-c", cubin))
        spills = sum(bool(LOCAL_MEMORY.match(opcode)) for loop in loops for opcode in loop)
        products = [loop for loop in loops if any(TENSOR_CORE.match(opcode) for opcode in loop)]
        loop = Counter(min(products, key=len, default=[]))
    tensor_core = sum(bool(TENSOR_CORE.match(opcode)) for opcode in opcodes)
    return Report(kernel, target, head_dim, dtype, registers, spills, compiled.metadata.shared, tensor_core, dict(loop))


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """Run a program of the Triton wheel on a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [NVIDIA_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def disassemble(sass: str) -> tuple[list[str], list[list[str]]]:
    """All opcodes of a disassembly, and those of each innermost loop (a backward branch that holds no other)."""
    opcodes, labels, branches = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_\S+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^\s;]+)(.*)", line):
            if found[1].startswith("BRA") and (goal := re.search(r"`\(\.(L_[^)]+)\)", found[2])):
                branches.append((goal[1], len(opcodes)))
            opcodes.append(found[1])
    loops = [(labels[goal], end) for goal, end in branches if labels.get(goal, end) < end]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return opcodes, [[opcode for opcode in opcodes[a : b + 1] if opcode != "NOP"] for a, b in inner]


def compile_all(cases: Iterable[tuple[str, str, int, str]] = CASES) -> Iterator[Report]:
    """Compile each case (kernel, target, head dim, dtype); the kernels are "log-bias", "post-exp" and "decode"."""
    for kernel, target, head_dim, dtype in cases:
        if kernel == "decode":
            yield compile_decode(target, head_dim, dtype)
        else:
            yield compile_prefill(
                target, head_dim, dtype, prefill.LOG_BIAS if kernel == "log-bias" else prefill.POST_EXP
            )


def main() -> None:
    """Print the table of all cases."""
    print("kernel   target   head_dim  dtype  registers  spills  shared  tensor-core  loop")
    for used in compile_all():
        print(
            f"{used.kernel:8} {used.target:8} {used.head_dim:8}  {used.dtype:5} {used.registers:10} {used.spills:7} "
            f"{used.shared:7} {used.tensor_core:12} {sum(used.loop.values()):5}"
        )


if __name__ == "__main__":
    main()
