import time
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from videoanchor_triton.anchor import memory, scores
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.neighbors import neighbor_expression
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores, shared_expression_score
from videoanchor_triton.anchor.solver import self_expression

from .tokens import DEVICES, planted_subspaces, vit_like


def config(**settings) -> VideoAnchorConfig:
    return VideoAnchorConfig(**{"alpha_k": 1.0, "alpha_v": 1.0, "n_clusters": 8, "pca_rank": 16, **settings})


def test_score_follows_the_formula():
    row_sums = torch.tensor([1.0, 2.0, -0.5, 4.0, 1.0])
    labels = torch.tensor([0, 0, 0, 2, 2])
    unscaled = np.array([3 * 1.0, 3 * 2.0, 3 * -0.5, 2 * 4.0, 2 * 1.0]) / 5
    expected = (unscaled - unscaled.min()) / (unscaled.max() - unscaled.min())
    found = shared_expression_score(row_sums, labels, 4)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "row_sums", [[], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1.0, 1.0 + 1e-7, 1.0], [-1.0, -1.0]], ids=str
)
def test_constant_score_is_zero(row_sums):
    scores = shared_expression_score(torch.tensor(row_sums), torch.zeros(len(row_sums), dtype=torch.int64), 1)
    assert scores.tolist() == [0.0] * len(row_sums)


def test_small_differences_count():
    assert shared_expression_score(torch.tensor([1.0, 1.00001]), torch.zeros(2, dtype=torch.int64), 1).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("row_sums", "labels", "message"),
    [
        ([1.0, 2.0], [0], r"shape \(n_tokens,\), got \(2,\) and \(1,\)"),
        ([[1.0]], [[0]], r"got \(1, 1\)"),
        ([1.0, 2.0], [0, 3], r"\[0, n_clusters=3\), got values from 0 to 3"),
        ([1.0, 2.0], [-1, 0], "from -1 to 0"),
        ([1.0, float("nan")], [0, 0], "must be finite"),
    ],
    ids=["lengths", "2-D", "too-large", "negative", "nan"],
)
def test_score_arguments_are_checked(row_sums, labels, message):
    with pytest.raises(ValueError, match=message):
        shared_expression_score(torch.tensor(row_sums), torch.tensor(labels), 3)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_those_of_the_parts(device):
    tokens = vit_like().to(device)
    result = anchor_scores(tokens, config())
    solution = self_expression(token_features(tokens, 16), config())
    expected = shared_expression_score(solution.row_sums(), result.labels, 8)
    torch.testing.assert_close(result.scores, expected)
    assert result.scores.device == result.labels.device == tokens.device
    assert (result.scores.dtype, result.labels.dtype) == (torch.float32, torch.int64)
    assert (result.scores.amin(), result.scores.amax()) == (0, 1)
    assert (result.n_iter, result.residual, result.converged) == (solution.n_iter, solution.residual, True)
    assert list(result.seconds) == ["pca", "solve", "spectral", "score"]
    assert all(seconds >= 0 for seconds in result.seconds.values())


@pytest.mark.parametrize("score", ["size", "row_sum"])
def test_each_factor_of_the_score_alone(score):
    tokens = vit_like(4, 15)
    result, published = anchor_scores(tokens, config(score=score)), anchor_scores(tokens, config())
    row_sums = self_expression(token_features(tokens, 16), config()).row_sums().numpy()
    unscaled = np.bincount(result.labels)[result.labels] if score == "size" else row_sums
    expected = (unscaled - unscaled.min()) / (unscaled.max() - unscaled.min())
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(result.labels, published.labels)


@pytest.mark.parametrize("scorer", ["ssc", "knn"])
def test_projector_score_and_eigengap_are_of_the_subspaces(scorer):
    tokens = vit_like(4, 15)
    result = anchor_scores(tokens, config(scorer=scorer, score="projector"))
    features = token_features(tokens, 16)
    solution = neighbor_expression(features) if scorer == "knn" else self_expression(features, config())
    affinity = solution.affinity().to_dense().numpy()
    degree = affinity.sum(0)
    values, vectors = np.linalg.eigh(affinity / np.sqrt(np.outer(degree, degree)))
    basis = np.linalg.qr(vectors[:, -8:] / np.sqrt(degree)[:, None])[0]
    unscaled = solution.row_sums().numpy() / np.square(basis).sum(1)
    expected = (unscaled - unscaled.min()) / (unscaled.max() - unscaled.min())
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-6)
    assert result.eigengap == pytest.approx(values[-8] - values[-9], abs=1e-9)
    published = anchor_scores(tokens, config(scorer=scorer))
    assert (published.eigengap, published.in_gap) == (result.eigengap, result.in_gap)
    assert not torch.allclose(result.scores, published.scores, atol=0.01)


