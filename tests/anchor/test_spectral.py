import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.cluster import SpectralClustering
from sklearn.cluster._spectral import cluster_qr
from sklearn.metrics import adjusted_rand_score

from videoanchor_triton.anchor import spectral
from videoanchor_triton.anchor.spectral import affinity_matrix, sparse_coefficients, spectral_labels

SIZES = pytest.mark.parametrize("n_tokens", [90, 600], ids=["dense", "iterative"])
ASSIGN = pytest.mark.parametrize("assign_labels", ["discretize", "cluster_qr"])


def block_graph(truth: np.ndarray, across: float, seed: int = 0) -> scipy.sparse.csr_array:
    """Random symmetric affinities, near 1 inside a group and up to `across` between groups."""
    random = np.random.default_rng(seed)
    same = truth[:, None] == truth[None, :]
    weights = np.where(same, random.uniform(0.5, 1, same.shape), random.uniform(0, across, same.shape))
    np.fill_diagonal(weights, 0)
    return scipy.sparse.csr_array(weights + weights.T)


def groups(n_tokens: int, n_groups: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n_tokens) % n_groups)


def ring(n_tokens: int) -> scipy.sparse.csr_array:
    """A cycle: all eigenvalues but one or two come in pairs."""
    forward = scipy.sparse.csr_array(np.roll(np.eye(n_tokens), 1, axis=1))
    return (forward + forward.T).tocsr()


