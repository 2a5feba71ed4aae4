"""Subspaces of tokens: spectral clustering of their affinity."""

import heapq
import warnings
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.cluster._spectral import cluster_qr, discretize
from sklearn.utils import check_random_state
from torch import Tensor

from .eigenvectors import SparseMatrix, leading_eigenvectors
from .host_reads import places, read

AssignLabels = Literal["discretize", "cluster_qr", "kmeans"]

# The most clusters, apart from that of the tokens without affinity, that n_clusters="auto" finds.
MAX_AUTO_CLUSTERS = 50
# scikit-learn's default, 20, ends the search for the rotation early where the structure is weak.
DISCRETIZE_ITERATIONS = 1000
# Decimals to which eigengaps are compared; of equal ones the first is taken.
EQUAL_GAPS = 9
# Affinities may differ from their transpose by roundoff, not more.
ASYMMETRY = 1e-6


def spectral_labels(
    affinity: Tensor,
    n_clusters: int | Literal["auto"],
    *,
    assign_labels: AssignLabels = "discretize",
    random_state: int | np.random.RandomState | None = 0,
) -> Tensor:
    """Split tokens into clusters that few strong affinities cross (VideoAnchor, arXiv 2509.25151: normalised cut).

    The leading eigenvectors of D^-1/2 A D^-1/2, computed on the device of `affinity` (see `leading_eigenvectors`), are
    divided by the root of the degree, and scikit-learn turns these N * n_clusters numbers into labels on the CPU:
    `discretize` (Yu and Shi, 2003; the authors' choice), `cluster_qr` (Damle, Minden and Ying, 2019; without any
    randomness), or k-means of the rows scaled to length 1 (Ng, Jordan and Weiss, 2002; best of 10 starts). If the
    search of `discretize` breaks down, `cluster_qr` takes its place, with a warning. Where the eigenvectors alone
    leave the answer open it is fixed by rule:

    - n_clusters >= N: every token is its own cluster.
    - Tokens without any affinity share one cluster, the others make n_clusters - 1.
    - A disconnected graph with at least n_clusters parts is never cut: whole parts are dealt to the clusters,
      largest first, each to the smallest cluster so far.
    - A cluster that no token was assigned to is dropped, so there may be fewer than n_clusters.

    n_clusters="auto" takes the largest eigengap (von Luxburg, A tutorial on spectral clustering, 2007, section 8.3):
    the k that maximises lambda_k - lambda_(k+1), where 1 = lambda_1 >= lambda_2 >= ... are the eigenvalues of
    D^-1/2 A D^-1/2, among 2 <= k <= min(50, tokens with affinity - 1). Each connected part has an eigenvalue 1 of its
    own, so that k is never below the number of parts (more than 50 are dealt to 50 clusters). Tokens without affinity
    are one cluster more. It fails where the gap closes or is not the largest: with noise, or subspaces that intersect
    or are close, it finds too few; where a subspace's own graph is weakly connected or falls apart (few tokens, low
    dimension), too many; and it never finds that there is one cluster only, because every graph has the eigenvalue 1,
    and the gap behind it is the largest wherever clusters share much affinity.

    On the CPU the labels are the same to the bit run to run, with the same number of threads. On a CUDA device no sum
    depends on the order of threads either; CuPy's Lanczos iteration and cuSOLVER are as reproducible as cuBLAS is.

    Args:
        affinity: (N, N) floating-point tensor, dense or sparse, symmetric, entries >= 0; `affinity_matrix` makes one.
            The diagonal is not used.
        n_clusters: >= 1, or "auto".
        assign_labels: "discretize", "cluster_qr" or "kmeans".
        random_state: seed of the eigensolver's start, of the rotation that `discretize` starts from, and of k-means.

    Returns:
        (N,) int64 labels 0..k-1, every one of them in use, on the device of `affinity`.

    Raises:
        TypeError, ValueError: the affinity is not as described, or n_clusters is below 1.
        scipy.sparse.linalg.ArpackNoConvergence: the eigenvectors were not found, see `leading_eigenvectors`.
    """
    if n_clusters != "auto" and n_clusters < 1:
        raise ValueError(f'n_clusters must be >= 1 or "auto", got {n_clusters}')
    graph, linked = _linked_graph(affinity)
    n_tokens, n_linked = len(linked), graph.size
    if n_clusters != "auto" and n_clusters >= n_tokens:
        return torch.arange(n_tokens, device=affinity.device)
    n_remaining = n_clusters if n_clusters == "auto" or n_linked == n_tokens else n_clusters - 1
    if n_linked == 0 or n_remaining == 0:
        return torch.zeros(n_tokens, dtype=torch.int64, device=affinity.device)
    found = _linked_labels(graph, n_remaining, assign_labels, check_random_state(random_state))
    used, found = np.unique(found, return_inverse=True)
    labels = np.full(n_tokens, len(used), dtype=np.int64)
    labels[linked.cpu().numpy()] = found
    return torch.from_numpy(labels).to(affinity.device)