@pytest.mark.parametrize("scorer", ["ssc", "knn"])
def test_whether_there_are_as_many_subspaces(scorer):
    tokens, _ = planted_subspaces(4, 24)
    settings = {"pca_rank": None, "affine": False, "scorer": scorer}
    if scorer == "knn":  # which sees distances
        tokens = torch.eye(4, 40).repeat_interleave(24, 0) + 0.01 * tokens
    found = {k: anchor_scores(tokens, config(n_clusters=k, **settings)) for k in (4, "auto", 7, 96)}
    assert [found[k].in_gap for k in (4, "auto", 7, 96)] == [True, True, False, None]
    assert found["auto"].labels.amax() == 3
    assert found[96].eigengap is None, "as many clusters as tokens"
    assert anchor_scores(tokens, config(scorer="uniform")).in_gap is None


@pytest.mark.parametrize("assign_labels", ["discretize", "cluster_qr"])
def test_finds_planted_subspaces(assign_labels):
    tokens, truth = planted_subspaces(noise=0.02)
    result = anchor_scores(tokens, config(n_clusters=4, pca_rank=12, affine=False, assign_labels=assign_labels))
    assert adjusted_rand_score(truth, result.labels) == 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scorer", ["ssc", "knn", "kmeans"])
def test_is_bitwise_reproducible(scorer, device):
    tokens = vit_like().to(device)
    first = anchor_scores(tokens, config(scorer=scorer))
    torch.manual_seed(7)
    np.random.seed(7)
    with torch.autocast(device, torch.bfloat16), torch.inference_mode():
        second = anchor_scores(tokens, config(scorer=scorer))
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.labels, second.labels)


def test_another_seed_moves_nothing_on_clear_structure():
    tokens, _ = planted_subspaces(noise=0.02)
    settings = {"n_clusters": 4, "pca_rank": 12, "affine": False}
    first, second = (anchor_scores(tokens, config(random_state=seed, **settings)) for seed in (0, 1))
    assert adjusted_rand_score(first.labels, second.labels) == 1.0
    torch.testing.assert_close(first.scores, second.scores)


@pytest.mark.parametrize("scorer", ["ssc", "kmeans"])
def test_the_seed_is_used_where_structure_is_weak(scorer):
    tokens = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    labels = {
        tuple(anchor_scores(tokens, config(scorer=scorer, assign_labels="kmeans", random_state=seed)).labels.tolist())
        for seed in range(4)
    }
    assert len(labels) > 1


@pytest.mark.parametrize("change", ["permuted", "rotated"])
def test_scores_follow_the_tokens(change):
    tokens, _ = planted_subspaces(noise=0.02)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(tokens), generator=random) if change == "permuted" else torch.arange(len(tokens))
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=random, dtype=torch.float64)).Q
    changed = tokens[order] if change == "permuted" else tokens @ rotation
    settings = config(n_clusters=4, pca_rank=12, affine=False, tol=1e-6)
    expected, found = anchor_scores(tokens, settings), anchor_scores(changed, settings)
    torch.testing.assert_close(found.scores, expected.scores[order], atol=1e-5, rtol=0)
    assert adjusted_rand_score(found.labels, expected.labels[order]) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tokens_are_computed_in_float32(dtype):
    tokens = vit_like().to(dtype)
    assert torch.equal(anchor_scores(tokens, config()).scores, anchor_scores(tokens.float(), config()).scores)


def test_numpy_tokens_give_the_scores_of_tensors():
    tokens = vit_like()
    assert torch.equal(anchor_scores(tokens.numpy(), config()).scores, anchor_scores(tokens, config()).scores)