def test_coefficients_become_sparse_and_the_affinity_symmetric():
    coef = torch.tensor([[0.0, 0.5, 0.0], [-2.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    sparse = sparse_coefficients(coef)
    assert sparse.nnz == 3
    np.testing.assert_array_equal(sparse.toarray(), coef.numpy())
    np.testing.assert_array_equal(affinity_matrix(sparse).toarray(), [[0, 2.5, 3], [2.5, 0, 0], [3, 0, 0]])
    assert sparse_coefficients(torch.zeros(0, 0)).shape == (0, 0)


@SIZES
@ASSIGN
@pytest.mark.parametrize("across", [0.0, 0.02], ids=["disconnected", "connected"])
def test_finds_the_groups(n_tokens, assign_labels, across):
    truth = groups(n_tokens, 5)
    labels = spectral_labels(block_graph(truth, across), 5, assign_labels=assign_labels)
    assert labels.dtype == np.int64
    assert set(labels) == set(range(5))
    assert adjusted_rand_score(truth, labels) == 1.0


@SIZES
@ASSIGN
def test_cuts_inside_the_parts_of_a_disconnected_graph(n_tokens, assign_labels):
    truth = groups(n_tokens, 6)
    graph = block_graph(truth, 0.02).toarray() * (truth[:, None] // 3 == truth[None, :] // 3)
    labels = spectral_labels(scipy.sparse.csr_array(graph), 6, assign_labels=assign_labels)
    assert adjusted_rand_score(truth, labels) == 1.0


def test_agrees_with_scikit_learn():
    graph = block_graph(groups(200, 4), 0.4)
    theirs = SpectralClustering(4, affinity="precomputed", assign_labels="discretize", random_state=0)
    assert adjusted_rand_score(theirs.fit_predict(graph), spectral_labels(graph, 4)) == 1.0


@SIZES
def test_eigenvectors_lead(n_tokens):
    graph = block_graph(groups(n_tokens, 3), 0.9)
    root = np.sqrt(graph.sum(axis=1))
    part = np.zeros(n_tokens, dtype=int)
    found = spectral._embedding(graph, part, 6, np.random.RandomState(0), torch.device("cpu")) * root[:, None]
    values, vectors = np.linalg.eigh(graph.toarray() / root[:, None] / root)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(vectors[:, -6:].T @ found, axis=0), 1, atol=1e-9)
    np.testing.assert_allclose(np.diag(found.T @ (graph.toarray() / root[:, None] / root) @ found), values[:-7:-1])


def test_eigenvectors_are_orthogonal_where_only_one_eigenvalue_is_positive():
    graph = scipy.sparse.csr_array(np.ones((20, 20)) - np.eye(20))
    found = spectral._embedding(graph, np.zeros(20, dtype=int), 4, np.random.RandomState(0), torch.device("cpu"))
    np.testing.assert_allclose(found.T @ found * 19, np.eye(4), atol=1e-9)


def test_labels_are_assigned_as_asked():
    graph = block_graph(groups(90, 4), 1.0)
    embedding = spectral._embedding(graph, np.zeros(90, dtype=int), 8, np.random.RandomState(0), torch.device("cpu"))
    by_qr = spectral_labels(graph, 8, assign_labels="cluster_qr")
    assert adjusted_rand_score(cluster_qr(embedding), by_qr) == 1.0
    assert adjusted_rand_score(spectral_labels(graph, 8), by_qr) < 1.0


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
@pytest.mark.parametrize("n_clusters", [5, 24])
def test_enough_clusters_for_all(n_tokens, n_clusters):
    np.testing.assert_array_equal(spectral_labels(ring(n_tokens), n_clusters), np.arange(n_tokens))


def test_one_cluster():
    np.testing.assert_array_equal(spectral_labels(ring(7), 1), np.zeros(7))


@SIZES
def test_tokens_without_affinity_share_a_cluster(n_tokens):
    truth = groups(n_tokens, 4)
    graph = block_graph(truth, 0.02).toarray()
    graph[truth == 3] = graph[:, truth == 3] = 0
    labels = spectral_labels(scipy.sparse.csr_array(graph), 4)
    assert adjusted_rand_score(truth, labels) == 1.0
    assert set(labels) == set(range(4))


def test_no_affinity_at_all_is_one_cluster():
    np.testing.assert_array_equal(spectral_labels(scipy.sparse.csr_array((9, 9)), 4), np.zeros(9))


def test_whole_parts_are_dealt_evenly():
    sizes = [2, 9, 3, 4, 2, 2]
    graph = scipy.sparse.block_diag([np.ones((size, size)) - np.eye(size) for size in sizes], format="csr")
    labels = spectral_labels(scipy.sparse.csr_array(graph), 3)
    part = np.repeat(np.arange(6), sizes)
    cluster_of = [set(labels[part == index]) for index in range(6)]
    assert cluster_of == [{2}, {0}, {2}, {1}, {1}, {2}]
    assert np.bincount(labels).tolist() == [9, 6, 7]


@pytest.mark.parametrize(
    "graph",
    [
        ring(90),
        ring(600),
        scipy.sparse.csr_array(scipy.sparse.block_diag([ring(300), ring(300)])),
        scipy.sparse.csr_array(np.ones((600, 600)) - np.eye(600)),
        scipy.sparse.csr_array(np.ones((20, 20)) - np.eye(20)),
    ],
    ids=["ring-dense", "ring", "two-rings", "complete", "complete-dense"],
)
@ASSIGN
def test_repeated_eigenvalues_are_reproducible(graph, assign_labels):
    first, second = (spectral_labels(graph, 6, assign_labels=assign_labels, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert set(first) == set(range(first.max() + 1))
    assert first.max() < 6


def test_a_ring_is_cut_into_arcs():
    labels = spectral_labels(ring(600), 6)
    assert (labels != np.roll(labels, 1)).sum() == 6
    assert np.bincount(labels).min() > 60


def test_random_state_may_be_a_generator():
    graph = block_graph(groups(600, 4), 0.9)
    first, second = (spectral_labels(graph, 4, random_state=np.random.RandomState(1)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def fake_cupy(monkeypatch, device_error: Exception | None = None) -> list[object]:
    """NumPy and SciPy under CuPy's names; returns the list of devices that were entered."""
    entered = []

    def device(index: int) -> nullcontext:
        entered.append(index)
        if device_error is not None:
            raise device_error
        return nullcontext()

    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(
        asarray=np.asarray,
        asnumpy=np.asarray,
        eye=np.eye,
        argsort=np.argsort,
        linalg=np.linalg,
        cuda=types.SimpleNamespace(Device=device),
    )
    cupyx = types.ModuleType("cupyx")
    cupyx.__dict__["scipy"] = scipy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    monkeypatch.setitem(sys.modules, "cupyx.scipy", scipy)
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse", scipy.sparse)
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse.linalg", scipy.sparse.linalg)
    return entered


@SIZES
def test_cuda_enters_the_same_device_in_cupy(n_tokens, monkeypatch):
    graph = block_graph(groups(n_tokens, 4), 0.5)
    expected = spectral_labels(graph, 4)
    entered = fake_cupy(monkeypatch)
    np.testing.assert_array_equal(spectral_labels(graph, 4, device="cuda:3"), expected)
    assert entered == [3]


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, Exception])
def test_cuda_without_a_working_cupy_uses_scipy(monkeypatch, kind):
    graph = block_graph(groups(600, 4), 0.5)
    expected = spectral_labels(graph, 4)
    monkeypatch.setitem(sys.modules, "cupy", None)
    np.testing.assert_array_equal(spectral_labels(graph, 4, device="cuda"), expected)
    fake_cupy(monkeypatch, kind("CUDADriverError"))
    with pytest.warns(UserWarning, match="CuPy failed, SciPy computes .* CUDADriverError"):
        np.testing.assert_array_equal(spectral_labels(graph, 4, device="cuda"), expected)