def _linked_graph(affinity: Tensor) -> tuple[SparseMatrix, Tensor]:
    """Check the affinity; the affinities of the tokens that have any, and (N,) which tokens these are."""
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1]:
        raise ValueError(f"affinity must be a square matrix, got shape {tuple(affinity.shape)}")
    if not affinity.is_floating_point():
        raise TypeError(f"affinity must be of a floating-point type, got {affinity.dtype}")
    matrix = affinity.detach().to_sparse_coo().coalesce()
    values = matrix.values().double()
    rows, columns = matrix.indices()
    kept = (values > 0) & (rows != columns)
    linked = torch.zeros(len(affinity), dtype=torch.int64, device=values.device).index_add_(0, rows, kept.long()) > 0
    valid, symmetric, n_kept, n_linked = read(
        (torch.isfinite(values) & (values >= 0)).all(),
        _is_symmetric(rows, columns, torch.where(kept, values, 0.0), len(affinity)),
        kept.sum(),
        linked.sum(),
    )
    if not valid:
        raise ValueError("affinity must hold finite values >= 0, got NaN, infinite or negative ones")
    if not symmetric:
        raise ValueError("affinity must be symmetric, A == A.T; give A + A.T, or (A + A.T) / 2")
    entries = places(kept, n_kept)
    number = linked.cumsum(0) - 1
    rows, columns = number[rows[entries]], number[columns[entries]]
    offsets = torch.searchsorted(rows, torch.arange(n_linked + 1, device=rows.device))
    return SparseMatrix(rows, columns, offsets, values[entries]), linked


def _is_symmetric(rows: Tensor, columns: Tensor, values: Tensor, n_tokens: int) -> Tensor:
    """Whether A x = A'x for a random x, which only a symmetric matrix passes (Freivalds, 1979)."""
    x = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, n_tokens)).to(values.device)
    forward = torch.zeros_like(x).index_add_(0, rows, values * x[columns])
    backward = torch.zeros_like(x).index_add_(0, columns, values * x[rows])
    return ((forward - backward).abs() <= ASYMMETRY * (forward + backward)).all()


def _linked_labels(
    graph: SparseMatrix,
    n_clusters: int | Literal["auto"],
    assign_labels: AssignLabels,
    random: np.random.RandomState,
) -> np.ndarray:
    """(N,) labels of N >= 2 tokens that all have an affinity; some clusters may be empty."""
    if n_clusters != "auto" and n_clusters >= graph.size:
        return np.arange(graph.size)
    part, n_parts = _parts(graph)
    n_found = min(MAX_AUTO_CLUSTERS, graph.size - 1) if n_clusters == "auto" else n_clusters
    embedding = np.empty((0, 0))
    if n_parts < n_found:
        # "auto" needs one eigenvalue more than clusters, for the gap behind the last one.
        values, embedding = _embedding(graph, part, n_parts, n_found + (n_clusters == "auto"), random)
        if n_clusters == "auto":
            values = np.concatenate([np.ones(n_parts), values.cpu().numpy()])
            gaps = values[1:-1] - values[2:]
            n_found = int(gaps.round(EQUAL_GAPS).argmax()) + 2
    if n_parts >= n_found:
        part = part.cpu().numpy()
        return _deal_parts(np.bincount(part), n_found)[part]
    return _assign(embedding[:, :n_found], assign_labels, random)


def _parts(graph: SparseMatrix) -> tuple[Tensor, int]:
    """(N,) connected part of each token, 0, 1, ... by their first tokens, and how many parts there are.

    Hooking and pointer jumping (Shiloach and Vishkin, 1982): the token that gives a tree its label takes the smallest
    label next to the tree, then every token its label's label, until nothing changes.
    """
    label = torch.arange(graph.size, device=graph.values.device)
    while True:
        lower = label.scatter_reduce(0, label[graph.rows], label[graph.columns], "amin")
        lower = lower[lower]
        if torch.equal(lower, label):
            firsts, part = label.unique(return_inverse=True)
            return part, len(firsts)
        label = lower


def _deal_parts(sizes: np.ndarray, n_clusters: int) -> np.ndarray:
    """A cluster for each part, as even as dealing the largest first makes them."""
    clusters: list[tuple[int, int]] = [(0, cluster) for cluster in range(n_clusters)]
    cluster_of = np.empty(len(sizes), dtype=np.int64)
    for part in np.argsort(-sizes, kind="stable"):
        size, cluster = clusters[0]
        cluster_of[part] = cluster
        heapq.heapreplace(clusters, (size + int(sizes[part]), cluster))
    return cluster_of


def _embedding(
    graph: SparseMatrix, part: Tensor, n_parts: int, n_vectors: int, random: np.random.RandomState
) -> tuple[Tensor, np.ndarray]:
    """(n_vectors - n_parts,) leading eigenvalues of the normalised affinity behind those that are 1, and (N, n_vectors)
    eigenvectors over root degree.

    Eigenvalue 1 has one eigenvector per connected part, known in closed form; an iterative solver would return an
    arbitrary basis of them. Only the others are computed.
    """
    root = graph.product(torch.ones(graph.size, dtype=graph.values.dtype, device=graph.values.device)).sqrt()
    values = graph.values / root[graph.rows] / root[graph.columns]
    known = torch.zeros(graph.size, n_parts, dtype=root.dtype, device=root.device)
    known.scatter_(1, part[:, None], root[:, None])
    known /= known.norm(dim=0)
    start = torch.from_numpy(random.uniform(-1, 1, graph.size)).to(root.device)
    others, vectors = leading_eigenvectors(replace(graph, values=values), n_vectors - n_parts, known, start)
    return others, (torch.cat([known, vectors], 1) / root[:, None]).cpu().numpy()


def _assign(embedding: np.ndarray, assign_labels: AssignLabels, random: np.random.RandomState) -> np.ndarray:
    """(N,) labels from an (N, n_clusters) embedding."""
    if assign_labels == "kmeans":
        directions = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
        return KMeans(embedding.shape[1], n_init=10, random_state=random).fit_predict(directions)  # pyright: ignore[reportArgumentType]
    if assign_labels == "discretize":
        try:
            return discretize(embedding, n_iter_max=DISCRETIZE_ITERATIONS, random_state=random)
        except np.linalg.LinAlgError as error:
            warnings.warn(f"discretize failed ({error}), cluster_qr assigns the labels", stacklevel=2)
    return cluster_qr(embedding)
