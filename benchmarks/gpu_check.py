"""One command for a machine with a GPU: is every kernel right, and how fast is it beside what torch offers?

    python benchmarks/gpu_check.py --out DIR [--quick] [--device cpu]

Sections run in order and are written to DIR/gpu_check.json and DIR/gpu_check.csv after each. A row without a correct
result carries no time. `--device cpu` runs the same script in Triton's interpreter at tiny sizes, without times.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]
if any(argument.split("=")[-1] == "cpu" for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from oracle import Problem, compare, eager_attention, error  # noqa: E402  # pyright: ignore[reportMissingImports]
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

from videoanchor_triton.kernels.api import anchored_attention  # noqa: E402
from videoanchor_triton.kernels.reference import reference_attention  # noqa: E402

LAUNCH_SECONDS = 300
PROBES = {
    "prefill": Problem("first-prefill", queries=200, keys=300, head_dim=128, dtype=torch.bfloat16),
    "decode": Problem("first-decode", queries=1, keys=900, head_dim=128, dtype=torch.bfloat16),
}
HEAD_DIM = 128


@dataclass(frozen=True)
class Settings:
    """How the script was called."""

    device: str
    quick: bool

    @property
    def timed(self) -> bool:
        return self.device != "cpu"

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and KV heads of the timed problems."""
        return (28, 4) if self.timed else (4, 2)


@dataclass(frozen=True)
class Row:
    """One measurement. Times are milliseconds of CUDA events with the L2 cache flushed before each run."""

    section: str
    case: str
    contender: str
    error: float | None = None
    allowed: float | None = None
    correct: bool = False
    ms_p50: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    rate: float | None = None
    unit: str = ""
    peak_extra_mib: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Inputs:
    """A timed problem: q, k, v, the gates (1, Nk), and the flop or bytes that an ideal kernel spends."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    gamma_k: torch.Tensor
    gamma_v: torch.Tensor
    work: float
    unit: str


@cache
def first_launch(name: str, settings: Settings) -> str:
    """Launch a kernel for the first time in a process of its own; returns why that failed, or an empty string."""
    command = [sys.executable, __file__, "--probe", name, "--device", settings.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the first launch did not end within {LAUNCH_SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["exit without a message"])[-1]


def probe(name: str, settings: Settings) -> None:
    """Launch a kernel in both gate forms; what `first_launch` runs in the other process."""
    tensors, options = PROBES[name].make(torch.device(settings.device))
    for gate_form in ("log-bias", "post-exp"):
        anchored_attention(*tensors, **options, backend="triton", gate_form=gate_form)
    if settings.timed:
        torch.cuda.synchronize()


def problems(settings: Settings) -> Iterator[Problem]:
    """Random and adversarial problems, larger than the tests' where there is a GPU."""
    prefill = Problem("prefill", queries=300, keys=500, head_dim=128, dtype=torch.bfloat16)
    decode = Problem("decode", queries=1, keys=5000, head_dim=128, dtype=torch.bfloat16)
    if not settings.timed:
        prefill = replace(prefill, queries=40, keys=70, head_dim=32)
        decode = replace(decode, keys=90, head_dim=32)
    changes: list[tuple[str, dict]] = [
        ("ungated", {"gate": "none"}),
        ("per-batch gate", {}),
        ("per-head gate", {"gate": "per-head"}),
        ("gates shorter than keys", {"gate_keys": 33}),
        ("gate 0 on dominating keys", {"gate": "zero"}),
        ("gates up to 1e6", {"gate": "huge"}),
        ("logits * 1000", {"logits": 1000.0}),
        ("NaN in left padding", {"padding": "left-nan"}),
        ("all keys padded", {"padding": "all"}),
        ("window", {"window": 37}),
        ("strides of (B, N, H, D)", {"layout": "bnhd"}),
        ("GQA 7:1", {"query_heads": 7, "kv_heads": 1}),
    ]
    for base in (prefill, decode):
        for name, change in changes:
            yield replace(base, name=f"{base.name}, {name}", **change)
    yield replace(prefill, name="prefill, rows without a key", queries=prefill.keys, keys=prefill.queries)
    yield replace(decode, name="decode, 4 rows", queries=4)
    yield replace(decode, name="decode, 16 rows", queries=16)
    if settings.timed and not settings.quick:
        for base in (prefill, decode):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for head_dim in (16, 32, 64, 80, 96, 128, 256):
                    name = f"{base.name}, {str(dtype)[6:]}, D={head_dim}"
                    yield replace(base, name=name, head_dim=head_dim, dtype=dtype)


def correctness(settings: Settings) -> Iterator[Row]:
    """Both gate forms of prefill and decode against the fp64 specification."""
    broken = {name: first_launch(name, settings) for name in PROBES}
    for problem in problems(settings):
        for gate_form in ("log-bias", "post-exp") if problem.bounded else ("log-bias",):
            row = Row("correctness", problem.name, f"triton {gate_form}")
            if reason := broken[problem.name.split(",")[0]]:
                yield replace(row, reason=reason)
                continue
            tensors, options = problem.make(torch.device(settings.device))
            try:
                found = anchored_attention(*tensors, **options, backend="triton", gate_form=gate_form, return_lse=True)
                assert isinstance(found, tuple)
                worst = max(compare(found, tensors, options), key=lambda result: result[1] - result[2])
            except Exception as failure:
                yield replace(row, reason=_line(failure))
                continue
            yield replace(row, error=worst[1], allowed=worst[2], correct=worst[1] <= worst[2])


