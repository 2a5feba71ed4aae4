"""Compile the kernels for a named target without a GPU, from the arguments of their own launches, and report.

`python -m videoanchor_triton.kernels.aot` prints a table of registers, local memory, shared memory, the instructions of
the main loop and how far ahead it loads. TRITON_INTERPRET must not be set: the interpreter replaces the compiler.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .backward import backward
from .compiled import Report, report
from .gate_pages import GatePages
from .hopper import TILES as HOPPER_TILES
from .hopper import hopper_prefill
from .operands import Masks, PositionGate
from .paged import paged
from .prefill import prefill
from .prescale import LOG_BIAS, NO_GATE, POST_EXP, prescale
from .tiles import HEAD_DIMS, prefill_tile
from .write import write

Case = tuple[str, str, int, str]
Launch = Callable[[], object]
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# batch, query and KV heads, rows of the made-up calls: what is specialised, is as in most real ones
B, HQ, HKV, N = 2, 28, 4, 512

# the first word of a case's kernel, and the function that Triton compiles
PREFILL = ("ungated", "log-bias", "post-exp", "split")
FUNCTIONS = dict.fromkeys(PREFILL, "prefill_kernel") | {"dq": "d_queries_kernel", "dk-dv": "d_keys_kernel"}
FUNCTIONS |= {
    "prescale": "prescale_kernel",
    "hopper": "hopper_kernel",
    "decode": "paged_kernel",
    "page": "paged_kernel",
}
FUNCTIONS |= {"plan": "plan_kernel", "merge": "merge_kernel", "write": "write_kernel"}
PAGE_SIZES = (1, 16, 64, 256)
PAGE_FORMS = ("ungated", "written", "apart", "positions")
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
CASES: list[Case] = [
    (kernel, target, head_dim, "fp16" if kernel == "split" else "bf16")
    for target in TARGETS
    for head_dim in HEAD_DIMS
    for kernel in (
        *PREFILL,
        "dq",
        "dk-dv",
        "decode ungated",
        "decode positions",
        *(f"page-16 {form}" for form in PAGE_FORMS),
    )
]
CASES += [
    (kernel, target, head_dim, "bf16") for target in TARGETS for head_dim in (64, 128, 256) for kernel in VARIANTS
]
CASES += [(f"hopper {form}", "sm_90", head_dim, "bf16") for head_dim in HOPPER_TILES for form in PREFILL[:3]]
CASES += [
    (f"page-{size} {form}", target, 128, "bf16")
    for target in TARGETS
    for size in (1, 8, 48, 64, 256)
    for form in PAGE_FORMS
]
CASES += [
    (f"page-64 {form} {cache}{scales}", target, 128, "bf16")
    for target in ("sm_89", "sm_90", "sm_100", "sm_120")
    for cache in ("fp8", "int8")
    for scales in ("", " tokens")
    for form in ("ungated", "written", "apart")
]
CASES += [(f"page-256 {form} rows-{rows}", "sm_90", 128, "bf16") for rows in (64, 128) for form in PAGE_FORMS]
CASES += [(f"{form} stages-3", "sm_90", 128, "bf16") for form in PREFILL[:3]]
CASES += [(kernel, target, 128, "bf16") for target in TARGETS for kernel in ("plan", "merge", "write", "write fp8")]


class StandIn:
    """The part of Triton's driver that compiling asks for: which target."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        """Kernels are kept by device."""
        return self.target

    def get_current_stream(self, _: str) -> int:
        return 0


@contextmanager
def compiling(target: str, function: str) -> Iterator[list[CompiledKernel]]:
    """Within it launches of `function` compile it for `target` from their own arguments; nothing is launched."""
    compiled: list[CompiledKernel] = []
    run, active = JITFunction.run, driver._active

    def compile_only(kernel: JITFunction[Any], *args: Any, **given: Any) -> None:
        if kernel.__name__ == function:
            compiled.append(run(kernel, *args, **(given | {"warmup": True})))

    driver.set_active(StandIn(target))  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def compile_case(case: Case) -> Report:
    """Compile one case: the words of a kernel as in CASES, target, head dim, dtype of the queries.

    Words: varlen, padded, window, softcap, stages-N for prefill and backward; fp8, int8, tokens (scales per token),
    window, softcap, sinks, lse, rows-N (packed rows of a tile) for decode and page-N.
    """
    kernel, target, *_ = case
    function = FUNCTIONS[kernel.split()[0].partition("-")[0] if kernel.startswith("page-") else kernel.split()[0]]
    with compiling(target, function) as compiled:
        launch_of(*case)()
    return report(*case, compiled[0])


