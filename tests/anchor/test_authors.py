"""reproduce(): the authors' steps, written out densely, against ours."""

import numpy as np
import pytest
import torch
from reference import textbook_iterates, textbook_weights
from sklearn.cluster import SpectralClustering
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from tokens import vit_like
from torch import Tensor

from videoanchor_triton.anchor import authors, scores
from videoanchor_triton.anchor.authors import authors_self_expression
from videoanchor_triton.anchor.config import Scorer, VideoAnchorConfig
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores

RHO, THRESHOLD = 300.0, 2e-4


def authors_pipeline(tokens: Tensor, rank: int, n_clusters: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Scores and labels by the published steps: PCA, ADMM on N x N matrices, spectral clustering, bfloat16."""
    Y = PCA(rank, svd_solver="full").fit_transform(tokens.double().numpy()).T
    weights = textbook_weights(Y, 800.0, 800.0)
    C = np.zeros((Y.shape[1],) * 2)
    for A, C in textbook_iterates(Y, *weights, RHO, True, 10_000, 1.0):
        if np.linalg.norm(A - C, ord=np.inf) < THRESHOLD:
            break
    clustering = SpectralClustering(n_clusters, affinity="precomputed", assign_labels="discretize", random_state=seed)
    labels = clustering.fit_predict(np.abs(C) + np.abs(C).T)
    sums = torch.from_numpy(C).to(torch.bfloat16).sum(dim=-1)
    found = torch.from_numpy(labels).long()
    score = sums * (torch.bincount(found, minlength=n_clusters) / len(found))[found]
    score = (score - score.min()) / (score.max() - score.min() + 1e-5)
    return score.to(torch.bfloat16), labels


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_and_labels_are_the_authors(seed: int) -> None:
    tokens = vit_like(n_frames=4, per_frame=17, seed=seed)
    expected, labels = authors_pipeline(tokens, rank=12, n_clusters=5, seed=3)
    config = VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=5, pca_rank=12, random_state=3).reproduce()
    result = anchor_scores(tokens.double(), config)
    assert np.array_equal(result.labels.numpy(), labels)
    # a coefficient at the border between two bfloat16 values moves a score by one unit in the last place
    assert ((result.scores - expected.float()).abs() <= 2**-8 * expected.float()).all()
    assert (result.scores == expected.float()).float().mean() > 0.95
    assert result.converged
    assert result.duality_gap is None, "theirs is not known"
    exact = anchor_scores(tokens.double(), VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=5, pca_rank=12))
    assert not torch.equal(exact.scores, result.scores), "the arithmetic shows, so the comparison can fail"


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize("alpha_e", [800.0, 3.0], ids=["error-zero", "error-active"])
def test_iterates_and_stopping_rule_are_theirs(affine: bool, alpha_e: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Y, options = token_features(tokens, 8), SolverOptions(affine=affine, alpha_e=alpha_e)
    found = authors_self_expression(Y, options)
    weights = textbook_weights(Y.numpy(), alpha_e, 800.0)
    iterates = list(textbook_iterates(Y.numpy(), *weights, RHO, affine, found.n_iter, 1.0))
    np.testing.assert_allclose(found.to_dense().numpy(), iterates[-1][1], atol=1e-9, rtol=0)
    np.testing.assert_allclose(found.row_sums().numpy(), iterates[-1][1].sum(1), atol=1e-8, rtol=0)
    differences = np.array([np.abs(A - C).sum(1).max() for A, C in iterates])
    assert differences[-1] < THRESHOLD
    assert (differences[:-1] >= THRESHOLD).all()
    assert found.converged
    monkeypatch.setattr(authors, "MAX_ITER", 5)
    with pytest.warns(ConvergenceWarning, match="stopping rule was not met within 5 iterations"):
        missed = authors_self_expression(Y, options)
    assert not missed.converged
    assert missed.n_iter == 5


def test_memory_of_theirs_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(MemoryError, match="the authors' self-expression of 1000 tokens"):
        authors_self_expression(torch.zeros(3, 1000), SolverOptions(memory_budget=10 * 8 * 1000**2 - 1))


@pytest.mark.parametrize("scorer", ["ssc", "knn"])
def test_tokens_that_do_not_fit_are_refused_before_the_pca(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "token_features", lambda *_: pytest.fail("the PCA was computed"))
    settings = VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, scorer=scorer, memory_budget=10 * 8 * 100**2 - 1)
    with pytest.raises(MemoryError, match="the authors' self-expression of 100 tokens"):
        anchor_scores(torch.randn(100, 3), settings.reproduce())


def test_reproduce_keeps_what_was_given_and_switches_the_rest() -> None:
    config = VideoAnchorConfig.preset("internvl2-8b", n_clusters=7, pca_rank=9).reproduce()
    assert (config.alpha_q, config.alpha_k, config.alpha_v, config.n_clusters, config.pca_rank) == (4.0, 9.5, 2.5, 7, 9)
    assert (config.arithmetic, config.assign_labels, config.decode) == ("authors", "discretize", "prefill")
    assert (config.affine, config.assign_labels) == (True, "discretize")
    assert config.reproduce() == config


def test_fewer_tokens_than_clusters() -> None:
    config = VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=24).reproduce()
    result = anchor_scores(vit_like(n_frames=1, per_frame=9), config)
    assert result.scores.isfinite().all()
    assert len(result.labels.unique()) <= 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arithmetic": "authors"}, "reproduce"),
        ({"arithmetic": "authors", "assign_labels": "discretize", "n_clusters": "auto"}, "number of clusters"),
        ({"arithmetic": "bf16"}, "arithmetic must be one of 'exact', 'authors'"),
    ],
    ids=["another-algorithm", "auto-clusters", "unknown"],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, **settings)
