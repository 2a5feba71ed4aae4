"""The parts of the plug-in that need no vLLM: factors of a step, gates by slot, settings, and one layer's two calls."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.integrations.vllm.architectures import ARCHITECTURES
from videoanchor_triton.integrations.vllm.gated_attention import GatedAttention
from videoanchor_triton.integrations.vllm.settings import settings_of
from videoanchor_triton.integrations.vllm.step_gates import StepGates, attach, detach

CPU = torch.device("cpu")
PAGE, BLOCKS, HEADS, KV_HEADS, DIM = 16, 6, 4, 2, 32


def by_first(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0].float().sigmoid()


def config(**fields: Any) -> VideoAnchorConfig:
    return VideoAnchorConfig(**{"alpha_k": 9.5, "alpha_v": 2.5, "scorer": by_first, **fields})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_travel_exactly(dtype: torch.dtype) -> None:
    """Whatever their bits are as numbers of the embeddings' dtype, NaN among them."""
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    scores[:4] = torch.tensor([0.0, 1.0, 2.0**-149, 0.999999])
    embeddings = torch.randn(5000, 8).to(dtype)
    whole = attach(embeddings, scores)
    assert whole.dtype == dtype
    part = whole[1000:3000].clone()  # a chunk, out of a cache
    back, found = detach(part)
    assert torch.equal(back, embeddings[1000:3000])
    assert torch.equal(found.view(torch.int32), scores[1000:3000].view(torch.int32))


def test_factors_of_a_step_stay_where_they_are() -> None:
    gates = StepGates(config(), 8, CPU)
    addresses = gates.gamma_k.data_ptr(), gates.gamma_v.data_ptr()
    visual = torch.tensor([False, True, True, False, True])
    gates.set_step(5, visual, [torch.tensor([1.0, 0.5]), torch.tensor([0.25])])
    assert gates.gamma_k.tolist() == [1, 10.5, 5.75, 1, 3.375, 1, 1, 1]
    assert gates.gamma_v.tolist() == [1, 3.5, 2.25, 1, 1.625, 1, 1, 1]
    gates.set_step(3, None, [])  # text alone: nothing of the step before is left
    assert gates.gamma_k[:3].tolist() == gates.gamma_v[:3].tolist() == [1, 1, 1]
    assert (gates.gamma_k.data_ptr(), gates.gamma_v.data_ptr()) == addresses


def test_pages_belong_to_a_cache() -> None:
    gates = StepGates(config(), 8, CPU)
    first = gates.pages(4, 16, "written")
    assert gates.pages(4, 16, "written") is first
    assert gates.pages(4, 16, "apart") is not first
    assert gates.pages(9, 16, "written").values.shape == (9, 1, 16)
    assert gates.pages(4, 16, "written") is not first  # of a cache that was measured with and given up


@pytest.mark.parametrize(
    "scorer",
    [lambda _: 1 / 0, lambda tokens: tokens[:, 0] * float("nan"), lambda tokens: tokens[:1, 0] * 0],
    ids=["raises", "nan", "too few"],
)
def test_what_cannot_be_scored_is_neutral_and_counted(scorer: Any) -> None:
    gates = StepGates(config(scorer=scorer), 8, CPU)
    assert torch.equal(gates.score(torch.ones(7, 3)), torch.zeros(7))
    assert (gates.counts.items, gates.counts.tokens, gates.counts.unscored) == (1, 7, 1)
    assert gates.summary()["settings"]["alpha_k"] == 9.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha_k": 1.0}, "alpha_v"),
        ({"alpha_k": 1.0, "alpha_v": 1.0, "alpha": 2}, "unexpected keyword argument 'alpha'"),
        ({"alpha_k": -1.0, "alpha_v": 1.0}, "alpha_k"),
        ("yes", "videoanchor"),
        ({"preset": "qwen"}, "no values are published"),
        ({"alpha_k": 1.0, "alpha_v": 1.0, "scorer": "nowhere:score"}, "nowhere"),
        ({"alpha_k": 1.0, "alpha_v": 1.0, "scorer": "math:nothing"}, "nothing"),
        ({"alpha_k": 1.0, "alpha_v": 1.0, "decode": "prefill"}, "cannot be served"),
        ({"alpha_k": 1.0, "alpha_v": 1.0, "score": "cross_frame"}, "cannot be served"),
        ({"alpha_k": 1.0, "alpha_v": 1.0, "score": "cross_frame_permuted"}, "cannot be served"),
    ],
)
def test_settings_that_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^videoanchor: ") as error:
        settings_of({"videoanchor": given})
    assert said in str(error.value)


