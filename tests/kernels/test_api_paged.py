"""Attention of packed queries over a paged cache through the public calls, against fp64 and against dense calls."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_batches import E4M3, INT8, NAN, Batch, assert_as_exact
from torch._dynamo.testing import CompileCounter

from videoanchor_triton.kernels import self_check, validation_paged
from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.api_paged import anchored_attention_paged, write_pages
from videoanchor_triton.kernels.gate_pages import gate_pages
from videoanchor_triton.kernels.tolerance import Result

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("triton", "sdpa", "reference")
BF16, FP16 = torch.bfloat16, torch.float16


def attend(given: dict[str, Any], backend: str, **change: Any) -> Result:
    found = anchored_attention_paged(**(given | change), backend=backend, return_lse=True)
    assert isinstance(found, tuple)
    return found


BATCHES = [
    Batch("ungated", form=None),
    Batch("ungated-bf16-sinks-softcap", form=None, dtype=BF16, sinks=True, softcap=5.0, head_dim=72),
    Batch("written"),
    Batch("written-gates-of-heads-bf16", gate_heads=2, dtype=BF16, page_size=48),
    Batch("written-fp16-window-rows-of-heads", dtype=FP16, window=9, layout="rows", page_size=8),
    Batch("written-sinks-not-causal", sinks=True, causal=False, page_size=3),
    Batch("written-padding-rows-pages-of-1", spare=7, page_size=1, keys=(9, 12, 30)),
    Batch("written-shared-pages-7-heads", shared=2, query_heads=7, kv_heads=1, keys=(45, 33, 40)),
    Batch("apart", form="apart"),
    Batch("apart-extreme-gates", form="apart", extreme=True, gate_heads=2),
    Batch("apart-extreme-gates-bf16-window-sinks", form="apart", extreme=True, dtype=BF16, window=9, sinks=True),
    Batch("empty-sequences", queries=(0, 3, 0, 2), keys=(0, 40, 17, 0), spare=2),
    Batch("more-queries-than-keys", queries=(9, 4), keys=(5, 0), sinks=True),
    Batch("no-sequence", queries=(), keys=(), spare=3),
    Batch("e4m3-ungated-bf16", form=None, cache=E4M3, dtype=BF16),
    Batch("e4m3-written", cache=E4M3),
    Batch("e4m3-written-per-token-bf16", cache=E4M3, per_token=True, dtype=BF16),
    Batch("e4m3-apart-per-token", form="apart", cache=E4M3, per_token=True, gate_heads=2),
    Batch("int8-ungated-per-token-fp16", form=None, cache=INT8, per_token=True, dtype=FP16),
    Batch("int8-written-per-token-sinks", cache=INT8, per_token=True, sinks=True, page_size=8),
    Batch("int8-apart-per-token-bf16", form="apart", cache=INT8, per_token=True, gate_heads=2, dtype=BF16),
    Batch("int8-apart", form="apart", cache=INT8, layout="rows"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_as_exact_as_eager(batch: Batch, backend: str, device: torch.device) -> None:
    given = batch.make(device)
    assert_as_exact(attend(given, backend), given)


class Engine:
    """A cache and its requests, as a serving engine keeps them: blocks are handed out, taken back and shared."""

    def __init__(
        self, device: torch.device, backend: str, form: str | None = "written", dtype: torch.dtype = torch.float32,
        cache: torch.dtype | None = None, per_token: bool = False, pages: int = 16, page_size: int = 8,
    ) -> None:  # fmt: skip
        self.device, self.backend, self.page_size = device, backend, page_size
        shape = pages, 2, page_size, 32
        whole = torch.full((*shape[:3], 64), NAN, device=device).to(cache or dtype)
        k_pages, v_pages = whole.split(32, -1)
        self.pages: dict[str, Any] = {"k_pages": k_pages, "v_pages": v_pages}
        heads = 2 if per_token else 1
        self.pages["gate_pages"] = None if form is None else gate_pages(pages, page_size, device, form, heads)
        if cache is not None:
            top = 448 if cache == E4M3 else 127
            for name, most in (("k_scale", 4), ("v_scale", 4 if form == "apart" else 100)):
                of_tensor = torch.tensor(most / top, device=device)
                self.pages[name] = torch.full(shape[:3], NAN, device=device) if per_token else of_tensor
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()

    def step(self, parts: list[tuple["Request", int]], spare: int = 0) -> list[Result]:
        """Write the next tokens of each request and attend to them, all in one call of each."""
        slots, lengths = [], []
        spans = []
        for request, count in parts:
            span = slice(request.done, request.done + count)
            spans.append(span)
            while len(request.blocks) * self.page_size < span.stop:
                request.blocks.append(self.free.pop())
            slots += [
                request.blocks[n // self.page_size] * self.page_size + n % self.page_size
                for n in range(span.start, span.stop)
            ]
            request.done = span.stop
            lengths.append(span.stop)

        def joined(name: str) -> torch.Tensor:
            rows = torch.cat([getattr(request, name)[span] for (request, _), span in zip(parts, spans, strict=True)])
            return torch.cat([rows, torch.full((spare, *rows.shape[1:]), NAN, dtype=rows.dtype)]).to(self.device)

        gated = self.pages["gate_pages"] is not None
        gates: dict[str, Any] = {name: joined(name) for name in ("gamma_k", "gamma_v")} if gated else {}
        mapping = torch.tensor(slots + [-1] * spare, device=self.device)
        write_pages(joined("k"), joined("v"), **self.pages, slot_mapping=mapping, **gates, backend=self.backend)
        most = max(len(request.blocks) for request, _ in parts)
        table = [request.blocks + [-1] * (most - len(request.blocks)) for request, _ in parts]
        offsets = torch.tensor([0, *(count for _, count in parts)]).cumsum(0)
        out, lse = anchored_attention_paged(
            joined("q").nan_to_num(),
            **self.pages,
            cu_seqlens_q=offsets.int().to(self.device),
            seqlens_k=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            block_table=torch.tensor(table, dtype=torch.int32, device=self.device),
            max_seqlen_q=max(count for _, count in parts),
            return_lse=True,
            backend=self.backend,
        )
        assert not out[offsets[-1] :].any()
        counts = [count for _, count in parts]
        ends = offsets[-1]
        return list(zip(out[:ends].split(counts), lse[:ends].split(counts), strict=True))

    def preempt(self, request: "Request") -> None:
        self.free = request.blocks + self.free
        request.blocks, request.done = [], 0


class Request:
    """A sequence of tokens with gates, of which `done` are in the blocks."""

    def __init__(self, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(tokens, 4, 32, generator=generator).to(dtype)
        self.k, self.v = (torch.randn(tokens, 2, 32, generator=generator).to(dtype) for _ in range(2))
        self.gamma_k = 1 + 9.5 * torch.rand(tokens, generator=generator)
        self.gamma_v = 1 + 2.5 * torch.rand(tokens, generator=generator)
        self.blocks: list[int] = []
        self.done = 0

    def dense(self, gated: bool = True) -> Result:
        """All of it by one dense call in fp64."""
        heads_first = (x.transpose(0, 1)[None].double() for x in (self.q, self.k, self.v))
        gates = {"gamma_k": self.gamma_k, "gamma_v": self.gamma_v} if gated else {}
        out, lse = anchored_attention(*heads_first, **gates, causal=True, return_lse=True, backend="reference")
        return out[0].transpose(0, 1), lse[0].T


def assert_near(parts: list[Result], dense: Result, tolerance: float = 3e-5) -> None:
    for found, exact in zip(zip(*parts, strict=True), dense, strict=True):
        torch.testing.assert_close(torch.cat(found).cpu().double(), exact.cpu().double(), rtol=0, atol=tolerance)


# form, dtype, cache, scales of tokens, what the order of sums and one rounding of outputs and V' may make of it
CACHES = [
    pytest.param(None, torch.float32, None, False, 3e-5, id="ungated"),
    pytest.param("written", torch.float32, None, False, 3e-5, id="written"),
    pytest.param("apart", torch.float32, None, False, 3e-5, id="apart"),
    pytest.param("written", BF16, None, False, 6e-2, id="written-bf16"),
    pytest.param("apart", FP16, None, False, 1e-2, id="apart-fp16"),
    pytest.param("written", torch.float32, E4M3, False, 3e-5, id="written-e4m3"),
    pytest.param("written", torch.float32, INT8, True, 3e-5, id="written-int8-per-token"),
    pytest.param("apart", torch.float32, E4M3, True, 3e-5, id="apart-e4m3-per-token"),
]


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(("form", "dtype", "cache", "per_token", "tolerance"), CACHES)
def test_chunks_and_steps_are_the_whole_prefill(
    form: str | None, dtype: torch.dtype, cache: torch.dtype | None, per_token: bool, tolerance: float, backend: str,
    device: torch.device,
) -> None:  # fmt: skip
    """Prefills in chunks, decodes beside them, rows of padding: a request's rows are those of one call for all of it.

    Of a dense call in fp64, and where the cache is quantised of one over a cache that holds the same numbers.
    """
    engine = Engine(device, backend, form, dtype, cache, per_token)
    first, second = Request(30, 1, dtype), Request(21, 2, dtype)
    a = [engine.step([(first, 11)], spare=2)[0]]
    b = []
    for counts in ((1, 13), (17, 1), (1, 7)):
        of_first, of_second = engine.step([(first, counts[0]), (second, counts[1])], spare=counts[0] % 5)
        a.append(of_first)
        b.append(of_second)
    if cache is None:
        whole = first.dense(form is not None), second.dense(form is not None)
    else:
        for request in (first, second):
            engine.preempt(request)
        whole = engine.step([(first, 30), (second, 21)])
    assert_near(a, whole[0], tolerance)
    assert_near(b, whole[1], tolerance)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("form", ["written", "apart"])
def test_a_shared_prefix_brings_its_gates(form: str, backend: str, device: torch.device) -> None:
    engine = Engine(device, backend, form)
    first, second = Request(25, 1), Request(23, 2)
    for name in ("k", "v", "gamma_k", "gamma_v"):
        getattr(second, name)[:16] = getattr(first, name)[:16]
    alone = engine.step([(first, 25)])
    second.blocks, second.done = first.blocks[:2], 16
    shared = engine.step([(second, 7)])
    assert_near(alone, first.dense())
    out, lse = second.dense()
    assert_near(shared, (out[16:], lse[16:]))


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("form", ["written", "apart"])
def test_preempted_blocks_are_gated_anew(form: str, backend: str, device: torch.device) -> None:
    """Blocks that held a request with gates serve others, then the request again, in other blocks."""
    engine = Engine(device, backend, form, pages=4)
    first, second, plain = Request(27, 1), Request(15, 2), Request(14, 3)
    engine.step([(first, 27)])
    engine.preempt(first)
    plain.gamma_k, plain.gamma_v = torch.ones(2, 14)
    found = engine.step([(second, 15), (plain, 14)])
    assert_near(found[:1], second.dense())
    assert_near(found[1:], plain.dense(gated=False))
    engine.preempt(second)
    engine.preempt(plain)
    assert_near(engine.step([(first, 27)]), first.dense())


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_where_it_is(backend: str, device: torch.device) -> None:
    given = Batch("out", spare=2).make(device)
    wanted, _ = attend(given, backend)
    place = torch.full((*given["q"].shape[:2], 64), NAN, device=device)[..., 16:48]
    assert anchored_attention_paged(**given, out=place, backend=backend) is place
    assert torch.equal(place, wanted)


def test_no_query(device: torch.device) -> None:
    given = Batch("no-query", queries=(0, 0), keys=(3, 0)).make(device)
    for backend in BACKENDS:
        out, lse = attend(given, backend)
        assert out.shape == (0, 4, 32)
        assert lse.shape == (0, 4)


CHEAP = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("lse", [True, False], ids=["lse", "out-only"])
def test_opcheck_of_pages(lse: bool, device: torch.device) -> None:
    from videoanchor_triton.kernels.ops_paged import paged_op

    given = Batch("opcheck", queries=(1, 3), keys=(5, 9), page_size=8, head_dim=16, query_heads=2).make(device)
    names = ("q", "k_pages", "v_pages", "cu_seqlens_q", "seqlens_k", "block_table", "max_seqlen_q")
    out = torch.empty_like(given["q"])
    rows = torch.empty(out.shape[1::-1], device=device).T if lse else None
    arguments = (
        *(given[name] for name in names),
        *given["gate_pages"],
        None,
        None,
        None,
        out,
        rows,
        0.25,
        True,
        None,
        None,
    )
    if lse:
        torch.library.opcheck(paged_op, arguments)
    else:
        torch.library.opcheck(paged_op, arguments, test_utils=CHEAP)


@pytest.mark.parametrize("form", ["written", "apart"])
def test_opcheck_of_writing(form: str, device: torch.device) -> None:
    from videoanchor_triton.kernels.ops_paged import write_op

    k = torch.ones(3, 2, 16, device=device)
    pages = torch.zeros(2, 4, 2, 8, 16, dtype=INT8, device=device)
    scales = torch.ones(2, 4, 2, 8, device=device)
    gates, gamma = gate_pages(4, 8, device, form, 2), torch.ones(3, device=device)
    slots = torch.tensor([3, -1, 17], device=device)
    torch.library.opcheck(write_op, (k, k + 1, *pages, slots, *gates, gamma, None, False, *scales))


def test_compiles_without_a_break_and_once_for_changing_batches(device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(given: dict[str, Any], out: torch.Tensor) -> Result:
        k = given["q"][:, :2] * 1.0
        slots = torch.full((k.shape[0],), -1, device=k.device)
        write_pages(k, k, given["k_pages"], given["v_pages"], slots, given["gate_pages"], backend="triton")
        return anchored_attention_paged(**given, out=out, return_lse=True, backend="triton")

    for queries, keys in (((1, 9), (20, 30)), ((4, 12), (33, 12)), ((2, 2), (60, 70))):
        given = Batch("compiled", queries, keys).make(device)
        out = torch.full_like(given["q"], NAN)
        found, lse = compiled(given, out)
        assert_as_exact((found, lse), given)
        assert torch.equal(found, out)
    assert counter.frame_count <= 2


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> dict[self_check.Variant, bool]:
    """Those of the test, in which first calls are checked."""
    monkeypatch.setenv(self_check.SWITCH, "first")
    found: dict[self_check.Variant, bool] = {}
    monkeypatch.setattr(self_check, "_right", found)
    return found


@pytest.mark.parametrize("batch", BATCHES[::2], ids=str)
def test_self_check_passes_what_is_right(
    batch: Batch, device: torch.device, verdicts: dict[self_check.Variant, bool]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", module="triton")
        attend(batch.make(device), "triton")
    judged = sum(batch.keys) > 0 and batch.name != "more-queries-than-keys"
    assert list(verdicts.values()) == ([True] if judged else list(verdicts.values()))
    assert {variant[0] for variant in verdicts} <= {"paged"}


@pytest.mark.parametrize("name", ["written", "e4m3-apart-per-token", "ungated-bf16-sinks-softcap"])
def test_self_check_answers_for_what_is_wrong(
    name: str, device: torch.device, verdicts: dict[self_check.Variant, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    from videoanchor_triton.kernels import ops_paged

    right = ops_paged.paged

    def wrong(q: torch.Tensor, *tensors: Any, **options: Any) -> None:
        right(1.1 * q, *tensors, **options)

    monkeypatch.setattr(ops_paged, "paged", wrong)
    given = next(batch for batch in BATCHES if batch.name == name).make(device)
    with pytest.warns(RuntimeWarning, match="a Triton kernel gave wrong results"):
        found = attend(given, "triton")
    assert_as_exact(found, given)
    assert list(verdicts.values()) == [False]
    out = anchored_attention_paged(**given, backend="triton")
    assert torch.equal(out, found[0])


def test_a_length_beyond_the_table_gives_nan(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not looked at, as on a GPU."""
    monkeypatch.setattr(validation_paged, "values_are_free", lambda _: False)
    given = replace(Batch("beyond"), queries=(1, 2), keys=(5, 9), page_size=8).make(device)
    capacity = 8 * given["block_table"].shape[1]
    given["seqlens_k"][0] = capacity + 1
    out, lse = attend(given, "triton")
    assert out[:1].isnan().all()
    assert lse[:1].isnan().all()
    assert out[1:].isfinite().all()
    given["seqlens_k"][0] = -1
    assert attend(given, "triton")[0][:1].isnan().all()
