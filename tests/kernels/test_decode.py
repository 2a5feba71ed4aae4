"""Decode over contiguous and paged caches, whose lengths lie on the device."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_results_as_exact_as_eager
from torch._dynamo.testing import CompileCounter

from videoanchor_triton.kernels.api_cache import anchored_attention_decode
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import Result, eager_attention, fp32_roundings

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("triton", "sdpa")
NAN, INF = float("nan"), float("inf")
GARBAGE = (-1, 2**31 - 1, -(2**31))


@dataclass(frozen=True)
class Cached:
    """Named decode problem; `make` draws its tensors from a seed of the name, NaN wherever no sequence may look."""

    name: str
    lengths: tuple[int, ...] = (70, 5)
    capacity: int = 96
    page_size: int | None = None
    queries: int = 1
    query_heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    gate: str = "per-batch"
    gate_keys: int | None = None
    layout: str = "hnd"
    shared_pages: int = 0
    logits: float = 1.0

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments of `anchored_attention_decode`."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        batch = len(self.lengths)
        shape = (batch, self.kv_heads, self.capacity, self.head_dim)
        q = torch.randn(batch, self.query_heads, self.queries, self.head_dim, generator=generator) * self.logits
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if self.gate != "none":
            options |= self._gates(generator)
        beyond = torch.arange(self.capacity) >= lengths[:, None]
        k, v = (x.masked_fill(beyond[:, None, :, None], NAN) for x in (k, v))
        if self.gate == "zero":
            k[:, :, ::2] *= 100
        table = None
        if self.page_size is not None:
            k, v, table = self._pages(k, v, generator)
        k, v = (x.to(device, self.dtype) for x in (k, v))
        if self.layout == "nhd":
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        tensors = q.to(device, self.dtype), k, v, lengths.to(device), table if table is None else table.to(device)
        return tensors, {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    def _gates(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = len(self.lengths)
        n = self.capacity if self.gate_keys is None else self.gate_keys
        leading = {"shared": (), "per-head": (batch, self.kv_heads)}.get(self.gate, (batch,))
        gamma_k = 1 + 9.5 * torch.rand(*leading, n, generator=generator)
        gamma_v = 1 + 2.5 * torch.rand(*leading, n, generator=generator)
        if self.gate == "zero":
            gamma_k[:, ::2] = 0
        elif self.gate == "all-zero":
            gamma_k.zero_()
        elif self.gate == "huge":
            gamma_k = 10.0 ** (6 * torch.rand(*leading, n, generator=generator))
        if len(leading) > 0:
            for b, length in enumerate(self.lengths):
                gamma_k[b, ..., length:] = gamma_v[b, ..., length:] = 1e30
        gamma_q = 1 + 4 * torch.rand(batch, self.queries, generator=generator)
        return {"gamma_k": gamma_k, "gamma_v": gamma_v, "gamma_q": gamma_q}

    def _pages(
        self, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scatter contiguous caches over shuffled pages. The first `shared_pages` of sequence 0 serve all sequences."""
        size = self.page_size
        assert size is not None
        assert self.capacity % size == 0
        most = self.capacity // size
        order = torch.randperm(len(self.lengths) * most + 3, generator=generator).tolist()
        paged_k, paged_v = (torch.full((len(order), self.kv_heads, size, self.head_dim), NAN) for _ in range(2))
        table = torch.tensor([[GARBAGE[(b + i) % 3] for i in range(most)] for b in range(len(self.lengths))])
        for b, length in enumerate(self.lengths):
            for i in range(-(-length // size)):
                if b > 0 and i < self.shared_pages:
                    table[b, i] = table[0, i]
                    continue
                table[b, i] = order.pop()
                for pages, cache in ((paged_k, k), (paged_v, v)):
                    pages[table[b, i]] = cache[b, :, i * size : (i + 1) * size]
        return paged_k, paged_v, table.int()


def each_alone(attend: Any, tensors: tuple[Any, ...], options: dict[str, Any]) -> Result:
    """A dense implementation, called for each sequence on the keys that its length and its table name."""
    q, k_cache, v_cache, lengths, table = tensors
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        if table is None:
            k, v = k_cache[b, :, :length], v_cache[b, :, :length]
        else:
            size = k_cache.shape[2]
            places = [(int(table[b, n // size]), n % size) for n in range(length)]
            k, v = (
                torch.stack([cache[page, :, n] for page, n in places], 1) if places else cache[0, :, :0]
                for cache in (k_cache, v_cache)
            )
        alone = dict(options)
        for name in ("gamma_k", "gamma_v", "gamma_q"):
            if name in options:
                gate = options[name] if options[name].dim() == 1 else options[name][b : b + 1]
                alone[name] = gate if name == "gamma_q" else gate[..., :length]
        out, lse = attend(q[b : b + 1], k[None], v[None], **alone)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def attend(tensors: tuple[Any, ...], options: dict[str, Any], backend: str) -> Result:
    found = anchored_attention_decode(*tensors, **options, backend=backend, return_lse=True)
    assert isinstance(found, tuple)
    return found


def assert_each_as_exact_as_eager(found: Result, tensors: tuple[Any, ...], options: dict[str, Any]) -> None:
    forms = reference_attention, eager_attention, fp32_roundings
    assert_results_as_exact_as_eager(found, *(each_alone(form, tensors, options) for form in forms))


CONTIGUOUS = [
    Cached("ungated", gate="none"),
    Cached("gqa-4-to-2", query_heads=4, kv_heads=2),
    Cached("lengths-0-and-1", (0, 1, 40)),
    Cached("all-lengths-0", (0, 0)),
    Cached("at-capacity", (96, 95)),
    Cached("at-tile-edges", (32, 33, 63, 64), 64),
    Cached("many-splits", (1500, 700), 1600, head_dim=16),
    Cached("4-queries", (70, 4), queries=4),
    Cached("4-queries-not-causal", (70, 4), queries=4, causal=False),
    Cached("16-queries", (70, 16), queries=16),
    Cached("16-queries-not-causal", (33, 70), queries=16, causal=False),
    Cached("fewer-keys-than-queries", (3, 0, 1, 50), queries=4),
    Cached("fewer-keys-than-queries-not-causal", (3, 0), queries=4, causal=False),
    Cached("gqa-7-to-1", query_heads=7),
    Cached("gqa-7-to-1-16-queries", (70,), queries=16, query_heads=7),
    Cached("mha", query_heads=3, kv_heads=3, queries=2),
    Cached("gate-shared", gate="shared"),
    Cached("gate-per-head", gate="per-head", kv_heads=2),
    Cached("gates-shorter-than-keys", gate_keys=41),
    Cached("gates-per-head-shorter-than-keys", gate="per-head", gate_keys=3, kv_heads=2),
    Cached("gates-of-length-0", gate_keys=0),
    Cached("gate-0-on-dominating-keys", gate="zero"),
    Cached("all-gates-0", gate="all-zero"),
    Cached("gates-up-to-1e6", gate="huge", dtype=torch.bfloat16),
    Cached("window", (70, 5), queries=3, window=11),
    Cached("window-of-1", window=1),
    Cached("window-within-one-sequence-only", (700, 20), 704, window=300, head_dim=16),
    Cached("softcap", softcap=1.5, logits=4.0),
    Cached("softcap-window", softcap=1.5, logits=4.0, window=30, queries=4, dtype=torch.bfloat16),
    Cached("logits-times-1000", logits=1000.0),
    Cached("head-dim-64", head_dim=64, queries=2),
    Cached("head-dim-80", head_dim=80, queries=2, dtype=torch.float16),
    Cached("head-dim-128", head_dim=128, dtype=torch.bfloat16),
    Cached("fp16", dtype=torch.float16, queries=4),
    Cached("bf16", dtype=torch.bfloat16),
    Cached("nhd-strides", layout="nhd", query_heads=4, kv_heads=2),
]
PAGED = [
    Cached("pages-of-16", (70, 5), page_size=16, query_heads=4, kv_heads=2),
    Cached("pages-of-64", (100, 64), 192, page_size=64),
    Cached("pages-of-256", (300, 20), 512, page_size=256, head_dim=16),
    Cached("page-edges", (0, 1, 15, 16, 17, 32), page_size=16, head_dim=16),
    Cached("page-edges-of-64", (63, 64, 65, 128), 128, page_size=64, head_dim=16),
    Cached("pages-at-capacity", (96, 96), page_size=16),
    Cached("pages-shared-by-two", (70, 50), page_size=16, shared_pages=2),
    Cached("pages-with-many-splits", (900, 33), 1024, page_size=16, head_dim=16),
    Cached("pages-4-queries", (70, 4), page_size=16, queries=4),
    Cached("pages-16-queries-not-causal", (70, 9), page_size=16, queries=16, causal=False),
    Cached("pages-gates-shorter-than-keys", page_size=16, gate_keys=41),
    Cached("pages-gate-per-head", page_size=16, gate="per-head", gate_keys=23, kv_heads=2),
    Cached("pages-gate-0", page_size=16, gate="zero"),
    Cached("pages-window", page_size=16, window=20, queries=2),
    Cached("pages-softcap", page_size=16, softcap=1.5, logits=4.0),
    Cached("pages-ungated-fp16", page_size=16, gate="none", dtype=torch.float16),
    Cached("pages-head-dim-80-bf16", page_size=16, head_dim=80, dtype=torch.bfloat16),
    Cached("pages-head-dim-128", page_size=64, capacity=128, head_dim=128, dtype=torch.float16),
    Cached("pages-nhd-strides", page_size=16, layout="nhd", query_heads=4, kv_heads=2),
    Cached("pages-gqa-7-to-1", page_size=16, query_heads=7, queries=4),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", CONTIGUOUS + PAGED, ids=str)
def test_each_sequence_matches_the_specification(problem: Cached, backend: str, device: torch.device) -> None:
    tensors, options = problem.make(device)
    assert_each_as_exact_as_eager(attend(tensors, options, backend), tensors, options)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 96), min_size=1, max_size=2),
    queries=st.integers(1, 16),
    page_size=st.sampled_from([None, 16, 32]),
    heads=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
    gate=st.sampled_from(["none", "shared", "per-head", "zero"]),
    gate_keys=st.none() | st.integers(0, 96),
    backend=st.sampled_from(BACKENDS),
)
def test_any_lengths(
    lengths: list[int],
    queries: int,
    page_size: int | None,
    heads: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    window: int | None,
    gate: str,
    gate_keys: int | None,
    backend: str,
    device: torch.device,
) -> None:
    window = window if causal else None
    problem = Cached(
        "any", tuple(lengths), 96, page_size, queries, *heads, 16, dtype, causal, window, None, gate, gate_keys
    )
    tensors, options = problem.make(device)
    assert_each_as_exact_as_eager(attend(tensors, options, backend), tensors, options)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_empty_batch(backend: str, device: torch.device) -> None:
    tensors, options = Cached("empty", (), gate="shared").make(device)
    out, lse = attend(tensors, options, backend)
    assert out.shape == (0, 2, 1, 32)
    assert lse.shape == (0, 2, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_and_their_order_change_nothing(backend: str, device: torch.device) -> None:
    """The same sequences, contiguous and in pages, by two page orders."""
    problem = Cached("order", (70, 33), page_size=16, queries=2)
    (q, k, v, lengths, table), options = problem.make(device)
    first = attend((q, k, v, lengths, table), options, backend)
    order = torch.randperm(k.shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    moved = torch.where((table >= 0) & (table < len(order)), order.argsort()[table.clamp(0, len(order) - 1)], table)
    second = attend((q, k[order], v[order], lengths, moved.int()), options, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    contiguous, _ = replace(problem, page_size=None).make(device)
    unpaged = attend(contiguous, options, backend)
    torch.testing.assert_close(first, unpaged)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_nothing_beyond_a_length_is_seen(poison: float, backend: str, device: torch.device) -> None:
    (q, k, v, lengths, table), options = Cached("poison", (40, 7), page_size=16, queries=4).make(device)
    clean = attend((q, k.nan_to_num(), v.nan_to_num(), lengths, table), options, backend)
    k, v = (x.masked_fill(x.isnan(), poison) for x in (k, v))
    found = attend((q, k, v, lengths, table), options, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


@pytest.mark.parametrize("page_size", [None, 16])
def test_the_same_call_gives_the_same_bits(page_size: int | None, device: torch.device) -> None:
    problem = Cached("bits", (600, 33), 1024, page_size, 2, 2, 1, 16, torch.bfloat16)
    tensors, options = problem.make(device)
    first, second = (attend(tensors, options, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_defaults_and_an_output_without_lse(backend: str, device: torch.device) -> None:
    tensors, options = Cached("scale", queries=3).make(device)
    gates = {name: options[name] for name in ("gamma_k", "gamma_v")}
    out = anchored_attention_decode(*tensors, **gates, scale=0.4, backend=backend)
    assert isinstance(out, torch.Tensor)
    found = attend(tensors, options | {"scale": 0.4}, backend)
    assert torch.equal(out, found[0])
    assert_each_as_exact_as_eager(found, tensors, options | {"scale": 0.4})


HOST_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize("page_size", [None, 16])
def test_triton_reads_no_tensor_on_the_host(
    page_size: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while traced, nor inside the operator. The checks of values on a CPU are off under torch.compile."""
    torch.compiler.reset()
    graphs = 0

    def run(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1

        def guarded(*inputs: torch.Tensor) -> Any:
            with monkeypatch.context() as patch:
                for method in HOST_READS:
                    patch.setattr(torch.Tensor, method, None)
                return graph(*inputs)

        return guarded

    @torch.compile(fullgraph=True, backend=run)
    def compiled(*tensors: Any, **options: Any) -> Any:
        return anchored_attention_decode(*tensors, **options, backend="triton", return_lse=True)

    for lengths in ((70, 5), (0, 96), (33, 1)):
        tensors, options = Cached("no-host-read", lengths, page_size=page_size).make(device)
        assert_each_as_exact_as_eager(compiled(*tensors, **options), tensors, options)
    assert graphs == 1


@pytest.mark.parametrize("page_size", [None, 16])
def test_compiles_without_a_break_and_once_for_a_growing_cache(page_size: int | None, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*tensors: Any, **options: Any) -> Any:
        return anchored_attention_decode(*tensors, **options, backend="triton", return_lse=True)

    for capacity in (96, 112, 128, 208):
        tensors, options = Cached("growing", (capacity - 7, 5), capacity, page_size, gate_keys=90).make(device)
        assert_each_as_exact_as_eager(compiled(*tensors, **options), tensors, options)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("place", "page_size"), [("page", 16), ("page", 32), ("head", 16)])
def test_pages_beyond_31_bits(place: str, page_size: int, device: torch.device, far_store: torch.Tensor) -> None:
    stride, heads = ((2**30, 0), 1) if place == "page" else ((16 * page_size, 2**30), 3)
    far = far_store.as_strided((3, heads, page_size, 16), (*stride, 16, 1))
    near, other = (torch.randn(far.shape).half().to(device) for _ in range(2))
    far.copy_(near)
    q = torch.randn(1, heads, 2, 16, device=device).half()
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([2 * page_size + 8], dtype=torch.int32, device=device)
    for found, expected in (((far, other), (near, other)), ((other, far), (other, near))):
        results = [attend((q, *caches, lengths, table), {}, "triton") for caches in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_cuda_graph_follows_the_lengths(page_size: int | None, device: torch.device) -> None:
    tensors, options = Cached("captured", (70, 5), page_size=page_size).make(device)
    attend(tensors, options, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(tensors, options, "triton")
    for lengths in ((70, 5), (0, 3), (33, 1)):
        tensors[3].copy_(torch.tensor(lengths))
        graph.replay()
        assert_each_as_exact_as_eager(found, tensors, options)


def test_gradients_are_refused_by_triton_only(device: torch.device) -> None:
    """Decode has no backward; sdpa and the reference have autograd's."""
    tensors, options = Cached("gradient", queries=2).make(device)
    tensors[0].requires_grad_()
    with pytest.raises(ValueError, match="requires grad"):
        attend(tensors, options, "triton")
    for backend in ("sdpa", "reference"):
        assert attend(tensors, options, backend)[0].requires_grad
