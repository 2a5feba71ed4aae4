"""The bounded cache of a stream (`keep`) against all of its tokens."""

import pytest
import torch
from torch import Tensor

from videoanchor_triton.anchor import streaming
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.streaming import AnchorStream, MergedTokens

from .tokens import DEVICES, vit_like

FIELDS = ("tokens", "counts", "position", "scores", "squares")


def config(**settings) -> VideoAnchorConfig:
    known = {"alpha_k": 3.0, "alpha_v": 2.0, "n_clusters": 4, "pca_rank": 16, "group": "farthest", "keep": 24}
    return VideoAnchorConfig(**{**known, **settings})


def streamed(X: Tensor, sizes: list[int], **settings) -> tuple[AnchorStream, Tensor]:
    """The stream behind chunks of these sizes, and the scores that it handed out."""
    stream = AnchorStream(config(**settings), max_atoms=20)
    return stream, torch.cat([stream.update(part).scores for part in X.split(sizes)])


def merged_of(stream: AnchorStream) -> MergedTokens:
    assert stream.merged is not None
    return stream.merged


def attention(q: Tensor, k: Tensor, v: Tensor, gamma_k: Tensor, gamma_v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.T / q.shape[1] ** 0.5 + gamma_k.double().log(), 1)
    return weights @ (gamma_v[:, None].double() * v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[40, *[12] * 10], [60, 1, 2, 57, 40]], ids=["frames", "larger-than-keep"])
def test_a_merged_token_is_what_its_equal_members_are(sizes, device):
    kinds = vit_like(1, 9).to(device).double()
    order = torch.randint(9, (sum(sizes),), generator=torch.Generator().manual_seed(0))
    order[:9] = torch.arange(9)
    X = kinds[order]
    stream, scores = streamed(X, sizes)
    found, s = merged_of(stream), scores.double()
    assert len(found.tokens) <= 24 < len(X) == int(found.counts.sum())
    assert float(s.std()) > 0.05
    q, to_k, to_v = torch.randn(3, 128, 128, dtype=torch.float64, device=device)
    expected = attention(q, X @ to_k, X @ to_v, 1 + 3 * s, 1 + 2 * s)
    merged = attention(q, found.tokens @ to_k, found.tokens @ to_v, found.gamma_k, found.gamma_v)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(X[found.position], found.tokens), "the mean of equal tokens is each of them"


def test_nothing_of_the_mass_is_lost():
    X = vit_like(10, 25)
    stream, scores = streamed(X, [50, *[7] * 28, 4])
    found, s, n = merged_of(stream), scores.double(), len(X)
    counts = found.counts.double()
    assert int(found.counts.sum()) == n == stream.n_tokens
    assert int(found.counts.max()) > 20, "groups of groups"
    torch.testing.assert_close(counts @ found.tokens.double() / n, X.double().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(counts @ found.scores, s.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(counts @ found.squares, s.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.gamma_k.double().sum(), (1 + 3 * s).sum(), rtol=1e-6, atol=0)
    weighted = (found.gamma_k * found.gamma_v).double().sum()
    torch.testing.assert_close(weighted, ((1 + 3 * s) * (1 + 2 * s)).sum(), rtol=1e-6, atol=0)
    assert (found.position.diff() > 0).all()


def test_new_tokens_are_whole_and_old_ones_keep_half():
    X, sizes = vit_like(8, 25), [50, 5, 11, 40, 12, 60, 22]
    stream = AnchorStream(config(), max_atoms=20)
    for part in X.split(sizes):
        n_old = stream.n_tokens
        stream.update(part)
        found, new = merged_of(stream), min(len(part), 24 if n_old == 0 else 12)
        assert len(found.tokens) == 24
        assert int((found.position >= n_old).sum()) == new
        assert int(found.counts[-new:].sum()) == len(part)
        if new == len(part):
            assert torch.equal(found.tokens[-new:], part)
            assert found.counts[-new:].tolist() == [1] * new


def test_while_all_fit_nothing_merges_and_scores_never_depend_on_it():
    X, sizes = vit_like(4, 25), [50, 30, 20]
    stream, scores = streamed(X, sizes, keep=100)
    found = merged_of(stream)
    assert torch.equal(found.tokens, X)
    assert found.counts.tolist() == [1] * 100
    assert found.position.tolist() == list(range(100))
    torch.testing.assert_close(found.gamma_k, 1 + 3 * scores)
    torch.testing.assert_close(found.gamma_v, 1 + 2 * scores)
    for keep in (1, 24):
        other, same = streamed(X, sizes, keep=keep)
        assert torch.equal(same, scores)
        assert (other.merged is None) == (keep == 1)


def test_the_cache_is_its_own_and_the_same_run_to_run():
    X, sizes = vit_like(4, 25), [20, 4, 50, 26]
    one, _ = streamed(X, sizes)
    given = X.clone()
    other = AnchorStream(config(), max_atoms=20)
    for part in given.split(sizes):
        other.update(part)
        part.zero_()
    for name in FIELDS:
        found = getattr(merged_of(other), name)
        assert torch.equal(found, getattr(merged_of(one), name))
        assert found.untyped_storage().nbytes() <= 2 * found.nbytes, "holds more than the cache"


def test_an_update_that_fails_leaves_the_cache(monkeypatch):
    X = vit_like(4, 25)
    stream = AnchorStream(config(), max_atoms=20)
    stream.update(X[:50])
    before = merged_of(stream)

    def stop(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "group_tokens", stop)
        with pytest.raises(InterruptedError):
            stream.update(X[50:])
    assert stream.merged is before
    assert stream.n_tokens == 50
    stream.update(X[50:])
    whole, _ = streamed(X, [50, 50])
    assert all(torch.equal(getattr(merged_of(stream), name), getattr(merged_of(whole), name)) for name in FIELDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.25}, "config.keep must be a number of tokens for a stream, of whose end nobody knows, got 0.25"),
        ({"group": "ward"}, "config.group must be \"farthest\" for a stream with keep, got 'ward'"),
        ({"group": "random"}, "config.group must be \"farthest\" for a stream with keep, got 'random'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchorStream(config(**settings))


def test_the_rule_is_asked_for_only_where_tokens_merge():
    assert AnchorStream(config(keep=1, group="ward")).merged is None
