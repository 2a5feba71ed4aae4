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
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .backward_kernel import d_keys_kernel, d_queries_kernel
from .decode import padded_head_dim
from .decode_kernel import split_kernel
from .hopper import REGISTERS as HOPPER_REGISTERS
from .hopper import TILES as HOPPER_TILES
from .prefill_kernel import prefill_kernel
from .prescale import KEYS as PRESCALE_KEYS
from .prescale import LOG_BIAS, NO_GATE, POST_EXP, SPLIT
from .prescale_kernel import prescale_kernel
from .tiles import HEAD_DIMS, TMA_TARGETS, Tile, backward_tiles, decode_tile, prefill_tile, split_head_dim

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
SHARED_LIMIT["gfx942"] = 65536
FORMS = {"ungated": NO_GATE, "log-bias": LOG_BIAS, "post-exp": POST_EXP, "split": SPLIT}
HOPPER_FORMS = {f"hopper {form}": form for form in FORMS if form != "split"}
PRESCALE_FORMS = {f"prescale {form}": form for form in FORMS if form != "ungated"}
VARIANTS = (
    "post-exp varlen",
    "post-exp varlen window softcap",
    "log-bias varlen",
    "log-bias padded",
    "log-bias window",
    "log-bias window softcap",
    "log-bias varlen window softcap",
    "log-bias padded window softcap",
)
BACKWARD = {"dq": d_queries_kernel, "dk-dv": d_keys_kernel}
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
CASES = [
    (kernel, target, head_dim, "fp16" if kernel == "split" else "bf16")
    for target in TARGETS
    for head_dim in HEAD_DIMS
    for kernel in (*FORMS, *HOPPER_FORMS, "decode", "page-16", "page-64", *BACKWARD)
    if kernel not in HOPPER_FORMS or (target == "sm_90" and head_dim in HOPPER_TILES)
]
CASES += [
    (kernel, target, head_dim, "bf16") for target in TARGETS for head_dim in (64, 128, 256) for kernel in VARIANTS
]
TENSOR_CORE = re.compile(r"(H|UTCH?|Q|I)G?MMA|UTC\w*MMA|v_mfma|v_wmma")
LOCAL_MEMORY = re.compile(r"LDL|STL")


class Dialect(NamedTuple):
    """How an assembly language writes labels, instructions, branches to a label, and instructions that do nothing."""

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    branch: re.Pattern[str]
    idle: re.Pattern[str]


SASS = Dialect(
    re.compile(r"\s*\.(L_\S+):"),
    re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^\s;]+)"),
    re.compile(r"\sBRA\S*\s.*`\(\.(L_[^)]+)\)"),
    re.compile(r"\sNOP|@!PT\s"),
)
AMD = Dialect(
    re.compile(r"(\.L\w+):"),
    re.compile(r"\t([a-z]\w+)"),
    re.compile(r"\ts_c?branch\w*\s+(\.L\w+)"),
    re.compile(r"\ts_nop"),
)
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses.

    `spills` counts the local-memory instructions inside loops (for AMD, the spilled registers). `loop` counts the
    instructions of the shortest loop with a tensor-core product.
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
    """Compile for `target`. `dtypes` gives the types of pointers ("fp32") and of descriptors ("tensordesc<...>").

    What the launcher passes as None is None in `dtypes` too.
    """
    constants = constants | {name: None for name, dtype in dtypes.items() if dtype is None}
    signature, aligned = {}, []
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in dtypes:
            dtype = str(dtypes[name])
            signature[name] = dtype if dtype.startswith("tensordesc") else f"*{dtype}"
            if signature[name] != dtype:
                aligned.append(i)
        elif name in ("scale_log2", "cap_log2"):
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
    gate: str = "post-exp",
    tile: Tile | None = None,
    causal: bool = True,
    window: bool = False,
    softcap: bool = False,
    padded: bool = False,
    varlen: bool = False,
    tma: bool | None = None,
) -> Report:
    """Compile prefill in a form of FORMS; `dtype` is "bf16", "fp16" or "fp32"; `tile` and `tma` replace the tables'."""
    variant = {"padded": padded, "varlen": varlen, "window": window, "softcap": softcap}
    tile = tile or prefill_tile(target, head_dim, ELEMENT[dtype], **variant)
    d0, d1 = split_head_dim(target, head_dim)
    constants = {
        "D0": d0,
        "D1": d1,
        "BM": tile.queries,
        "BN": tile.keys,
        "GATE": FORMS[gate],
        "PADDED": padded,
        "CAUSAL": causal,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "STAGES": tile.stages,
    }
    dtypes: dict[str, str | None] = dict.fromkeys(("q", "k", "v", "out"), dtype)
    dtypes |= {"lse": "fp32", "gate": "fp32" if FORMS[gate] else None, "rest": "fp32" if gate == "split" else None}
    dtypes |= dict.fromkeys(("cu_q", "cu_k"), "i32" if varlen else None)
    tma = target in TMA_TARGETS and ELEMENT[dtype] < 4 if tma is None else tma
    for i, part in enumerate((d0, d1)):
        described = f"tensordesc<{dtype}[1, 1, {tile.keys}, {part}]>" if tma and part else None
        dtypes |= dict.fromkeys((f"k_desc{i}", f"v_desc{i}"), described)
    compiled = compile_kernel(prefill_kernel, target, dtypes, constants, tile)
    return report(
        " ".join([gate, *(name for name, asked in variant.items() if asked)]), target, head_dim, dtype, compiled
    )