def prefill_times(settings: Settings) -> Iterator[Row]:
    """Causal prefill of one sequence."""
    lengths = (64,) if not settings.timed else (2048, 8192) if settings.quick else (2048, 8192, 32768)
    for length in lengths:
        yield from _times("prefill", length, length, settings)


def decode_times(settings: Settings) -> Iterator[Row]:
    """One query over a long cache."""
    lengths = (64,) if not settings.timed else (8192, 32768) if settings.quick else (8192, 32768, 131072)
    for length in lengths:
        yield from _times("decode", 1, length, settings)


def _times(section: str, queries: int, keys: int, settings: Settings) -> Iterator[Row]:
    if reason := first_launch(section, settings):
        yield Row(section, f"N={keys}", "triton", reason=reason)
        return
    inputs = _inputs(section, queries, keys, settings)
    query_heads, kv_heads = settings.heads
    case = f"B=1 Hq={query_heads} Hkv={kv_heads} D={HEAD_DIM} Nq={queries} Nk={keys} bf16"
    for name, (gated, make) in CONTENDERS.items():
        row = Row(section, case, name)
        try:
            yield _measure(row, make(inputs), inputs, gated, settings)
        except Exception as failure:
            yield replace(row, reason=_line(failure))
        if settings.timed:
            torch.cuda.empty_cache()


