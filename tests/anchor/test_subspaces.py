"""How well the affinity defines the subspaces: eigengaps, projector sizes, labels whatever the eigensolver."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from videoanchor_triton.anchor import eigenvectors, spectral
from videoanchor_triton.anchor.affinity import affinity_matrix
from videoanchor_triton.anchor.eigenvectors import chebyshev_filtered
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.anchor.spectral import spectral_labels, spectral_subspaces

from .test_spectral import ASSIGN, SIZES, block_graph, complete, embedding_of, groups, ring
from .tokens import DEVICES, vit_like


def subspaces_of(affinity: Tensor, n_clusters, **options) -> spectral.Subspaces:
    found = spectral_subspaces(affinity, n_clusters, **options)
    assert torch.equal(found.labels, spectral_labels(affinity, n_clusters, **options))
    assert (found.projector_size.dtype, found.projector_size.shape) == (torch.float64, found.labels.shape)
    assert found.projector_size.device == affinity.device
    assert ((found.projector_size > 1 - 1e-9) & (found.projector_size < len(affinity) + 1e-9)).all()
    return found


@SIZES
@pytest.mark.parametrize("n_groups", [2, 3, 7])
@pytest.mark.parametrize("across", [0.0, 0.3], ids=["disconnected", "connected"])
@pytest.mark.parametrize("device", DEVICES)
def test_planted_clusters_are_in_a_gap(n_tokens, n_groups, across, device):
    graph = block_graph(groups(n_tokens, n_groups), across).to(device)
    root = graph.sum(1).sqrt()
    values = torch.linalg.eigvalsh(graph / root / root[:, None]).flip(0)
    for asked in (n_groups, "auto"):
        found = subspaces_of(graph, asked)
        assert found.in_gap
        assert found.eigengap == pytest.approx(float(values[n_groups - 1] - values[n_groups]), abs=1e-9)
    for other in (n_groups + 1, 2 * n_groups + 3):
        assert not subspaces_of(graph, other).in_gap


@pytest.mark.parametrize("n_clusters", [3, 6, 24])
def test_no_number_of_clusters_is_in_a_gap_where_there_are_none(n_clusters):
    assert not subspaces_of(ring(600), n_clusters).in_gap
    random = np.random.default_rng(0)
    graph = torch.from_numpy(random.random((600, 600)) * (random.random((600, 600)) < 0.05))
    found = subspaces_of(graph + graph.T, n_clusters)
    assert found.eigengap is not None
    assert found.eigengap > 0
    assert found.in_gap is False


def test_gaps_where_eigenvalues_say_nothing():
    parts = torch.block_diag(*[complete(3)] * 5)
    found = subspaces_of(parts, 3)
    assert (found.eigengap, found.in_gap) == (0.0, False), "whole parts share a cluster"
    assert subspaces_of(parts, 5).eigengap == pytest.approx(1.5)
    for nothing in (subspaces_of(complete(4), 4), subspaces_of(torch.zeros(4, 4), 2), subspaces_of(parts[:0, :0], 2)):
        assert (nothing.eigengap, nothing.in_gap) == (None, None)
    lonely = torch.block_diag(parts, torch.zeros(4, 4))
    assert subspaces_of(lonely, 6).eigengap == pytest.approx(1.5), "they are no cluster of the graph"


@ASSIGN
@pytest.mark.parametrize("across", [0.0, 1e-6], ids=["disconnected", "connected"])
def test_projector_sizes_of_clusters_are_their_sizes(assign_labels, across):
    """Whatever the degrees; tokens without affinity are a cluster too."""
    truth = np.repeat(np.arange(3), [10, 30, 60])
    graph = block_graph(truth, across)
    scale = torch.from_numpy(np.random.default_rng(0).uniform(0.01, 100, 100))
    graph = torch.block_diag(graph * scale * scale[:, None], torch.zeros(7, 7))
    found = subspaces_of(graph, 4, assign_labels=assign_labels)
    np.testing.assert_allclose(found.projector_size, np.repeat([10, 30, 60, 7], [10, 30, 60, 7]), rtol=1e-2)


def test_projector_sizes_follow_their_definition():
    graph = block_graph(groups(90, 4), 0.9)
    space = np.linalg.qr(embedding_of(graph, 6)[1])[0]
    found = subspaces_of(graph, 6).projector_size
    np.testing.assert_allclose(found, 1 / np.diag(space @ space.T), rtol=1e-9)
    assert 1 / found.sum() < 6 < (1 / found).sum() + 1e-9
    whole = subspaces_of(torch.block_diag(*[complete(3)] * 5), 3)
    np.testing.assert_array_equal(whole.projector_size, np.bincount(whole.labels)[whole.labels])


@pytest.mark.parametrize("scale", [1e-300, 1e-310, 1e307])
def test_the_scale_of_the_affinity_does_not_matter(scale):
    graph = block_graph(groups(90, 4), 0.9)
    found, plain = subspaces_of(graph * scale, 6), subspaces_of(graph, 6)
    assert torch.equal(found.labels, plain.labels)
    torch.testing.assert_close(found.projector_size, plain.projector_size)


def photo_patches() -> Tensor:
    """(400, 588) patches of 14 x 14 pixels of one of scikit-learn's photographs."""
    pixels = torch.from_numpy(load_sample_images().images[0][:280, :280].astype(np.float32)) / 255
    return pixels.unfold(0, 14, 14).unfold(1, 14, 14).reshape(400, -1)


@pytest.mark.parametrize(
    ("tokens", "n_clusters"),
    [(vit_like(8, 48), 24), (photo_patches(), 22), (torch.from_numpy(load_digits(return_X_y=True)[0][:400]), 10)],
    ids=["vit-like", "photo", "digits"],
)
def test_labels_do_not_depend_on_the_eigensolver(tokens, n_clusters, monkeypatch):
    """LAPACK's, ARPACK's and the filters of CUDA, on affinities where k is in no gap."""
    solution = self_expression(token_features(tokens, 32))
    affinity = affinity_matrix(solution.indices, solution.values)
    lapack = subspaces_of(affinity, n_clusters)
    monkeypatch.setattr(eigenvectors, "DENSE_SIZE", 0)
    monkeypatch.setattr(eigenvectors, "DENSE_RATIO", 1)
    arpack = subspaces_of(affinity, n_clusters)

    def filtered(product, _dense, size, count, _device):
        start = torch.randn(size, count + 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return chebyshev_filtered(product, start, count)

    monkeypatch.setattr(spectral, "leading_eigenvectors", filtered)
    for found in (arpack, subspaces_of(affinity, n_clusters)):
        assert adjusted_rand_score(lapack.labels, found.labels) == 1.0
        torch.testing.assert_close(found.projector_size, lapack.projector_size, rtol=1e-6, atol=0)
        assert found.eigengap == pytest.approx(lapack.eigengap, abs=1e-9)
        assert found.in_gap is lapack.in_gap is False
