"""Tokens expressed by their nearest ones: scorer="knn"."""

from typing import get_args

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.cluster import SpectralClustering
from sklearn.neighbors import kneighbors_graph

import videoanchor_triton as va
from videoanchor_triton.anchor.affinity import affinity_matrix
from videoanchor_triton.anchor.config import Score
from videoanchor_triton.anchor.neighbors import N_NEIGHBORS, neighbor_expression

from .tokens import vit_like


def config(**settings: object) -> va.VideoAnchorConfig:
    return va.VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, scorer="knn", **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("n_tokens", [11, 12, 97])
def test_the_graph_is_that_of_scikit_learn(n_tokens: int) -> None:
    points = torch.randn(n_tokens, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = neighbor_expression(points.T)
    graph = kneighbors_graph(points.numpy(), N_NEIGHBORS).toarray()  # row j: the nearest of j
    np.testing.assert_allclose(solution.to_dense().T.numpy(), graph / N_NEIGHBORS, rtol=1e-15)
    np.testing.assert_allclose(solution.row_sums().numpy(), graph.sum(0) / N_NEIGHBORS, rtol=1e-12)
    affinity = affinity_matrix(solution.indices, solution.values).to_dense().numpy()
    np.testing.assert_allclose(affinity, (graph + graph.T) / N_NEIGHBORS, rtol=1e-12)


def test_the_affinity_is_that_of_spectral_clustering() -> None:
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = neighbor_expression(points.T)
    clustering = SpectralClustering(3, affinity="nearest_neighbors", n_neighbors=11).fit(points.numpy())
    theirs = scipy.sparse.csr_array(clustering.affinity_matrix_).toarray()
    expected = 2 / N_NEIGHBORS * (theirs - np.diag(theirs.diagonal()))
    found = affinity_matrix(solution.indices, solution.values).to_dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_of_equally_near_tokens_the_first_are_taken(offset: float) -> None:
    points = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).repeat_interleave(7) + offset
    found = neighbor_expression(torch.stack([points, -points])).indices[16].sort().values  # a token at 2
    assert found.tolist() == [7, 8, 9, 10, 14, 15, 17, 18, 19, 20], "six at 2; the first four of seven at 1, seven at 3"


def test_a_common_offset_changes_nothing() -> None:
    points = torch.randn(5, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset, plain = (neighbor_expression(x).indices.sort(1).values for x in (points + 1e7, points))
    assert torch.equal(offset, plain)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 10])
def test_few_tokens(n_tokens: int) -> None:
    points = torch.randn(4, n_tokens, generator=torch.Generator().manual_seed(0))
    solution = neighbor_expression(points)
    dense = solution.to_dense()
    assert dense.shape == (n_tokens, n_tokens)
    assert not dense.diagonal().any()
    if n_tokens > 1:
        torch.testing.assert_close(dense.sum(0), torch.ones(n_tokens, dtype=torch.float64))
    result = va.anchor_scores(points.T, config(n_clusters=2))
    assert result.scores.shape == (n_tokens,)


def test_duplicates_and_equal_tokens() -> None:
    points = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 20)
    dense = neighbor_expression(points).to_dense()
    same = torch.arange(120)[:, None] % 6 == torch.arange(120) % 6
    assert not dense[~same].any(), "20 copies are nearer than anything else"
    assert not neighbor_expression(torch.ones(4, 30)).values.any()


@pytest.mark.parametrize("score", get_args(Score))
def test_every_score(score: str) -> None:
    frames = torch.arange(80) // 20
    result = va.anchor_scores(vit_like(4, 20), config(n_clusters=4, score=score), frames=frames)
    assert result.scores.isfinite().all()
    assert result.scores.min() >= 0
    assert result.scores.max() <= 1
    assert result.converged
    assert result.duality_gap is None


@pytest.mark.parametrize(("name", "control"), [("published", "permuted"), ("cross_frame", "cross_frame_permuted")])
def test_permuted_scores_are_the_same_ones_elsewhere(name: str, control: str) -> None:
    tokens, frames = vit_like(4, 20), torch.arange(80) % 4

    def scores(seed: int, score: str) -> torch.Tensor:
        settings = config(n_clusters=4, score=score, random_state=seed)
        return va.anchor_scores(tokens, settings, frames=frames).scores

    found, permuted = scores(0, name), scores(0, control)
    torch.testing.assert_close(permuted.sort().values, found.sort().values, rtol=0, atol=0)
    assert (permuted != found).float().mean() > 0.5
    assert torch.equal(permuted, scores(0, control))
    assert not torch.equal(permuted, scores(1, control))


def test_auto_counts_clusters() -> None:
    centres = 50 * torch.eye(3, 8).repeat_interleave(30, 0)
    tokens = centres + torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    assert va.anchor_scores(tokens, config(n_clusters="auto")).labels.amax() == 2


def test_a_stream_takes_the_papers_method_alone() -> None:
    with pytest.raises(ValueError, match='scorer must be "ssc" for a stream'):
        va.AnchorStream(config())