def compile_prescale(target: str, head_dim: int, dtype: str = "bf16", gate: str = "post-exp") -> Report:
    """Compile the pass before prefill, with both gates and padding; arguments as for prefill."""
    constants = {"D": head_dim, "BD": triton.next_power_of_2(head_dim), "BN": PRESCALE_KEYS, "FORM": FORMS[gate]}
    dtypes: dict[str, str | None] = {"v": dtype, "out_v": dtype, "seen": "u8"}
    dtypes |= dict.fromkeys(("gamma_k", "gamma_v", "gate"), "fp32") | {"rest": "fp32" if gate == "split" else None}
    tile = Tile(0, PRESCALE_KEYS, 4, 1)
    compiled = compile_kernel(prescale_kernel, target, dtypes, constants, tile)
    return report(f"prescale {gate}", target, head_dim, dtype, compiled)


def compile_decode(
    target: str,
    head_dim: int,
    dtype: str = "bf16",
    rows: int = 16,
    tile: Tile | None = None,
    gate: bool = True,
    padding: bool = False,
    page: int | None = None,
) -> Report:
    """Compile decode's split kernel for `rows` packed rows, over pages of `page` keys if given; else as for prefill."""
    tile = tile or decode_tile(target, head_dim, ELEMENT[dtype], rows)
    constants = {
        "D": head_dim,
        "BD": padded_head_dim(head_dim),
        "BM": tile.queries,
        "BN": tile.keys,
        "PAGE": page or 1,
        "CAUSAL": False,
        "WINDOW": False,
        "SOFTCAP": False,
        "STAGES": tile.stages,
    }
    dtypes: dict[str, str | None] = dict.fromkeys(("q", "k", "v"), dtype)
    dtypes |= dict.fromkeys(("part_out", "part_lse"), "fp32") | dict.fromkeys(
        ("gamma_k", "gamma_v"), "fp32" if gate else None
    )
    dtypes |= {"seen": "u8" if padding else None}
    dtypes |= {"lengths": "i32" if page else None, "table": "i32" if page else None}
    compiled = compile_kernel(split_kernel, target, dtypes, constants, tile)
    return report(f"page-{page}" if page else "decode", target, head_dim, dtype, compiled)


def compile_backward(
    kernel: str,
    target: str,
    head_dim: int,
    dtype: str = "bf16",
    tile: Tile | None = None,
    causal: bool = True,
    window: bool = False,
    softcap: bool = False,
    varlen: bool = False,
    gate: bool = True,
) -> Report:
    """Compile one of backward's kernels, "dq" or "dk-dv"; other arguments as for prefill."""
    tile = tile or backward_tiles(target, head_dim, ELEMENT[dtype])[[*BACKWARD].index(kernel)]
    constants = {
        "D": head_dim,
        "BD": triton.next_power_of_2(head_dim),
        "BM": tile.queries,
        "BN": tile.keys,
        "CAUSAL": causal,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "STAGES": tile.stages,
    }
    elements = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
    dtypes: dict[str, str | None] = dict.fromkeys(elements, dtype)
    dtypes |= dict.fromkeys(("lse", "d_lse", "delta"), "fp32")
    gates = ("log_gate", "value_gate", "d_log_gate", "d_value_gate")
    dtypes |= dict.fromkeys(gates, "fp32" if gate else None)
    dtypes |= dict.fromkeys(("cu_q", "cu_k"), "i32" if varlen else None)
    taken = {name: dtypes[name] for name in BACKWARD[kernel].arg_names if name in dtypes}
    compiled = compile_kernel(BACKWARD[kernel], target, taken, constants, tile)
    return report(kernel, target, head_dim, dtype, compiled)