@pytest.mark.parametrize(
    "scorer",
    ["ssc", "kmeans", "uniform", lambda tokens: torch.zeros(len(tokens))],
    ids=["ssc", "kmeans", "uniform", "function"],
)
def test_no_tokens(scorer):
    result = anchor_scores(torch.zeros(0, 5), config(scorer=scorer))
    assert (result.scores.shape, result.labels.shape, result.converged) == ((0,), (0,), True)


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("scorer", ["ssc", "kmeans"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize(
    "tokens",
    [torch.ones(1, 9), torch.full((30, 9), 0.1), torch.zeros(30, 9)],
    ids=["one", "constant", "zero"],
)
def test_nothing_to_tell_apart_scores_zero(tokens, scorer, affine, rank):
    result = anchor_scores(tokens, config(scorer=scorer, affine=affine, pca_rank=rank))
    assert result.scores.tolist() == [0.0] * len(tokens)
    assert result.converged


@pytest.mark.parametrize("scorer", ["ssc", "kmeans"])
def test_two_tokens_are_shared_alike(scorer):
    result = anchor_scores(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), config(scorer=scorer))
    assert result.scores.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scorer", ["ssc", "kmeans"])
def test_fewer_tokens_than_clusters(scorer):
    tokens = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    result = anchor_scores(tokens, config(n_clusters=24, scorer=scorer))
    assert sorted(result.labels.tolist()) == list(range(6))
    assert torch.isfinite(result.scores).all()


@pytest.mark.parametrize("rank", [None, 16])
def test_duplicate_tokens_score_alike(rank):
    tokens = vit_like(2, 20).double()
    result = anchor_scores(torch.cat([tokens, tokens]), config(pca_rank=rank, n_clusters=4))
    assert result.converged
    torch.testing.assert_close(result.scores[:40], result.scores[40:], atol=2 * config().tol, rtol=0)


def test_kmeans_prefers_the_centre_of_large_clusters():
    tokens = torch.tensor([[0.0], [0.1], [-0.1], [0.3], [50.0], [50.4]]).repeat(1, 2)
    result = anchor_scores(tokens, config(scorer="kmeans", n_clusters=2))
    assert adjusted_rand_score(result.labels, [0, 0, 0, 0, 1, 1]) == 1.0
    distance = np.array([0.075, 0.025, 0.175, 0.225, 0.2, 0.2]) / 0.225
    unscaled = np.array([4, 4, 4, 4, 2, 2]) * (1 - distance)
    np.testing.assert_allclose(result.scores, (unscaled - unscaled.min()) / np.ptp(unscaled), atol=1e-5)


def test_uniform_scores():
    result = anchor_scores(torch.randn(5, 3), config(scorer="uniform"))
    assert result.scores.tolist() == [1.0] * 5
    assert result.labels.tolist() == [0] * 5


def test_a_function_scores_the_tokens_as_they_are():
    tokens = torch.randn(5, 3).bfloat16()
    seen = []

    def scorer(given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return torch.linspace(0, 1, 5, dtype=torch.float64)

    result = anchor_scores(tokens, config(scorer=scorer))
    assert torch.equal(seen[0], tokens)
    assert (result.scores.dtype, result.scores.tolist()) == (torch.float32, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert result.labels.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(4), r"scorer must return scores of shape \(5,\), one per token, got \(4,\)"),
        (torch.zeros(5, 1), r"got \(5, 1\)"),
        (torch.tensor([0, 0.5, 1, torch.nan, 0]), "scorer must return finite scores in .0, 1., got nan"),
        (torch.tensor([0, 0.5, 1.5, -1, 0]), r"got 1.5 \(2 scores are outside\)"),
        ("high", "scorer must return a tensor or an array of scores, got str"),
    ],
    ids=["length", "2-D", "nan", "range", "string"],
)
def test_what_a_function_returns_is_checked(returned, message):
    with pytest.raises(ValueError, match=message):
        anchor_scores(torch.randn(5, 3), config(scorer=lambda _: returned))


def test_bad_tokens_are_refused():
    with pytest.raises(ValueError, match="got 1 NaN or infinite values, the first at token 2, feature 0"):
        anchor_scores(torch.tensor([[0.0], [1.0], [torch.inf]]), config(scorer="uniform"))
    with pytest.raises(TypeError, match="int64"):
        anchor_scores(torch.ones(3, 3, dtype=torch.int64), config())


def test_unconverged_scores_say_so():
    with pytest.warns(ConvergenceWarning):
        result = anchor_scores(vit_like(), config(tol=1e-17))
    assert not result.converged
    assert result.residual > 1e-17


def test_too_many_tokens_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _: 1000)
    monkeypatch.setattr(scores, "token_features", lambda *_: pytest.fail("the PCA was computed"))
    with pytest.raises(MemoryError, match=r"256 tokens over 256 \(rank 16"):
        anchor_scores(vit_like(), config())


def test_progress_is_reported_rarely(monkeypatch, capsys):
    clock = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    times, calls = [], []

    def progress(*call) -> None:
        times.append(time.monotonic())
        calls.append(call)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        anchor_scores(vit_like(), config(), progress=progress)
    assert calls[0] == ("pca", 0, 1)
    assert any(stage == "solve" and 0 < done <= total == 256 for stage, done, total in calls)
    assert calls[-1] == ("score", 1, 1)
    assert np.diff(times[:-1]).min() >= 0.25
    assert capsys.readouterr() == ("", "")
