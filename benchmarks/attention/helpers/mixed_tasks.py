"""The section "mixed" of gpu_check.py: one call for prompts, chunks and decodes over pages, ours and other people's.

Also timed by themselves: the plan (the work list's own launch) and `write_pages`. What is done once a step of a model,
for all of its layers, is outside the clock where others do it (masks, block tables); our plan is inside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import videoanchor_triton as va
from benchmarks.attention.helpers import engines
from benchmarks.attention.helpers.contenders import Run
from benchmarks.attention.helpers.mixed import Batch, Held, MixedInputs, batch_list
from benchmarks.attention.helpers.settled import entry, key_of, values
from benchmarks.helpers.decisions import candidate_name, paged_rows
from benchmarks.helpers.measure import Task, full_size, judged, skip_for_memory, timed, with_peak
from benchmarks.helpers.record import SKIPPED, Row
from videoanchor_triton.kernels.api_paged import E4M3_TARGETS
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.plan import make_plan
from videoanchor_triton.kernels.tiles import paged_programs, paged_tile

FP8, INT8 = torch.float8_e4m3fn, torch.int8
VARIANTS = ("a2", "c")  # the batches that page sizes, quantised caches and softcap are timed with
CANDIDATES_RANK = 1
SCALE = 0.125  # of what a writer is given a scale for
WRITTEN_TOKENS = {True: (64, 2048, 16384), False: (5,)}


@dataclass(frozen=True)
class Caller:
    """A way to compute a mixed batch. `gate` says what it computes ("none", "written", "apart", "bias"), `variant` that
    it is timed with some batches only; `absence` why there is no row for a batch."""

    name: str
    gate: str
    make: Callable[[MixedInputs], Run]
    page: int | None = None
    held: Held | None = None
    softcap: float | None = None
    variant: bool = False
    absence: Callable[[Batch, torch.device], str] = lambda _batch, _device: ""


def mixed_tasks(device: torch.device) -> Iterator[Task]:
    """Ours and theirs for each batch, the plan by itself, other tiles; then writing."""
    for short, batch in batch_list(device).items():
        for caller in CALLERS:
            if not caller.variant or short in VARIANTS:
                yield Task(batch.row(caller.name), caller.name, measurement(batch, caller, device))
        yield Task(batch.row("ours, the plan alone"), "plan", partial(_plan_alone, batch, device))
        yield from _candidates(batch, device)
    for tokens in WRITTEN_TOKENS[full_size(device)]:
        for name, writer in WRITERS.items():
            if "fp8" in name and triton_target(device)[0] not in E4M3_TARGETS:
                continue
            row = Row("mixed", f"write {tokens} tokens", name, kv_heads=4, head_dim=128, keys=tokens)
            yield Task(row, name, partial(_writing, tokens, writer, device))


_held: dict[Batch, MixedInputs] = {}  # those of the batch that is being timed


def _inputs(batch: Batch, device: torch.device) -> MixedInputs:
    if batch not in _held:
        _held.clear()
        _held[batch] = MixedInputs(batch, device)
    return _held[batch]


def measurement(batch: Batch, caller: Caller, device: torch.device) -> Callable[[Row], Row]:
    """Check sampled rows against fp64, then time."""

    def measure(row: Row) -> Row:
        if reason := caller.absence(batch, device):
            return replace(row, status=SKIPPED, reason=reason)
        needed = 2 * batch.cache_bytes if batch not in _held or caller.held is not None else 0
        if skipped := skip_for_memory(row, needed, device):
            return skipped
        inputs = _inputs(batch, device)
        run = caller.make(inputs)
        out, peak = with_peak(run, device)
        row = inputs.judge(
            replace(row, peak_extra_mib=peak), out, caller.gate, caller.page or batch.page, caller.held, caller.softcap
        )
        halved = batch.unit == "TB/s" and caller.held is not None
        return timed(row, run, batch.work / (2 if halved else 1), batch.unit, device)

    return measure


def ours(form: str | None, page: int | None = None, held: Held | None = None, softcap: float | None = None) -> Any:
    """`anchored_attention_paged` with gates of a form, or none."""

    def make(inputs: MixedInputs) -> Run:
        size = page or inputs.batch.page
        k, v = inputs.pages(size)
        options: dict[str, Any] = {"gate_pages": _gates(inputs, form, size), "softcap": softcap, "backend": "triton"}
        if held is not None:
            codes, *scales = inputs.quantised(held)
            k, v = inputs.pages(size, codes)
            for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
                options[name] = scale.view(-1, size, inputs.kv_heads).transpose(1, 2) if held.per_token else scale
        return lambda: va.anchored_attention_paged(
            inputs.q, k, v, cu_seqlens_q=inputs.cu_seqlens_q, seqlens_k=inputs.seqlens_k,
            block_table=inputs.table(size), max_seqlen_q=max(inputs.batch.queries), **options,
        )  # fmt: skip

    return make


def _gates(inputs: MixedInputs, form: str | None, page: int) -> Any:
    if form is None:
        return None
    gates = va.gate_pages(inputs.slots // page, page, inputs.device, form=form)
    gamma_k, gamma_v = (x.view(-1, 1, page) for x in (inputs.gamma_k, inputs.gamma_v))
    gates.values.copy_(gamma_k if form == "written" else torch.stack([gamma_k.log2(), gamma_v], -1))
    return gates


def _by_position(inputs: MixedInputs) -> Run:
    """`anchored_attention_decode`: equal numbers of queries, gates by position in the sequence."""
    batch, table = inputs.batch, inputs.table(inputs.batch.page)
    k, v = inputs.pages(inputs.batch.page)
    q = inputs.q.view(len(batch.keys), batch.equal, *inputs.q.shape[1:]).transpose(1, 2)
    gamma_k, gamma_v = (torch.ones(len(batch.keys), max(batch.keys), device=inputs.device) for _ in range(2))
    for b, n in enumerate(batch.keys):
        slots = inputs.slots_of(b, inputs.batch.page, n)
        gamma_k[b, :n], gamma_v[b, :n] = inputs.gamma_k[slots], inputs.gamma_v[slots]

    def run() -> torch.Tensor:
        out = va.anchored_attention_decode(
            q, k, v, inputs.seqlens_k, table, gamma_k=gamma_k, gamma_v=gamma_v, backend="triton"
        )
        return out.transpose(1, 2).flatten(0, 1)

    return run


def _dense_question(inputs: MixedInputs) -> Run:
    """`anchored_attention` of a few queries over keys that lie in order."""
    k, v = (x.contiguous() for x in inputs.keys_and_values(0, inputs.batch.page))
    slots, q = inputs.slots_of(0, inputs.batch.page, inputs.batch.keys[0]), inputs.q.transpose(0, 1)[None]
    gates: dict[str, Any] = {"gamma_k": inputs.gamma_k[slots], "gamma_v": inputs.gamma_v[slots]}

    def run() -> torch.Tensor:
        return va.anchored_attention(q, k, v, causal=True, backend="triton", **gates)[0].transpose(0, 1)

    return run


def _plan_alone(batch: Batch, device: torch.device, row: Row) -> Row:
    """One launch of one program; right where it holds as many items as there are row blocks, up to the last key."""
    inputs, most = _inputs(batch, device), max(batch.queries)
    target = key_of(device, batch.head_dim)[0]
    tile = paged_tile(target, batch.head_dim, 2, most * batch.group)

    def run() -> Any:
        return make_plan(
            inputs.cu_seqlens_q, inputs.seqlens_k, sequences=len(batch.keys), queries=most,
            total_queries=sum(batch.queries), keys=inputs.table(batch.page).shape[1] * batch.page,
            kv_heads=inputs.kv_heads, group=batch.group, rows=tile.queries, tile_keys=tile.keys,
            programs=paged_programs(target, device, tile), causal=True, window=None, device=device,
        )  # fmt: skip

    items = run().items
    items = items[items[:, 7] > 0]
    blocks = inputs.kv_heads * sum(-(-n * batch.group // tile.queries) for n in batch.queries)
    missing = abs(len(items) - blocks) + abs(int(items[:, 4].max()) - max(batch.keys))
    return replace(timed(judged(row, float(missing), 0.0), run, 0.0, "", device), rate=None)


def _writing(tokens: int, writer: Callable[..., Any], device: torch.device, row: Row) -> Row:
    """Time a writer of 28/4 heads' keys and values into random slots, and compare what lies there afterwards."""
    torch.manual_seed(0)
    heads, head_dim, page = (4, 128, 16) if full_size(device) else (2, 16, 4)
    k, v = (torch.randn(tokens, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    pages = -(-2 * tokens // page)
    slots = torch.randperm(pages * page, device=device)[:tokens]
    gammas = {"gamma_k": 1 + torch.rand(tokens, device=device), "gamma_v": 1 + torch.rand(tokens, device=device)}
    run, found = writer(k, v, slots, pages, page, gammas)
    run()
    mine, exact, allowed = found()
    row = judged(row, (mine.double() - exact.double()).abs().max().item(), allowed)
    return timed(row, run, float(2 * k.nbytes + 2 * v.nbytes), "TB/s", device)


def _written_by(form: str | None, held: Held | None = None) -> Callable[..., Any]:
    def prepare(
        k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: int, page: int, gammas: dict[str, torch.Tensor]
    ) -> tuple[Run, Callable[[], Any]]:
        heads, head_dim = k.shape[1:]
        dtype = k.dtype if held is None else held.dtype
        k_pages, v_pages = torch.zeros(pages, heads, page, 2 * head_dim, device=k.device, dtype=dtype).chunk(2, -1)
        gates = None if form is None else va.gate_pages(pages, page, k.device, form=form)
        options: dict[str, Any] = {} if form is None else dict(gammas)
        size = (pages, heads, page) if held is not None and held.per_token else (1,)
        if held is not None:
            options |= {name: torch.full(size, SCALE, device=k.device) for name in ("k_scale", "v_scale")}
        written = form == "written"

        def run() -> Any:
            return va.write_pages(k, v, k_pages, v_pages, slots, gates, **options)

        def found() -> tuple[torch.Tensor, torch.Tensor, float]:
            factor = (gammas["gamma_k"] * gammas["gamma_v"])[:, None, None] if written else 1
            exact = torch.cat([k.double(), v.double() * factor], -1)
            place, of_both = (slots // page, slice(None), slots % page), []
            for name, x in (("k_scale", k_pages), ("v_scale", v_pages)):
                of_slots = (
                    options[name][place][..., None] if held is not None and held.per_token else options.get(name, 1)
                )
                of_both.append(x.float()[place] * of_slots)
            mine = torch.cat(of_both, -1)
            # half a step of what the cache holds: a part of the largest number, or of a given scale
            step = 2.0**-8 if held is None else 2.0**-3 if held.dtype == FP8 else 1 / 127 if held.per_token else 0.0
            return mine, exact, 0.505 * (step * exact.abs().max().item() or SCALE)

        return run, found

    return prepare


def _index_put(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: int, page: int, _gammas: dict[str, torch.Tensor]
) -> tuple[Run, Callable[[], Any]]:
    k_pages, v_pages = (torch.zeros(pages, page, *k.shape[1:], device=k.device, dtype=k.dtype) for _ in range(2))

    def run() -> Any:
        k_pages.view(-1, *k.shape[1:])[slots] = k
        v_pages.view(-1, *v.shape[1:])[slots] = v

    return run, lambda: (v_pages.view(-1, *v.shape[1:])[slots], v, 0.0)


def _only(equal: range) -> Callable[[Batch, torch.device], str]:
    def absence(batch: Batch, _device: torch.device) -> str:
        return "" if batch.equal in equal else f"takes sequences of equally many queries, up to {equal[-1]}"

    return absence


def _question_only(batch: Batch, _device: torch.device) -> str:
    return "" if len(batch.keys) == 1 and batch.equal > 1 else "for one sequence of several queries"


def _module(name: str, equal: bool = False) -> Callable[[Batch, torch.device], str]:
    def absence(batch: Batch, _device: torch.device) -> str:
        if equal and not batch.equal:
            return "takes sequences of equally many queries"
        return engines.absence(name)

    return absence


def _with_fp8(_batch: Batch, device: torch.device) -> str:
    return "the device has no float8_e4m3fn" if triton_target(device)[0] not in E4M3_TARGETS else ""


def _variants() -> Iterator[Caller]:
    for page in (16, 1):
        yield Caller(f"ours, written, pages of {page}", "written", ours("written", page), page, variant=True)
    yield Caller("ours, written, softcap", "written", ours("written", softcap=30.0), softcap=30.0, variant=True)
    for dtype, name in ((FP8, "fp8"), (INT8, "int8")):
        for per_token, of in ((False, "tensor"), (True, "token")):
            held = Held(dtype, per_token)
            for form in ("written", None):
                gate = form or "none"
                yield Caller(
                    f"ours, {name} per {of}, {form or 'ungated'}", gate, ours(form, held=held), held=held, variant=True,
                    absence=_with_fp8 if dtype == FP8 else lambda _batch, _device: "",
                )  # fmt: skip


CALLERS = (
    Caller("ours, written", "written", ours("written")),
    Caller("ours, apart", "apart", ours("apart")),
    Caller("ours, ungated", "none", ours(None)),
    Caller("ours, by position", "apart", _by_position, absence=_only(range(1, 17))),
    Caller("ours, by position, no pages", "apart", _dense_question, absence=_question_only),
    *_variants(),
    Caller("SDPA by sequence, ungated", "none", engines.sdpa_by_sequence(False)),
    Caller("SDPA by sequence, gated", "bias", engines.sdpa_by_sequence(True)),
    Caller("flash-attn varlen, ungated", "none", engines.flash_attn_varlen, absence=_module("flash_attn")),
    Caller("flash-attn kvcache, ungated", "none", engines.flash_attn_cache, absence=_module("flash_attn", equal=True)),
    Caller(
        "vLLM Triton, ungated", "none", engines.vllm_unified, page=engines.VLLM_PAGE, absence=_module(engines.VLLM)
    ),
    Caller(
        "FlexAttention paged, gated", "bias", engines.paged_flex(True), absence=_module(engines.PAGED_FLEX, equal=True)
    ),
    Caller(
        "FlexAttention paged, ungated", "none", engines.paged_flex(False),
        absence=_module(engines.PAGED_FLEX, equal=True),
    ),
)  # fmt: skip
WRITERS = {
    "ours, write_pages, no gates": _written_by(None),
    "ours, write_pages, written": _written_by("written"),
    "ours, write_pages, apart": _written_by("apart"),
    "ours, write_pages, written, int8 per token": _written_by("written", Held(INT8, True)),
    "ours, write_pages, int8 per tensor": _written_by(None, Held(INT8, False)),
    "ours, write_pages, fp8 per token": _written_by(None, Held(FP8, True)),
    "torch index_put, no gates": _index_put,
}


def _candidates(batch: Batch, device: torch.device) -> Iterator[Task]:
    """`ours, written` with each other tile for the batch's rows."""
    target, head_dim = key_of(device, batch.head_dim)
    key = (target, head_dim, paged_rows(max(batch.queries) * batch.group))
    for value in values("PAGED", key):

        def make(inputs: MixedInputs, value: Any = value) -> Run:
            run = ours("written")(inputs)

            def run_with_it() -> torch.Tensor:
                with entry("PAGED", key, value):
                    return run()

            return run_with_it

        name = candidate_name("PAGED", value)
        yield Task(batch.row(name), name, measurement(batch, Caller(name, "written", make), device), CANDIDATES_RANK)
