"""What other methods ask of an attention, said with gates of keys, against dense fp64 forms of their own papers."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from videoanchor_triton.kernels.api import anchored_attention, anchored_attention_varlen
from videoanchor_triton.kernels.api_cache import anchored_attention_decode

PAGE = Path(__file__).parents[2] / "docs" / "gates.md"
BACKENDS = ("triton", "sdpa", "reference")
EPS = torch.finfo(torch.float32).eps
Heads = tuple[int, int]


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def on(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.to(device) for x in tensors]


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v and its lse in fp64, bias (B, Hq, Nq, Nk), bottom-right causal."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias.double()
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def assert_equal(found: torch.Tensor, exact: torch.Tensor, size: float = 0.0) -> None:
    """To fp32's roundings, and to those of logits of a `size`."""
    allowed = (3e-6 + 4 * EPS * size) * max(1.0, exact.abs().max().item())
    assert (found.double() - exact).abs().max().item() <= allowed


# merged tokens: a key that stands for n equal ones has log gamma_k = log n


def merged(device: torch.device) -> tuple[torch.Tensor, ...]:
    """400 keys, of which 37 are different, these 37, and how often each stands among the 400."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.multinomial(torch.ones(37), 363, replacement=True, generator=generator).bincount(minlength=37) + 1
    assert counts.sum() == 400
    q, k, v = draw(1, (2, 4, 20, 16), (2, 2, 37, 16), (2, 2, 37, 16))
    order = torch.randperm(400, generator=generator)
    of_all = torch.arange(37).repeat_interleave(counts)[order]
    return *on(device, q, k, v, counts), *on(device, k[:, :, of_all], v[:, :, of_all], of_all)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_tokens_are_their_duplicates(backend: str, device: torch.device) -> None:
    q, k, v, counts, all_k, all_v, _ = merged(device)
    sizes = counts.float().log()
    expected = anchored_attention(q, all_k, all_v, return_lse=True, backend=backend)
    for form in ("log-bias", "post-exp"):
        found = anchored_attention(q, k, v, log_gamma_k=sizes, return_lse=True, backend=backend, gate_form=form)
        torch.testing.assert_close(found, expected)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    marks = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (20, 37)]
    q, k, v = packed
    out = anchored_attention_varlen(q, k, v, marks[0], marks[1], 20, 37, log_gamma_k=sizes.repeat(2), backend=backend)
    torch.testing.assert_close(out.unflatten(0, (2, 20)).transpose(1, 2), expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_merged_token_is_the_sum_of_its_duplicates(backend: str, device: torch.device) -> None:
    q, k, v, counts, all_k, all_v, of_all = merged(device)
    grads = []
    for keys, values, gate in ((k, v, counts.float().log()), (all_k, all_v, None)):
        leaves = [x.detach().requires_grad_() for x in (keys, values)]
        out = anchored_attention(q, *leaves, log_gamma_k=gate, backend=backend)
        grads.append(torch.autograd.grad(out.sin().sum(), leaves))
    for few, many in zip(*grads, strict=True):
        torch.testing.assert_close(few, torch.zeros_like(few).index_add_(2, of_all, many), rtol=1e-4, atol=1e-5)


# compacted caches: each KV head keeps keys of its own, with a weight beta of its own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [None, 5], ids=["contiguous", "paged"])
def test_a_compacted_cache_is_the_whole_one(page_size: int | None, backend: str, device: torch.device) -> None:
    """90 keys in 20 clusters that differ from head to head: a cluster is one key, the mean of its values, and
    beta = log size; keys that came later stay as they are, past the end of beta."""
    generator = torch.Generator().manual_seed(2)
    q, few_k, v, new_k, new_v = draw(3, (1, 4, 2, 16), (1, 2, 20, 16), (1, 2, 90, 16), (1, 2, 10, 16), (1, 2, 10, 16))
    cluster = torch.stack([torch.randperm(90, generator=generator) % 20 * (h + 1) % 20 for h in range(2)])[None]
    of_keys = cluster[..., None].expand(-1, -1, -1, 16)
    sizes = torch.zeros(1, 2, 20).scatter_add_(2, cluster, torch.ones(1, 2, 90))
    few_v = torch.zeros(1, 2, 20, 16).scatter_add_(2, of_keys, v) / sizes.clamp(min=1)[..., None]
    assert (sizes == 0).any(), "of clusters that a head does not have beta is -inf"
    whole = [torch.cat(x, 2) for x in ((few_k.gather(2, of_keys), new_k), (v, new_v))]
    compact = [torch.cat(x, 2) for x in ((few_k, new_k), (few_v, new_v))]
    q, beta, *caches = on(device, q, sizes.log(), *whole, *compact)
    expected, lse = dense(q, caches[0], caches[1], torch.zeros(1, 1, 1, 1, device=device))
    table = None
    if page_size is not None:
        table = torch.arange(6, dtype=torch.int32, device=device)[None]
        caches[2:] = [x[0].unflatten(1, (6, page_size)).transpose(0, 1).contiguous() for x in caches[2:]]
    lengths = torch.tensor([30], dtype=torch.int32, device=device)
    _, _, k_cache, v_cache = caches
    found = anchored_attention_decode(
        q, k_cache, v_cache, lengths, table, log_gamma_k=beta, return_lse=True, backend=backend
    )
    assert_equal(found[0], expected)
    assert_equal(found[1], lse)


# ALiBi: -slope * (i - j) is slope * j but for a constant of the row, which the softmax does not see


def slopes_of(heads: int) -> torch.Tensor:
    return 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)


def alibi(slopes: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """(1, Hq, Nq, Nk), as the paper has it."""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return -slopes.double()[None, :, None, None] * distance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(70, 70), (9, 70), (1, 70)], ids=["square", "chunk", "one-query"])
def test_alibi(sizes: Heads, backend: str, device: torch.device) -> None:
    queries, keys = sizes
    slopes = slopes_of(8)
    q, k, v = on(device, *draw(4, (2, 8, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16)))
    # counted from the last key: the nearest keys, which matter most, have the smallest logits
    bias = slopes[:, None] * (torch.arange(keys) - keys + 1)
    found = anchored_attention(
        q, k, v, causal=True, log_gamma_k=bias.expand(2, -1, -1).to(device), return_lse=True, backend=backend
    )
    exact, lse = dense(q, k, v, alibi(slopes, queries, keys).to(device))
    assert_equal(found[0], exact, size=keys)
    of_rows = slopes[:, None] * (torch.arange(queries) + 1 - queries)
    assert_equal(found[1].double() - of_rows.to(device), lse, size=keys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_over_a_cache_in_one_buffer(backend: str, device: torch.device) -> None:
    """The bias is made once, for the most keys there can be; each step gives all of it, or a slice."""
    slopes, (q, k, v) = slopes_of(4), on(device, *draw(5, (2, 4, 1, 16), (2, 2, 64, 16), (2, 2, 64, 16)))
    bias = (slopes[:, None] * torch.arange(200)).expand(2, -1, -1).to(device)
    lengths = [64, 33]
    out = anchored_attention_decode(
        q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device), log_gamma_k=bias[..., :64], backend=backend
    )
    for b, n in enumerate(lengths):
        of_entry = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        exact, _ = dense(*of_entry, alibi(slopes, 1, n).to(device))
        assert_equal(out[b : b + 1], exact, size=n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_is_flex_attentions(backend: str, device: torch.device) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    slopes = slopes_of(4).to(device)
    q, k, v = on(device, *draw(6, (1, 4, 48, 16), (1, 2, 48, 16), (1, 2, 48, 16)))

    def score(score: Any, _b: Any, head: Any, query: Any, key: Any) -> Any:
        return score - slopes[head] * (query - key)

    blocks = flex.create_block_mask(lambda _b, _h, query, key: query >= key, 1, 1, 48, 48, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flex_attention, which is not compiled here
        expected = flex.flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
    bias = (slopes[:, None] * torch.arange(48, device=device))[None]
    found = anchored_attention(q, k, v, causal=True, log_gamma_k=bias, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# forgetting attention: D_ij = F_i - F_j with F the running sum of log forget gates


def forget_gates(seed: int, heads: int, keys: int, strength: float) -> torch.Tensor:
    """log f (1, H, N), about -strength each."""
    generator = torch.Generator().manual_seed(seed)
    return -2 * strength * torch.rand(1, heads, keys, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strength", [0.05, 1.0, 150.0], ids=["long", "short", "sums-of-10000"])
def test_forgetting_attention(strength: float, backend: str, device: torch.device) -> None:
    q, k, v = on(device, *draw(7, (1, 4, 70, 16), (1, 2, 70, 16), (1, 2, 70, 16)))
    total = forget_gates(8, 4, 70, strength).double().cumsum(-1).to(device)
    size = total.abs().max().item()
    assert strength < 150 or size > 9e3
    exact, lse = dense(q, k, v, total[..., :, None] - total[..., None, :])
    for shift in (0.0, total[..., -1:]):  # a constant of a head moves the lse only
        logs = (shift - total).float()
        found = anchored_attention(q, k, v, causal=True, log_gamma_k=logs, return_lse=True, backend=backend)
        assert_equal(found[0], exact, size=size)
        assert (found[1] + total - shift - lse).abs().max() <= 8 * EPS * size + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_forget_gates_learn(backend: str, device: torch.device) -> None:
    """The gradient reaches the gates through their running sum."""
    q, k, v, weight = on(device, *draw(9, (1, 4, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16), (1, 4, 40, 16)))
    gates = forget_gates(10, 4, 40, 0.3).to(device).requires_grad_()
    out = anchored_attention(q, k, v, causal=True, log_gamma_k=-gates.cumsum(-1), backend=backend)
    assert isinstance(out, torch.Tensor)
    total = gates.double().cumsum(-1)
    exact, _ = dense(q, k, v, total[..., :, None] - total[..., None, :])
    found, expected = (torch.autograd.grad((x * weight).sum(), [gates])[0] for x in (out, exact))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_methods_at_once_are_the_sum_of_their_logarithms(backend: str, device: torch.device) -> None:
    """Merged tokens that forget: log size and -F, and VideoAnchor's own factors beside them."""
    q, k, v = on(device, *draw(11, (1, 4, 25, 16), (1, 2, 25, 16), (1, 2, 25, 16)))
    sizes, scores = (1 + 4 * torch.rand(2, 25, generator=torch.Generator().manual_seed(12))).to(device)
    total = forget_gates(13, 4, 25, 0.3).to(device).cumsum(-1)
    logs = sizes.log() + scores.log() - total
    found = anchored_attention(q, k, v, causal=True, log_gamma_k=logs, gamma_v=scores, backend=backend)
    bias = total[..., :, None] - total[..., None, :] + (sizes * scores).log()
    exact, _ = dense(q, k, v * scores[:, None], bias)
    assert isinstance(found, torch.Tensor)
    assert_equal(found, exact, size=20.0)


def test_the_code_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert names["out"].shape == (1, 8, 37, 64)