def compile_all(cases: Iterable[Case] = CASES) -> Iterator[Report]:
    """Compile the cases in their order."""
    yield from map(compile_case, cases)


def launch_of(kernel: str, target: str, head_dim: int, dtype: str) -> Launch:
    """The call that launches a case's kernel."""
    first, *words = kernel.split()
    masks = Masks(head_dim**-0.5, True, 256 if "window" in words else None, 30.0 if "softcap" in words else None)
    element = DTYPES[dtype]
    if first in PREFILL:
        return prefill_launch(first, target, head_dim, element, masks, words)
    if first in ("dq", "dk-dv"):
        return backward_launch(target, head_dim, element, masks, words)
    if first == "write":
        return write_launch(head_dim, element, words)
    if first == "prescale":
        gates = torch.empty(2, B, HKV, N)
        fp32_gates = (gates[0], gates[1] if words[0] == "split" or element != torch.float16 else None)
        seen = None if words[0] == "post-exp" else torch.ones(B, N, dtype=torch.bool)
        return partial(prescale, dense(element, HKV, head_dim), *fp32_gates, seen, words[0] == "post-exp", 128)
    if first == "hopper":
        form = {"ungated": NO_GATE, "log-bias": LOG_BIAS, "post-exp": POST_EXP}[words[0]]
        q, k, v = (dense(element, heads, head_dim) for heads in (HQ, HKV, HKV))
        gate = torch.empty(B, HKV, N) if form else None
        return partial(hopper_prefill, q, k, v, gate, dense(element, HQ, head_dim), torch.empty(B, HQ, N), masks, form)
    return paged_launch(first, target, head_dim, element, masks, words)


def dense(dtype: torch.dtype, heads: int, head_dim: int, rows: int = N) -> torch.Tensor:
    """(B, heads, rows, D), tokens before heads in memory, as a model's projections give it."""
    return torch.empty(B, rows, heads, head_dim, dtype=dtype).transpose(1, 2)


def prefill_launch(form: str, target: str, head_dim: int, dtype: torch.dtype, masks: Masks, words: list[str]) -> Launch:
    varlen, padded = "varlen" in words, "padded" in words
    q, k, v, out = (dense(dtype, heads, head_dim) for heads in (HQ, HKV, HKV, HQ))
    lse, gates = torch.empty(B, HQ, N), torch.empty(2, B, HKV, N)
    offsets = None
    if varlen:  # one batch entry
        q, k, v, out, lse, gates = q[:1], k[:1], v[:1], out[:1], lse[:1], gates[:, :1]
        offsets = (torch.empty(9, dtype=torch.int32), torch.empty(9, dtype=torch.int32), N)
    gamma_k = None if form == "ungated" else gates[0]
    gamma_v = gates[1] if form == "split" or (gamma_k is not None and dtype == torch.bfloat16) else None
    tile = prefill_tile(
        target,
        head_dim,
        q.element_size(),
        padded=padded,
        varlen=varlen,
        window=masks.window is not None,
        softcap=masks.softcap is not None,
    )
    for word in words:
        if word.startswith("stages-"):
            tile = tile._replace(stages=int(word.removeprefix("stages-")))
    mask = torch.ones(B, N, dtype=torch.bool) if padded else None
    return partial(
        prefill,
        q,
        k,
        v,
        gamma_k,
        gamma_v,
        mask,
        out,
        lse,
        masks,
        form == "post-exp",
        target,
        cu_seqlens=offsets,
        tile=tile,
    )


