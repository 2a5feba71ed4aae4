import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import SpectralClustering
from sklearn.cluster._spectral import cluster_qr, discretize  # private: for comparison only
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videoanchor_triton.anchor import spectral
from videoanchor_triton.anchor.affinity import affinity_matrix
from videoanchor_triton.anchor.spectral import spectral_labels

from .tokens import DEVICES

SIZES = pytest.mark.parametrize("n_tokens", [90, 600], ids=["dense", "iterative"])
ASSIGN = pytest.mark.parametrize("assign_labels", ["discretize", "cluster_qr", "kmeans"])


def block_graph(truth: np.ndarray, across: float, seed: int = 0) -> Tensor:
    """Random symmetric affinities, near 1 inside a group and up to `across` between groups."""
    random = np.random.default_rng(seed)
    same = truth[:, None] == truth[None, :]
    weights = np.where(same, random.uniform(0.5, 1, same.shape), random.uniform(0, across, same.shape))
    np.fill_diagonal(weights, 0)
    return torch.from_numpy(weights + weights.T)


def groups(n_tokens: int, n_groups: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n_tokens) % n_groups)


def ring(n_tokens: int) -> Tensor:
    """A cycle: all eigenvalues but one or two come in pairs."""
    forward = torch.eye(n_tokens).roll(1, 1)
    return forward + forward.T


def complete(n_tokens: int) -> Tensor:
    return torch.ones(n_tokens, n_tokens) - torch.eye(n_tokens)


def labels_of(affinity: Tensor, n_clusters, **options) -> np.ndarray:
    labels = spectral_labels(affinity, n_clusters, **options)
    assert (labels.dtype, labels.device, labels.shape) == (torch.int64, affinity.device, affinity.shape[:1])
    assert torch.equal(labels.unique(), torch.arange(len(labels.unique()), device=labels.device))
    return labels.cpu().numpy()