def compile_hopper(
    head_dim: int,
    dtype: str = "bf16",
    gate: str = "post-exp",
    causal: bool = True,
    tile: Tile | None = None,
) -> Report:
    """Compile the Gluon kernel of sm_90 in a form of FORMS; `dtype` is "bf16" or "fp16"; `tile` as for prefill."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from .hopper_kernel import hopper_kernel

    tile = tile or HOPPER_TILES[head_dim]

    def described(dtype: str, *block: int) -> str:
        element = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}[dtype]
        return f"tensordesc<{dtype}{list(block)},{gl.NVMMASharedLayout.get_default_for(list(block), element)!r}>"

    constants: dict[str, Any] = {"STAGES": tile.stages, "GATE": FORMS[gate], "CAUSAL": causal}
    if FORMS[gate] == NO_GATE:
        constants["gate"] = None
    types = {
        "q": described(dtype, 1, 1, tile.queries // 2, head_dim),
        "k": described(dtype, 1, 1, tile.keys, head_dim),
        "v": described(dtype, 1, 1, tile.keys, head_dim),
        "gate": described("fp32", 1, 1, tile.keys),
        "out": f"*{dtype}",
        "lse": "*fp32",
        "scale_log2": "fp32",
    }
    types |= dict.fromkeys(("Nq", "Nk", "group", "stride_lh", "stride_lb"), "i32")
    types |= dict.fromkeys(("stride_ob", "stride_oh", "stride_on"), "i64") | dict.fromkeys(constants, "constexpr")
    names = hopper_kernel.arg_names
    aligned = [i for i, name in enumerate(names) if name in ("out", "lse", "stride_ob", "stride_oh", "stride_on")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = GluonASTSource(hopper_kernel, {name: types[name] for name in names}, constants, attributes)
    options = {"num_warps": tile.warps, "maxnreg": HOPPER_REGISTERS, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS["sm_90"], options=options)
    return report(f"hopper {gate}", "sm_90", head_dim, dtype, compiled)


def report(kernel: str, target: str, head_dim: int, dtype: str, compiled: CompiledKernel) -> Report:
    """Read the resources of a compiled kernel from its assembly."""
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        registers, spills = int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
        opcodes, loops = instructions(text, AMD)
    else:
        cubin = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+)", run_tool("cuobjdump", "-res-usage", cubin))
        registers = int(usage[1]) if usage else -1
        opcodes, loops = instructions(run_tool("nvdisasm", "-c", cubin), SASS)
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


def instructions(assembly: str, dialect: Dialect) -> tuple[list[str], list[list[str]]]:
    """All opcodes, and those of each innermost loop (a backward branch that holds no other) without its no-ops."""
    opcodes, labels, branches = [], {}, []
    for line in assembly.splitlines():
        if label := dialect.label.match(line):
            labels[label[1]] = len(opcodes)
        elif found := dialect.instruction.match(line):
            if goal := dialect.branch.search(line):
                branches.append((goal[1], len(opcodes)))
            opcodes.append("NOP" if dialect.idle.search(line) else found[1])
    loops = [(labels[goal], end) for goal, end in branches if labels.get(goal, end) < end]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return opcodes, [[opcode for opcode in opcodes[a : b + 1] if opcode != "NOP"] for a, b in inner]


def compile_case(case: tuple[str, str, int, str]) -> Report:
    """Compile one case (kernel, target, head dim, dtype) of the kinds that CASES names."""
    kernel, target, head_dim, dtype = case
    if kernel in HOPPER_FORMS:
        return compile_hopper(head_dim, dtype, HOPPER_FORMS[kernel])
    if kernel in PRESCALE_FORMS:
        return compile_prescale(target, head_dim, dtype, PRESCALE_FORMS[kernel])
    form, *features = kernel.split()
    if form in FORMS:
        asked: dict[str, Any] = dict.fromkeys(features, True)
        return compile_prefill(target, head_dim, dtype, form, **asked)
    if kernel in BACKWARD:
        return compile_backward(kernel, target, head_dim, dtype)
    page = int(kernel.removeprefix("page-")) if kernel.startswith("page-") else None
    return compile_decode(target, head_dim, dtype, page=page)


def compile_all(cases: Iterable[tuple[str, str, int, str]] = CASES) -> Iterator[Report]:
    """Compile the cases in their order."""
    yield from map(compile_case, cases)


def main() -> None:
    """Print the table of all cases."""
    print("kernel                          target   head_dim  dtype  registers  spills  shared  tensor-core  loop")
    for used in compile_all():
        print(
            f"{used.kernel:31} {used.target:8} {used.head_dim:8}  {used.dtype:5} {used.registers:10} {used.spills:7} "
            f"{used.shared:7} {used.tensor_core:12} {sum(used.loop.values()):5}"
        )


if __name__ == "__main__":
    main()