def backward_launch(target: str, head_dim: int, dtype: torch.dtype, masks: Masks, words: list[str]) -> Launch:
    q, k, v, out, d_out = (dense(dtype, heads, head_dim) for heads in (HQ, HKV, HKV, HQ, HQ))
    lse, d_lse, gates = torch.empty(B, HQ, N), torch.empty(B, HQ, N), torch.ones(2, B, HKV, N)
    packed: dict[str, Any] = {}
    if "varlen" in words:
        q, k, v, out, d_out = (x[0].transpose(0, 1) for x in (q, k, v, out, d_out))
        lse, d_lse, gates = lse[0].T, d_lse[0].T, gates[:, 0].transpose(1, 2)
        offsets = torch.tensor([0, N // 2, N], dtype=torch.int32)
        packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": N // 2, "max_seqlen_k": N // 2}
    gamma_k, gamma_v = (None, None) if "ungated" in words else gates
    return partial(backward, q, k, v, gamma_k, gamma_v, None, out, lse, d_out, d_lse, masks, target, **packed)


def cache(pages: int, size: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (P, Hkv, page, D) as a serving engine keeps them: halves of one tensor, tokens before heads."""
    both = torch.empty(pages, 2, size, HKV, head_dim, dtype=dtype).transpose(2, 3)
    return both[:, 0], both[:, 1]


def page_gate(form: str, pages: int, size: int) -> GatePages:
    return GatePages(torch.empty(pages, HKV, size, *((2,) if form == "apart" else ())), form)


def paged_launch(first: str, target: str, head_dim: int, dtype: torch.dtype, masks: Masks, words: list[str]) -> Launch:
    """Of `decode` (no pages), `page-N`, and of `plan` and `merge`, which the same call launches."""
    size = int(first.removeprefix("page-")) if first.startswith("page-") else 0
    size = 64 if first in ("plan", "merge") else size
    rows = next((int(word.removeprefix("rows-")) for word in words if word.startswith("rows-")), 16)
    queries = max(1, rows * HKV // HQ)
    cached = next((DTYPES[word] for word in words if word in ("fp8", "int8")), dtype)
    pages, table = 64, torch.empty(B, 16, dtype=torch.int32)
    options: dict[str, Any] = {"seqlens_k": torch.empty(B, dtype=torch.int32), "max_seqlen_q": queries}
    if size:
        k, v = cache(pages, size, head_dim, cached)
        options |= {"block_table": table, "cu_seqlens_q": torch.empty(B + 1, dtype=torch.int32)}
    else:
        k, v = (torch.empty(B, HKV, N, head_dim, dtype=cached) for _ in "kv")
    if "positions" in words:
        options["gate"] = PositionGate(*torch.empty(2, B, HKV, N))
    elif form := next((word for word in words if word in ("written", "apart")), None):
        options["gate"] = page_gate(form, pages, size)
    if cached != dtype:
        scales = torch.empty(2, pages, HKV, size) if "tokens" in words else torch.empty(2, 1)
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
    if "sinks" in words:
        options["sinks"] = torch.empty(HQ)
    q, out = (torch.empty(B * queries, HQ, head_dim, dtype=dtype) for _ in "qo")
    lse = torch.empty(HQ, B * queries).T if "lse" in words else None
    return partial(paged, q, k, v, out, lse, masks, target, **options)


def write_launch(head_dim: int, dtype: torch.dtype, words: list[str]) -> Launch:
    cached = next((DTYPES[word] for word in words if word in ("fp8", "int8")), dtype)
    k, v = (torch.empty(N, HKV, head_dim, dtype=dtype) for _ in "kv")
    gammas, slots = torch.empty(2, N, HKV), torch.empty(N, dtype=torch.int64)
    scales = torch.empty(2, 64, HKV, 64) if cached != dtype else (None, None)
    pages = cache(64, 64, head_dim, cached)
    return partial(write, k, v, *pages, slots, page_gate("written", 64, 64), *gammas, False, *scales)


def main() -> None:
    """Print the table of all cases, or of those for some targets and head dims."""
    parser = argparse.ArgumentParser(prog="python -m videoanchor_triton.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=[*HEAD_DIMS])
    asked = parser.parse_args()
    cases = [case for case in CASES if case[1] in asked.targets and case[2] in asked.head_dims]
    print(
        "kernel                          target   head_dim  dtype  registers  spills  local  shared  tensor-core   loop"
        "  buffers  ahead"
    )
    for used in compile_all(cases):
        buffers, ahead = ("-" if x is None else x for x in (used.buffers, used.ahead))
        print(
            f"{used.kernel:31} {used.target:8} {used.head_dim:8}  {used.dtype:5} {used.registers:10} {used.spills:7} "
            f"{used.local:6} {used.shared:7} {used.tensor_core:12} {used.instructions:6} {buffers:>8} {ahead:>6}"
        )


if __name__ == "__main__":
    main()
