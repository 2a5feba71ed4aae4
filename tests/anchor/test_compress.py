"""compress(): what it returns stands for all tokens, in an attention call and in total."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.anchor.grouping import Group, Merge

ALPHAS: dict[str, Any] = {"alpha_k": 9.5, "alpha_v": 2.5, "alpha_q": 4.0}
GRID = torch.cartesian_prod(*map(torch.arange, (3, 4, 5)))
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "merging.md"


def config(**options: Any) -> va.VideoAnchorConfig:
    return va.VideoAnchorConfig(**{**ALPHAS, "n_clusters": 3, **options})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(n: int = 60) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1))


def dense(query: Tensor, keys: Tensor, values: Tensor, gamma_k: Tensor, gamma_v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + log gamma_K) (gamma_V v) in float64."""
    query, keys, values = (x.double() for x in (query, keys, values))
    weights = (query @ keys.T / keys.shape[1] ** 0.5 + gamma_k.double().log()).softmax(-1)
    return weights @ (gamma_v.double()[:, None] * values)


def test_duplicates_are_one_key_with_the_sum_of_their_gates() -> None:
    """A prompt in which 37 tokens stand 400 times, each time with a score of its own."""
    n, k, s = 400, 37, scores(400)
    which = torch.cat([torch.arange(k), torch.randint(0, k, (n - k,), generator=torch.Generator().manual_seed(2))])
    tokens, query = drawn(k, 64)[which], drawn(5, 64, seed=3)
    merged = va.compress(tokens, config(keep=k, group="farthest"), scores=s)
    assert torch.equal(tokens[merged.kept][merged.groups], tokens)
    expected = dense(query, tokens, tokens, 1 + 9.5 * s, 1 + 2.5 * s)
    gates: dict[str, Any] = {"log_gamma_k": merged.log_gamma_k, "gamma_v": merged.gamma_v}
    out = va.anchored_attention(query[None, None], *[merged.features[None, None]] * 2, **gates)
    torch.testing.assert_close(out[0, 0].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("group", get_args(Group))
@pytest.mark.parametrize("keep", [0.5, 7, 0.9])
def test_nothing_is_lost(group: Group, keep: float) -> None:
    """The mass is that of all tokens, with and without a gate; so is the mass times the gain of values."""
    tokens, s = drawn(60, 24), scores()
    if group == "evs" and keep == 7:
        with pytest.raises(ValueError, match="keeps the first frame whole"):
            va.compress(tokens, config(keep=keep, group=group), scores=s, grid=GRID)
        return
    given = va.AnchorResult(s, torch.arange(len(s)) % 3) if group == "subspace" else s
    merged = va.compress(tokens, config(keep=keep, group=group), scores=given, grid=GRID)
    gamma_k, gamma_v = 1 + 9.5 * s.double(), 1 + 2.5 * s.double()
    mass = merged.log_gamma_k.double().exp()
    torch.testing.assert_close(mass.sum(), gamma_k.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close((mass * merged.gamma_v).sum(), (gamma_k * gamma_v).sum(), rtol=1e-6, atol=0)
    for number in range(len(merged.kept)):
        mine = merged.groups == number
        torch.testing.assert_close(mass[number], gamma_k[mine].sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(merged.features[number], tokens[mine].mean(0))
        torch.testing.assert_close(merged.gamma_q[number], 1 + 4 * s[mine].mean())
        assert merged.groups[merged.kept[number]] == number
    plain = va.compress(tokens, config(alpha_k=0, alpha_v=0, keep=keep, group=group), scores=given, grid=GRID)
    torch.testing.assert_close(plain.log_gamma_k.exp().sum(), torch.tensor(60.0))
    assert plain.counts.sum() == 60
    assert plain.gamma_v.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keep_1_is_bit_equal(dtype: torch.dtype) -> None:
    tokens, s = drawn(60, 64).to(dtype), scores()
    merged = va.compress(tokens, config(), scores=s, grid=GRID)
    assert torch.equal(merged.features, tokens)
    assert torch.equal(merged.groups, torch.arange(60))
    assert torch.equal(merged.log_gamma_k, torch.log1p(9.5 * s))
    assert torch.equal(merged.gamma_v, 1 + 2.5 * s)
    query, x, y = (z[None, None] for z in (drawn(5, 64, seed=3).to(dtype), tokens, merged.features))
    gates: dict[str, Any] = {"log_gamma_k": merged.log_gamma_k, "gamma_v": merged.gamma_v}
    out = va.anchored_attention(query, y, y, **gates)
    expected = va.anchored_attention(query, x, x, log_gamma_k=torch.log1p(9.5 * s), gamma_v=1 + 2.5 * s)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("merge", get_args(Merge))
def test_what_becomes_of_groups(merge: Merge) -> None:
    tokens, s = drawn(60, 24), scores()
    merged = va.compress(tokens, config(keep=9, merge=merge), scores=s, grid=GRID)
    means = torch.stack([s[merged.groups == number].mean() for number in range(9)])
    m1 = s[merged.kept] if merge == "drop" else means
    torch.testing.assert_close(merged.scores, m1)
    if merge == "drop":
        assert torch.equal(merged.features, tokens[merged.kept])
    if merge != "counts":
        torch.testing.assert_close(merged.log_gamma_k, torch.log1p(9.5 * m1))
        torch.testing.assert_close(merged.gamma_v, 1 + 2.5 * m1)
    assert merged.counts.sum() == 60


def test_scores_are_those_of_anchor_scores() -> None:
    """None, the result and its tensor; a score that needs frames has those of the grid."""
    tokens = drawn(60, 24)
    for score in ("published", "cross_frame"):
        settings = config(keep=0.3, score=score)
        result = va.anchor_scores(tokens, settings, frames=GRID[:, 0])
        found = [va.compress(tokens, settings, scores=one, grid=GRID) for one in (None, result, result.scores)]
        assert all(torch.equal(one.log_gamma_k, found[0].log_gamma_k) for one in found)
        assert all(torch.equal(one.gamma_v, found[0].gamma_v) for one in found)
        assert result.scores.std() > 0.02, "the check can fail"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": drawn(60)}, ValueError, "X must be 2-D"),
        ({"features": drawn(0, 4)}, ValueError, "features must have at least one token"),
        ({"features": drawn(60, 4) / 0}, ValueError, "X must be finite"),
        ({"features": GRID}, TypeError, "X must be of a floating-point type"),
        ({"scores": scores(59)}, ValueError, r"scores must have shape \(60,\), one a token, got \(59,\)"),
        ({"scores": 2 * scores()}, ValueError, r"scores must be finite and in \[0, 1\]"),
        ({"scores": scores() * torch.nan}, ValueError, r"scores must be finite and in \[0, 1\]"),
        (
            {"scores": scores().long()},
            TypeError,
            "scores must be a floating-point tensor or an AnchorResult, got torch",
        ),
        ({"scores": [0.0] * 60}, TypeError, "scores must be a floating-point tensor or an AnchorResult, got list"),
        ({"grid": GRID[:, :2]}, ValueError, r"grid must have shape \(60, 3\), a row a token, got \(60, 2\)"),
        ({"grid": GRID[1:]}, ValueError, r"grid must have shape \(60, 3\)"),
        ({"grid": GRID.float()}, TypeError, "grid must hold integers, got torch.float32"),
        ({"grid": [[0, 0, 0]] * 60}, TypeError, "grid must be a tensor, got list"),
        ({"positions": GRID[1:]}, ValueError, r"positions must have shape \(60, \.\.\.\)"),
        ({"rotary": drawn(60, 8) / 0}, ValueError, "rotary must be finite"),
        ({"config": config(keep=2)}, ValueError, "keep=2 leaves 2 of 60 visual tokens for 3 frames or images"),
        ({"config": config(keep=1).reproduce()}, ValueError, 'arithmetic="authors" rounds its factors'),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"features": drawn(60, 4), "config": config(keep=0.5), "scores": scores(), "grid": GRID, **options}
    with pytest.raises(error, match=message):
        va.compress(given.pop("features"), given.pop("config"), **given)


def test_the_example_of_the_document_runs() -> None:
    (block,) = re.findall(r"```python\n([^`]*va\.compress[^`]*)```", DOCUMENT.read_text())
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["output"].shape == (1, 8, 12, 64)
    assert torch.isfinite(names["output"]).all()