def _inputs(section: str, queries: int, keys: int, settings: Settings) -> Inputs:
    torch.manual_seed(0)
    query_heads, kv_heads = settings.heads
    q, k, v = (
        torch.randn(1, heads, length, HEAD_DIM, device=settings.device, dtype=torch.bfloat16)
        for heads, length in ((query_heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    scores = torch.rand(1, keys, device=settings.device)
    flop = 4 * query_heads * HEAD_DIM * keys * (keys + 1) / 2
    work, unit = (flop, "TFLOP/s") if section == "prefill" else (float(k.nbytes + v.nbytes), "TB/s")
    return Inputs((q, k, v), 1 + 9.5 * scores, 1 + 2.5 * scores, work, unit)


def _measure(row: Row, run: Callable[[], torch.Tensor], inputs: Inputs, gated: bool, settings: Settings) -> Row:
    """Check sampled query rows against fp64, then time."""
    before = 0
    if settings.timed:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = run()
    peak = (torch.cuda.max_memory_allocated() - before - out.nbytes) / 2**20 if settings.timed else None
    q, k, v = inputs.tensors
    offset = k.shape[2] - q.shape[2]
    wrong = eager_wrong = size = 0.0
    for i in sorted({0, q.shape[2] // 3, q.shape[2] // 2, q.shape[2] - 1}):
        end = i + offset + 1
        options: dict[str, Any] = (
            {"gamma_k": inputs.gamma_k[:, :end], "gamma_v": inputs.gamma_v[:, :end]} if gated else {}
        )
        tensors = (q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end])
        exact, _ = reference_attention(*tensors, **options)
        wrong = max(wrong, error(out[:, :, i : i + 1], exact) if out[:, :, i].isfinite().all() else float("inf"))
        eager_wrong = max(eager_wrong, error(eager_attention(*tensors, **options)[0], exact))
        size = max(size, exact.abs().max().item())
    allowed = 2 * eager_wrong + torch.finfo(out.dtype).eps * size
    row = replace(row, error=wrong, allowed=allowed, correct=wrong <= allowed)
    if not row.correct:
        return replace(row, reason="wrong result, not timed")
    if not settings.timed:
        return row
    times: Any = triton.testing.do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
    p50, p20, p80 = times
    rate = inputs.work / p50 / 1e9
    return replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80, rate=rate, unit=inputs.unit, peak_extra_mib=peak)


def _ours(backend: str, gate_form: str | None) -> Callable[[Inputs], Callable[[], torch.Tensor]]:
    def make(inputs: Inputs) -> Callable[[], torch.Tensor]:
        gates = {"gamma_k": inputs.gamma_k, "gamma_v": inputs.gamma_v, "gate_form": gate_form} if gate_form else {}

        def run() -> torch.Tensor:
            out = anchored_attention(*inputs.tensors, **gates, causal=True, backend=backend)
            assert isinstance(out, torch.Tensor)
            return out

        return run

    return make


def _sdpa_ungated(backend: SDPBackend) -> Callable[[Inputs], Callable[[], torch.Tensor]]:
    def make(inputs: Inputs) -> Callable[[], torch.Tensor]:
        square = inputs.tensors[0].shape[2] > 1

        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*inputs.tensors, is_causal=square, enable_gqa=True)

        return run

    return make


def _efficient_bias(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The memory-efficient kernel with log gamma_K expanded over the rows with stride 0, causal inside the kernel."""
    q, k, v = inputs.tensors
    group = q.shape[1] // k.shape[1]
    padded = F.pad(inputs.gamma_k.log().to(q.dtype), (0, -k.shape[2] % 8))
    bias = padded[:, None, None, : k.shape[2]].expand(-1, q.shape[1], q.shape[2], -1)

    def run() -> torch.Tensor:
        wide_k = k.repeat_interleave(group, 1)
        wide_v = (v * inputs.gamma_v[:, None, :, None]).to(v.dtype).repeat_interleave(group, 1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, wide_k, wide_v, bias, compute_log_sumexp=False, is_causal=q.shape[2] > 1
        )[0]

    return run


def _dense_mask(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """SDPA with the gate and the causal mask as one dense (1, 1, Nq, Nk) tensor, built before the clock starts."""
    q, k, v = inputs.tensors
    group = q.shape[1] // k.shape[1]
    mask = inputs.gamma_k.log().to(q.dtype)[:, None, None].repeat(1, 1, q.shape[2], 1)
    if q.shape[2] > 1:
        mask = mask.masked_fill_(torch.ones(mask.shape, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))

    def run() -> torch.Tensor:
        wide_k = k.repeat_interleave(group, 1)
        wide_v = (v * inputs.gamma_v[:, None, :, None]).to(v.dtype).repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)

    return run


def _flex(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlexAttention, compiled, with log gamma_K as a score change and a causal block mask."""
    q, k, v = inputs.tensors
    bias, offset = inputs.gamma_k[0].log(), k.shape[2] - q.shape[2]
    block_mask = create_block_mask(
        lambda _b, _h, i, j: i + offset >= j, None, None, q.shape[2], k.shape[2], device=q.device.type
    )
    attend = torch.compile(flex_attention, dynamic=False, backend="inductor" if q.is_cuda else "eager")

    def run() -> torch.Tensor:
        gated = (v * inputs.gamma_v[:, None, :, None]).to(v.dtype)
        out = attend(q, k, gated, lambda s, _b, _h, _i, j: s + bias[j], block_mask=block_mask, enable_gqa=True)
        assert isinstance(out, torch.Tensor)
        return out

    return run


Contender = tuple[bool, Callable[[Inputs], Callable[[], torch.Tensor]]]
CONTENDERS: dict[str, Contender] = {
    "ours, log-bias": (True, _ours("triton", "log-bias")),
    "ours, post-exp": (True, _ours("triton", "post-exp")),
    "ours, ungated": (False, _ours("triton", None)),
    "ours, sdpa backend, gated": (True, _ours("sdpa", "post-exp")),
    "SDPA flash, ungated": (False, _sdpa_ungated(SDPBackend.FLASH_ATTENTION)),
    "SDPA cuDNN, ungated": (False, _sdpa_ungated(SDPBackend.CUDNN_ATTENTION)),
    "SDPA efficient, expanded bias": (True, _efficient_bias),
    "SDPA, dense mask": (True, _dense_mask),
    "FlexAttention, gated": (True, _flex),
}
SECTIONS: list[Callable[[Settings], Iterator[Row]]] = [correctness, prefill_times, decode_times]


def _line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"[:200]


def environment(settings: Settings) -> dict[str, str]:
    """What the numbers depend on."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    on_gpu = settings.timed
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu, Triton interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
    }


def write(out: Path, settings: Settings, rows: list[Row]) -> None:
    """Write all rows so far."""
    out.mkdir(parents=True, exist_ok=True)
    content = environment(settings) | {"rows": [asdict(row) for row in rows]}
    (out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    with (out / "gpu_check.csv").open("w", newline="") as file:
        names = [*environment(settings), *(field.name for field in fields(Row))]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(environment(settings) | asdict(row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json and gpu_check.csv")
    parser.add_argument("--quick", action="store_true", help="fewer problems and sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--probe", choices=tuple(PROBES), help="launch one kernel and exit (used by the script itself)")
    arguments = parser.parse_args()
    settings = Settings(arguments.device, arguments.quick)
    if settings.timed and not torch.cuda.is_available():
        parser.error("no GPU is visible; --device cpu runs the script in Triton's interpreter")
    if not settings.timed:
        import interpreter_fixes  # pyright: ignore[reportMissingImports]

        interpreter_fixes.apply()
    if arguments.probe:
        probe(arguments.probe, settings)
        return 0
    if arguments.out is None:
        parser.error("--out is required")
    rows: list[Row] = []
    for section in SECTIONS:
        for row in section(settings):
            rows.append(row)
            time = f"{row.ms_p50:9.3f} ms {row.rate:8.2f} {row.unit}" if row.ms_p50 and row.rate else ""
            print(
                f"{'ok  ' if row.correct else 'FAIL'} {row.section:11} {row.case} | {row.contender} {time} {row.reason}"
            )
        write(arguments.out, settings, rows)
    ours = [row for row in rows if row.contender.startswith(("triton", "ours"))]
    return 0 if all(row.correct for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