def test_settings() -> None:
    assert settings_of({}) is None
    assert settings_of(None) is None
    published = settings_of({"videoanchor": {"preset": "internvl2-8b", "alpha_v": 1.0}})
    assert published == VideoAnchorConfig(alpha_q=4.0, alpha_k=9.5, alpha_v=1.0)
    again = settings_of({"videoanchor": VideoAnchorConfig(alpha_k=1, alpha_v=2, n_clusters="auto").to_dict()})
    assert again == VideoAnchorConfig(alpha_k=1, alpha_v=2, n_clusters="auto")
    assert "Qwen2_5_VLForConditionalGeneration" in ARCHITECTURES


class Layer(GatedAttention):
    """A layer of vLLM, as far as the two calls look at it."""

    backend, head_size, scale, logits_soft_cap, window = "sdpa", DIM, DIM**-0.5, 0.0, None  # pyright: ignore


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: StepGates, n: int) -> torch.Tensor:
    """fp64, of one sequence: the last queries (T, Hq, D) over keys (n, Hkv, D)."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5 + gates.gamma_k[:n].double().log()
    late = torch.arange(n)[None] > torch.arange(n - len(q), n)[:, None]
    weights = logits.masked_fill(late, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v * gates.gamma_v[:n, None, None].double())


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "form", "tolerance"),
    [
        (torch.float32, torch.float32, "written", 1e-5),
        (torch.bfloat16, torch.bfloat16, "written", 3e-2),
        (torch.float16, torch.float16, "apart", 4e-3),
        (torch.bfloat16, torch.uint8, "apart", 3e-2),  # fp8, as vLLM keeps it
    ],
    ids=["fp32", "bf16", "fp16", "fp8"],
)
def test_a_layer(dtype: torch.dtype, cache_dtype: torch.dtype, form: str, tolerance: float) -> None:
    """A prompt of 40 in slots of any order, then its last five queries; padding behind them is left alone."""
    generator = torch.Generator().manual_seed(1)
    n, layer, of_layer = 40, Layer(), SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25))
    layer.gates = gates = StepGates(config(), 64, CPU)
    gates.set_step(n, torch.arange(n) % 3 > 0, [torch.rand(26, generator=generator)])
    k, v, q = (torch.randn(n, h, DIM, generator=generator).to(dtype) for h in (KV_HEADS, KV_HEADS, HEADS))
    cache = torch.zeros(BLOCKS, KV_HEADS, PAGE, 2 * DIM, dtype=cache_dtype)
    table = torch.tensor([[4, 1, 3, 0]], dtype=torch.int32)
    slots = torch.cat([block * PAGE + torch.arange(PAGE) for block in table[0].tolist()])[:n]
    more = [torch.cat([x, torch.full_like(x[:3], float("nan"))]) for x in (k, v)]
    layer.do_kv_cache_update(of_layer, *more, cache, torch.cat([slots, torch.tensor([-1, -1, -1])]))  # pyright: ignore
    assert [key[2] for key in gates._pages] == [form]
    lengths = {"query_start_loc": torch.tensor([0, 5]).int(), "seq_lens": torch.tensor([n]).int()}
    metadata = SimpleNamespace(**lengths, block_table=table, max_query_len=5, num_actual_tokens=5, causal=True)
    output = torch.full((8, HEADS, DIM), 7.0, dtype=dtype)
    layer.forward(of_layer, q[-5:], k, v, cache, metadata, output)
    if cache_dtype == torch.uint8:  # what the cache holds
        k, v = ((x.float() / s).to(torch.float8_e4m3fn).float() * s for x, s in ((k, 0.5), (v, 0.25)))
    expected = dense(q[-5:], k, v, gates, n)
    assert (output[:5].double() - expected).abs().max() < tolerance * expected.abs().max()
    assert (output[5:] == 7).all()
    metadata.causal = False
    with pytest.raises(ValueError, match="causal"):
        layer.forward(of_layer, q[-5:], k, v, cache, metadata, output)
    assert (layer.forward(of_layer, q, k, v, cache, None, output) == 0).all()
