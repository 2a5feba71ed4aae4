"""What a compiled kernel uses, read from its assembly and from Triton's own code of the main loop."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
SHARED_LIMIT["gfx942"] = 65536
TENSOR_CORE = re.compile(r"(H|UTCH?|Q|I)G?MMA|UTC\w*MMA|v_mfma|v_wmma")
LOCAL_MEMORY = re.compile(r"LDL|STL|scratch_")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


class Loads(NamedTuple):
    """How the main loop loads its tiles, as Triton's pipeline laid it out.

    `buffers`: of K or V in shared memory, the fewest, 0 where the loop copies none asynchronously. `ahead`: whole
    iterations between the issue of a copy and the wait for it, the fewest of all copies, those of gates included; 0 too
    where the loop loads into registers what it uses in the same iteration.
    """

    buffers: int
    ahead: int


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses.

    `spills` counts the local-memory instructions inside loops, `local` all of them (for AMD the spilled registers, and
    all scratch instructions). `loop` counts the instructions of the shortest loop with a tensor-core product. `buffers`
    and `ahead` are those of `Loads`, None where there is no such loop or its loads are not in it (a loader warp, AMD).
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    registers: int
    spills: int
    local: int
    shared: int
    limit: int
    tensor_core: int
    loop: dict[str, int]
    buffers: int | None
    ahead: int | None

    @property
    def instructions(self) -> int:
        """Of the main loop."""
        return sum(self.loop.values())


def report(kernel: str, target: str, head_dim: int, dtype: str, compiled: CompiledKernel) -> Report:
    """Read the resources of a compiled kernel."""
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        registers, spills = int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
        opcodes, loops = instructions(text, AMD)
        loads = None
    else:
        cubin = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+)", run_tool("cuobjdump", "-res-usage", cubin))
        registers = int(usage[1]) if usage else -1
        opcodes, loops = instructions(run_tool("nvdisasm", "-c", cubin), SASS)
        spills = sum(bool(LOCAL_MEMORY.match(opcode)) for loop in loops for opcode in loop)
        loads = loads_of(compiled.asm["ttgir"])
    products = [loop for loop in loops if any(TENSOR_CORE.match(opcode) for opcode in loop)]
    return Report(
        kernel,
        target,
        head_dim,
        dtype,
        registers,
        spills,
        local=sum(bool(LOCAL_MEMORY.match(opcode)) for opcode in opcodes),
        shared=compiled.metadata.shared,
        limit=SHARED_LIMIT[target],
        tensor_core=sum(bool(TENSOR_CORE.match(opcode)) for opcode in opcodes),
        loop=dict(Counter(min(products, key=len, default=[]))),
        buffers=loads and loads.buffers,
        ahead=loads and loads.ahead,
    )


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


PRODUCT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b")
COPY = re.compile(r"ttg\.async_copy_global_to_local \S+, (%\w+)")
TMA_COPY = re.compile(r"ttng\.async_tma_(?:copy_global_to_local|gather) [^\]]*\] (%\w+), (%\w+)")
WAIT = re.compile(r"ttg\.async_wait .*\{num = (\d+)|ttg\.async_wait\b()")
BARRIER_WAIT = re.compile(r"ttng\.wait_barrier (%\w+)")
MADE = re.compile(r"\s*(%\w+)(?::\d+)? = ")
VIEW = re.compile(r"\s*(%\w+) = ttg\.memdesc_\w+ (%\w+)")
SHAPE = re.compile(r"\s*(%\w+) = ttg\.local_alloc\b.*!ttg\.memdesc<((?:\d+x)+)[a-z]")


def main_loop(lines: list[str]) -> tuple[int, int] | None:
    """First and last line of the shortest innermost loop with a product."""
    opened: list[tuple[int, int]] = []
    loops = []
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if " scf.for " in line:
            opened.append((i, indent))
        elif opened and indent == opened[-1][1] and line.lstrip().startswith("}"):
            loops.append((opened.pop()[0], i))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    products = [a for a in inner if any(PRODUCT.search(line) for line in lines[a[0] : a[1]])]
    return min(products, key=lambda a: a[1] - a[0], default=None)


def loads_of(ttgir: str) -> Loads | None:
    """How the main loop loads; None where there is no such loop, or another loop loads for it."""
    lines = ttgir.splitlines()
    bounds = main_loop(lines)
    if bounds is None or any("ttg.warp_specialize" in line for line in lines):
        return None
    start, end = bounds
    root = {view[1]: view[2] for line in lines if (view := VIEW.match(line))}

    def allocation(name: str) -> str:
        while name in root:
            name = root[name]
        return name

    copied = [
        (i, allocation(found[1]), allocation(found[2]) if found.re is TMA_COPY else None)
        for i, line in enumerate(lines)
        if (found := COPY.search(line) or TMA_COPY.search(line))
    ]
    inside = [copy for copy in copied if start < copy[0] < end]
    shapes = {made[1]: [int(n) for n in made[2].split("x")[:-1]] for line in lines if (made := SHAPE.match(line))}
    tiles = [shapes.get(buffer, []) for _, buffer, _ in inside]
    # a gate has one column, and K and V at least 16 rows
    buffers = [shape[0] if len(shape) > 2 else 1 for shape in tiles if min(shape[-2:], default=0) >= 16]
    ahead = [0] if used_at_once(lines[start:end]) else []
    groups = sum("ttg.async_commit_group" in line for line in lines[start:end])
    for i in range(start, end):
        if wait := WAIT.search(lines[i]):
            ahead.append(int(wait[1] or 0) // max(groups, 1))
        elif wait := BARRIER_WAIT.search(lines[i]):
            barrier = allocation(wait[1])
            issued = [at for at, _, signalled in inside if signalled == barrier]
            if issued:
                # the copy of iteration i + n is issued in iteration i, before or after the wait for that of i
                first = sum(at < start and signalled == barrier for at, _, signalled in copied) // len(issued)
                ahead.append(first if max(issued) < i else first - 1)
    return Loads(min(buffers, default=0), min(ahead, default=0))


def used_at_once(loop: list[str]) -> bool:
    """Whether a value loaded into registers is used in the iteration that loads it, but to be carried to the next."""
    loaded: set[str] = set()
    for line in loop[:-1]:
        names = set(re.findall(r"%\w+", line))
        made = MADE.match(line)
        if "tt.load " in line and made:
            loaded.add(made[1])
        elif loaded & names and "scf.yield" not in line:
            return True
    return False