def embedding_of(affinity: Tensor, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
    graph, linked = spectral._linked_graph(affinity)
    assert linked.all()
    n_parts, part = spectral._parts(graph)
    return spectral._embedding(graph, part, n_parts, n_vectors)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made inside the block."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.elements = max(self.elements, leaf.numel())
        return result


@SIZES
@ASSIGN
@pytest.mark.parametrize("across", [0.0, 0.02], ids=["disconnected", "connected"])
@pytest.mark.parametrize("device", DEVICES)
def test_finds_the_groups(n_tokens, assign_labels, across, device):
    truth = groups(n_tokens, 5)
    labels = labels_of(block_graph(truth, across).to(device), 5, assign_labels=assign_labels)
    assert adjusted_rand_score(truth, labels) == 1.0


@SIZES
@ASSIGN
def test_cuts_inside_the_parts_of_a_disconnected_graph(n_tokens, assign_labels):
    truth = groups(n_tokens, 6)
    graph = block_graph(truth, 0.02) * torch.from_numpy(truth[:, None] // 3 == truth[None, :] // 3)
    assert adjusted_rand_score(truth, labels_of(graph, 6, assign_labels=assign_labels)) == 1.0


@ASSIGN
def test_agrees_with_scikit_learn(assign_labels):
    graph = block_graph(groups(200, 4), 0.4)
    theirs = SpectralClustering(4, affinity="precomputed", assign_labels=assign_labels, random_state=0)
    labels = labels_of(graph, 4, assign_labels=assign_labels)
    assert adjusted_rand_score(theirs.fit_predict(graph.numpy()), labels) == 1.0


@SIZES
def test_eigenvectors_lead(n_tokens):
    graph = block_graph(groups(n_tokens, 3), 0.9)
    graph /= graph.amax()
    root = graph.numpy().sum(axis=1) ** 0.5
    eigenvalues, found = embedding_of(graph, 6)
    found = found * root[:, None]
    normalised = graph.numpy() / root[:, None] / root
    values, vectors = np.linalg.eigh(normalised)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(vectors[:, -6:].T @ found, axis=0), 1, atol=1e-9)
    np.testing.assert_allclose(np.diag(found.T @ normalised @ found), values[:-7:-1])
    np.testing.assert_allclose(eigenvalues, values[:-7:-1])


def test_eigenvectors_are_orthogonal_where_only_one_eigenvalue_is_positive():
    _, found = embedding_of(complete(20), 4)
    np.testing.assert_allclose(found.T @ found * 19, np.eye(4), atol=1e-9)


def test_labels_are_assigned_as_asked():
    graph = block_graph(groups(90, 4), 1.0)
    by_qr = labels_of(graph, 8, assign_labels="cluster_qr")
    assert adjusted_rand_score(cluster_qr(embedding_of(graph, 8)[1]), by_qr) == 1.0
    np.testing.assert_array_equal(labels_of(graph, 8), by_qr)
    assert adjusted_rand_score(labels_of(graph, 8, assign_labels="discretize"), by_qr) < 1.0
    assert adjusted_rand_score(labels_of(graph, 8, assign_labels="kmeans"), by_qr) < 1.0
    by_qr_again = labels_of(graph, 8, assign_labels="cluster_qr", random_state=1)
    np.testing.assert_array_equal(by_qr, by_qr_again)


def test_kmeans_sees_directions_not_lengths():
    directions = np.repeat(np.eye(3), 20, axis=0) + 0.1
    lengths = np.random.default_rng(0).uniform(0.01, 100, (60, 1))
    labels = spectral._assign(directions * lengths, "kmeans", np.random.RandomState(0))
    assert adjusted_rand_score(np.repeat(np.arange(3), 20), labels) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_assignments_are_those_of_scikit_learn_on_the_same_embedding(seed):
    embedding = embedding_of(block_graph(groups(300, 6, seed), 0.9, seed), 9)[1]
    np.testing.assert_array_equal(spectral._cluster_qr(embedding), cluster_qr(embedding))
    ours = spectral._discretize(embedding, np.random.RandomState(seed))
    np.testing.assert_array_equal(ours, discretize(embedding, random_state=seed, n_iter_max=1000))


def test_discretize_searches_until_it_converges(monkeypatch):
    random = np.random.default_rng(0)
    graph = torch.from_numpy(random.random((600, 600)) * (random.random((600, 600)) < 0.05))
    graph = graph + graph.T
    labels = labels_of(graph, 16, assign_labels="discretize")
    monkeypatch.setattr(spectral, "DISCRETIZE_ITERATIONS", 10_000)
    np.testing.assert_array_equal(labels_of(graph, 16, assign_labels="discretize"), labels)
    monkeypatch.setattr(spectral, "DISCRETIZE_ITERATIONS", 5)
    assert adjusted_rand_score(labels_of(graph, 16, assign_labels="discretize"), labels) < 0.99


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
@pytest.mark.parametrize("n_clusters", [5, 24])
def test_enough_clusters_for_all(n_tokens, n_clusters):
    np.testing.assert_array_equal(labels_of(complete(n_tokens), n_clusters), np.arange(n_tokens))


@pytest.mark.parametrize("n_clusters", [1, 24, "auto"])
def test_no_tokens(n_clusters):
    assert labels_of(torch.zeros(0, 0), n_clusters).shape == (0,)


def test_one_cluster():
    np.testing.assert_array_equal(labels_of(ring(7), 1), np.zeros(7))
    np.testing.assert_array_equal(labels_of(torch.block_diag(ring(7), torch.zeros(2, 2)), 1), np.zeros(9))


@SIZES
@ASSIGN
def test_tokens_without_affinity_share_a_cluster(n_tokens, assign_labels):
    truth = groups(n_tokens, 4)
    graph = block_graph(truth, 0.02)
    graph[truth == 3] = 0
    graph[:, truth == 3] = 0
    labels = labels_of(graph, 4, assign_labels=assign_labels)
    assert adjusted_rand_score(truth, labels) == 1.0
    assert set(labels[truth == 3]) == {3}


def test_no_affinity_at_all_is_one_cluster():
    np.testing.assert_array_equal(labels_of(torch.zeros(9, 9), 4), np.zeros(9))
    np.testing.assert_array_equal(labels_of(torch.eye(9), 4), np.zeros(9))


def test_two_clusters_part_the_tokens_without_affinity():
    graph = torch.block_diag(complete(4), torch.zeros(3, 3), complete(2))
    np.testing.assert_array_equal(labels_of(graph, 2), [0, 0, 0, 0, 1, 1, 1, 0, 0])


def test_fewer_tokens_with_affinity_than_clusters():
    graph = torch.block_diag(complete(3), torch.zeros(7, 7))
    np.testing.assert_array_equal(labels_of(graph, 5), [0, 1, 2] + [3] * 7)


def test_clusters_that_no_token_was_assigned_to_are_dropped(monkeypatch):
    monkeypatch.setattr(spectral, "_assign", lambda *_arguments: np.array([3, 1, 1, 7, 3]))
    np.testing.assert_array_equal(labels_of(torch.block_diag(complete(5), torch.zeros(1, 1)), 5), [1, 0, 0, 2, 1, 3])


def test_whole_parts_are_dealt_evenly():
    sizes = [2, 9, 3, 4, 2, 2]
    labels = labels_of(torch.block_diag(*map(complete, sizes)), 3)
    part = np.repeat(np.arange(6), sizes)
    assert [set(labels[part == index]) for index in range(6)] == [{2}, {0}, {2}, {1}, {1}, {2}]
    assert np.bincount(labels).tolist() == [9, 6, 7]


def test_parts_are_numbered_by_their_first_tokens():
    order = torch.tensor([2, 0, 6, 3, 1, 7, 4, 5, 8])
    graph, _ = spectral._linked_graph(torch.block_diag(complete(2), ring(4), complete(3))[order][:, order])
    n_parts, part = spectral._parts(graph)
    assert n_parts == 3
    np.testing.assert_array_equal(part, [0, 1, 2, 0, 1, 2, 0, 0, 2])


@pytest.mark.parametrize(
    "graph",
    [ring(90), ring(600), torch.block_diag(ring(300), ring(300)), complete(600), complete(20)],
    ids=["ring-dense", "ring", "two-rings", "complete", "complete-dense"],
)
@pytest.mark.parametrize("assign_labels", ["discretize", "cluster_qr"])
def test_repeated_eigenvalues_are_reproducible(graph, assign_labels):
    first, second = (labels_of(graph, 6, assign_labels=assign_labels, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.max() < 6


@ASSIGN
@pytest.mark.parametrize("device", DEVICES)
def test_labels_and_eigenvectors_repeat_to_the_bit(assign_labels, device):
    graph = block_graph(groups(700, 4), 0.95).to(device)
    first, second = (labels_of(graph, 9, assign_labels=assign_labels, random_state=5) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    if device == "cpu":
        np.testing.assert_array_equal(embedding_of(graph, 9)[1], embedding_of(graph, 9)[1])


def test_the_seed_matters_and_may_be_a_generator():
    graph = block_graph(groups(600, 4), 1.0)
    options = {"assign_labels": "discretize"}
    first, second = (labels_of(graph, 12, random_state=np.random.RandomState(1), **options) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert adjusted_rand_score(labels_of(graph, 12, random_state=2, **options), first) < 1.0
    np.testing.assert_array_equal(labels_of(graph, 12, random_state=1), labels_of(graph, 12, random_state=2))


def test_a_ring_is_cut_into_arcs():
    labels = labels_of(ring(600), 6)
    assert (labels != np.roll(labels, 1)).sum() == 6
    assert np.bincount(labels).min() > 60


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_any_layout(layout, dtype):
    graph = block_graph(groups(90, 4), 0.9).float().to(dtype)
    np.testing.assert_array_equal(labels_of(graph.to_sparse(layout=layout), 6), labels_of(graph, 6))


@pytest.mark.parametrize("n_groups", [2, 3, 7])
@pytest.mark.parametrize("across", [0.0, 0.3], ids=["disconnected", "connected"])
@SIZES
def test_auto_counts_the_groups(n_tokens, across, n_groups):
    truth = groups(n_tokens, n_groups)
    labels = labels_of(block_graph(truth, across), "auto")
    assert adjusted_rand_score(truth, labels) == 1.0


def test_auto_counts_groups_inside_parts_and_tokens_without_affinity():
    truth = groups(120, 6)
    graph = block_graph(truth, 0.1) * torch.from_numpy(truth[:, None] // 2 == truth[None, :] // 2)
    assert adjusted_rand_score(truth, labels_of(graph, "auto")) == 1.0
    lonely = labels_of(torch.block_diag(graph, torch.zeros(5, 5)), "auto")
    assert adjusted_rand_score(np.append(truth, [6] * 5), lonely) == 1.0


def test_auto_deals_more_parts_than_its_maximum(monkeypatch):
    graph = torch.block_diag(*[complete(3)] * 9)
    assert labels_of(graph, "auto").max() == 8
    monkeypatch.setattr(spectral, "MAX_AUTO_CLUSTERS", 4)
    assert np.bincount(labels_of(graph, "auto")).tolist() == [9, 6, 6, 6]
    monkeypatch.setattr(spectral, "MAX_AUTO_CLUSTERS", 9)
    assert labels_of(graph, "auto").max() == 8


@pytest.mark.parametrize(("n_tokens", "n_clusters"), [(1, 1), (2, 1), (3, 2), (5, 2)])
def test_auto_of_few_tokens_without_structure(n_tokens, n_clusters):
    assert labels_of(complete(n_tokens), "auto").max() + 1 == n_clusters


@pytest.mark.parametrize(
    ("affinity", "n_clusters", "error", "message"),
    [
        (torch.ones(3, 4), 2, ValueError, r"square matrix, got shape \(3, 4\)"),
        (torch.ones(3), 2, ValueError, r"square matrix, got shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), 2, TypeError, "floating-point type, got torch.int64"),
        (torch.block_diag(complete(4), torch.tensor([[0, 1e-20], [0, 0]])), 2, ValueError, "must be symmetric"),
        (torch.full((3, 3), torch.nan), 2, ValueError, "finite values >= 0, got NaN"),
        (torch.full((3, 3), torch.inf), 2, ValueError, "finite values >= 0"),
        (-complete(3), 2, ValueError, "finite values >= 0"),
        (torch.eye(5).roll(1, 1), 2, ValueError, "must be symmetric"),
        (complete(5) + 1e-4 * torch.eye(5).roll(1, 1), 2, ValueError, "must be symmetric"),
        (complete(5), 0, ValueError, 'n_clusters must be >= 1 or "auto", got 0'),
    ],
    ids=[
        "not-square",
        "1-D",
        "integer",
        "hardly-directed",
        "nan",
        "inf",
        "negative",
        "directed",
        "hardly-symmetric",
        "n_clusters",
    ],
)
def test_bad_affinities_are_refused(affinity, n_clusters, error, message):
    with pytest.raises(error, match=message):
        spectral_labels(affinity, n_clusters)


def test_no_array_is_larger_than_the_coefficients_or_the_eigenvectors():
    n_tokens, k, n_clusters = 3000, 6, 12
    truth = groups(n_tokens, n_clusters)
    members = [np.flatnonzero(truth == group) for group in range(n_clusters)]
    random = np.random.default_rng(0)
    indices = torch.from_numpy(np.stack([random.choice(members[group], k) for group in truth]))
    indices[::7, 0] = torch.from_numpy(random.integers(0, n_tokens, len(indices[::7])))
    with LargestTensor() as largest:
        labels = spectral_labels(affinity_matrix(indices, torch.ones(n_tokens, k)), n_clusters)
    assert adjusted_rand_score(truth, labels.numpy()) > 0.9
    assert largest.elements <= max(4 * n_tokens * k, n_tokens * (n_clusters + 1 + spectral.GAP_NEIGHBOURS))


def scattered_links(random: np.random.Generator, n_tokens: int) -> np.ndarray:
    """(2, m) links of which many parts stay apart."""
    return random.integers(0, n_tokens, (2, n_tokens // 2))


def one_path(random: np.random.Generator, n_tokens: int) -> np.ndarray:
    """(2, n - 1) a path through all tokens in any order: nothing is farther from its first token."""
    order = random.permutation(n_tokens)
    return np.stack([order[:-1], order[1:]])


@pytest.mark.parametrize("links_of", [scattered_links, one_path])
@pytest.mark.parametrize("n_tokens", [2, 37, 5000])
def test_parts_on_a_gpu_are_those_of_scipy(links_of, n_tokens: int) -> None:
    links = links_of(np.random.default_rng(n_tokens), n_tokens)
    rows, columns = np.concatenate([links, links[::-1]], 1)
    first = spectral.first_of_parts(torch.from_numpy(rows), torch.from_numpy(columns), n_tokens).numpy()
    graph = scipy.sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(n_tokens, n_tokens)).tocsr()
    _, part = connected_components(graph, directed=False)
    np.testing.assert_array_equal(first, np.unique(part, return_index=True)[1][part])
