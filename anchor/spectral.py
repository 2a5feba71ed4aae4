"""Subspaces of tokens: spectral clustering of their affinity."""

import heapq
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state
from torch import Tensor

from .eigenvectors import SparseMatrix, leading_eigenvectors
from .host_reads import places, read

AssignLabels = Literal["cluster_qr", "kmeans", "discretize"]

# The most clusters, apart from that of the tokens without affinity, that n_clusters="auto" finds.
MAX_AUTO_CLUSTERS = 50
# k is in a gap if the gap at k is so many times each of so many gaps on either side.
GAP_RATIO, GAP_NEIGHBOURS = 2.0, 2
# Decimals to which eigengaps are compared; of equal ones the first is taken.
EQUAL_GAPS = 9
DISCRETIZE_ITERATIONS = 1000
ROUNDS_OF_PARTS = 4  # before the host asks whether the connected parts are found
# Affinities may differ from their transpose by roundoff, not more.
ASYMMETRY = 1e-6


@dataclass(frozen=True)
class Subspaces:
    """Clusters of N tokens, and how well their affinity defines them.

    Attributes:
        labels: (N,) int64 0..k-1, every one of them in use.
        eigengap: lambda_k - lambda_(k+1) of the normalised affinity D^-1/2 A D^-1/2 of the k clusters, that of the
            tokens without affinity not counted: a change of it by norm e turns the space of the k eigenvectors by an
            angle of about e / eigengap (Davis and Kahan, 1970). 0 where whole parts of the graph share a cluster; None
            where every token is its own cluster, or no affinity is left to split.
        in_gap: k is in a gap of the eigenvalues: the gap at k is at least twice each of the two gaps on either side,
            that behind lambda_1 not counted, which every graph has. Where it is not, the tokens do not say that there
            are k clusters, and small changes of them change labels. None where eigengap is.
        projector_size: (N,) float64, how many tokens share token i's place, from 1 to N: 1 / P_ii of the orthogonal
            projector P on the space that labels are read from, the k leading eigenvectors over the root of the degree.
            It depends on that space, not on how it is cut; where clusters share no affinity it is the size of the
            token's cluster. For tokens without affinity, and where no eigenvalues are needed, it is that by definition.
    """

    labels: Tensor
    eigengap: float | None
    in_gap: bool | None
    projector_size: Tensor


def spectral_labels(
    affinity: Tensor,
    n_clusters: int | Literal["auto"],
    *,
    assign_labels: AssignLabels = "cluster_qr",
    random_state: int | np.random.RandomState | None = 0,
) -> Tensor:
    """The labels of `spectral_subspaces`, which has the same arguments: (N,) int64 on the device of `affinity`."""
    return spectral_subspaces(affinity, n_clusters, assign_labels=assign_labels, random_state=random_state).labels


def spectral_subspaces(
    affinity: Tensor,
    n_clusters: int | Literal["auto"],
    *,
    assign_labels: AssignLabels = "cluster_qr",
    random_state: int | np.random.RandomState | None = 0,
) -> Subspaces:
    """Split tokens into clusters that few strong affinities cross (VideoAnchor, arXiv 2509.25151: normalised cut).

    The leading eigenvectors of D^-1/2 A D^-1/2, computed on the device of `affinity` (see `leading_eigenvectors`), are
    divided by the root of the degree, and these N * n_clusters numbers become labels on the CPU: by `cluster_qr`
    (Damle, Minden and Ying, 2019; without any randomness), by k-means of the rows scaled to length 1 (Ng, Jordan and
    Weiss, 2002; best of 10 starts), or by `discretize` (Yu and Shi, 2003; the authors' choice, depends on its seed).
    Where the eigenvectors alone leave the answer open it is fixed by rule:

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

    Nothing but k-means and `discretize` draws at random. On the CPU the labels are the same to the bit run to run, with
    the same number of threads. On a CUDA device no sum of them depends on the order of threads either.

    Args:
        affinity: (N, N) floating-point tensor, dense or sparse, symmetric, entries >= 0; `affinity_matrix` makes one.
            The diagonal is not used.
        n_clusters: >= 1, or "auto".
        assign_labels: "cluster_qr", "kmeans" or "discretize".
        random_state: seed of k-means and of the rotation that `discretize` starts from.

    Returns:
        The clusters, on the device of `affinity`.

    Raises:
        TypeError, ValueError: the affinity is not as described, or n_clusters is below 1.
        scipy.sparse.linalg.ArpackNoConvergence, RuntimeError: the eigenvectors were not found, see
            `leading_eigenvectors`.

    Examples:
        Two groups of tokens, with one weak affinity between them:

        >>> import torch
        >>> from videoanchor_triton.anchor.spectral import spectral_subspaces
        >>> affinity = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4))
        >>> affinity[2, 3] = affinity[3, 2] = 0.01
        >>> found = spectral_subspaces(affinity, 2)
        >>> found.labels, found.in_gap, found.projector_size.round()
        (tensor([0, 0, 0, 1, 1, 1, 1]), True, tensor([3., 3., 3., 4., 4., 4., 4.], dtype=torch.float64))
    """
    if n_clusters != "auto" and n_clusters < 1:
        raise ValueError(f'n_clusters must be >= 1 or "auto", got {n_clusters}')
    graph, linked = _linked_graph(affinity)
    n_tokens, n_linked = len(linked), graph.size
    n_remaining = n_clusters if n_clusters == "auto" or n_linked == n_tokens else n_clusters - 1
    gap, in_gap, sizes, has_affinity = None, None, None, linked.cpu().numpy()
    if n_clusters != "auto" and n_clusters >= n_tokens:
        labels = np.arange(n_tokens)
    elif n_linked == 0 or n_remaining == 0:
        labels = np.zeros(n_tokens, dtype=np.int64)
    else:
        found, gap, in_gap, sizes = _split(graph, n_remaining, assign_labels, check_random_state(random_state))
        used, found = np.unique(found, return_inverse=True)
        labels = np.full(n_tokens, len(used))
        labels[has_affinity] = found
    projector_size = np.bincount(labels)[labels].astype(np.float64)
    if sizes is not None:
        projector_size[has_affinity] = sizes
    labels, projector_size = (torch.from_numpy(x).to(affinity.device) for x in (labels, projector_size))
    return Subspaces(labels, gap, in_gap, projector_size)


def _linked_graph(affinity: Tensor) -> tuple[SparseMatrix, Tensor]:
    """Check the affinity; the affinities of the tokens that have any, and (N,) which tokens these are."""
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1]:
        raise ValueError(f"affinity must be a square matrix, got shape {tuple(affinity.shape)}")
    if not affinity.is_floating_point():
        raise TypeError(f"affinity must be of a floating-point type, got {affinity.dtype}")
    matrix = affinity.detach().to_sparse_coo().coalesce()
    values = matrix.values().double()
    rows, columns = matrix.indices()
    weights = values / values.amax() if len(values) else values
    kept = (weights > 0) & (rows != columns)
    linked = torch.zeros(len(affinity), dtype=torch.int64, device=values.device).index_add_(0, rows, kept.long()) > 0
    weights = torch.where(kept, weights, 0.0)
    # A x = A'x for an x without structure, which only a symmetric matrix passes (Freivalds, 1979).
    x = torch.arange(len(affinity), dtype=torch.float64, device=values.device).square_().mul_(0.6180339887).frac_() + 1
    there, back = (torch.zeros_like(x).index_add_(0, i, weights * x[j]) for i, j in ((rows, columns), (columns, rows)))
    valid, symmetric, n_kept, n_linked = read(
        (torch.isfinite(values) & (values >= 0)).all(),
        ((there - back).abs() <= ASYMMETRY * (there + back)).all(),
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
    return SparseMatrix(rows, columns, offsets, weights[entries]), linked


def _split(
    graph: SparseMatrix, n_clusters: int | Literal["auto"], assign_labels: AssignLabels, random: np.random.RandomState
) -> tuple[np.ndarray, float | None, bool | None, np.ndarray | None]:
    """Of N >= 2 tokens that all have an affinity: (N,) labels, of which some may be unused, the eigengap, whether k is
    in a gap, and (N,) projector sizes, None where no projector is needed."""
    if n_clusters != "auto" and n_clusters >= graph.size:
        return np.arange(graph.size), None, None, None
    n_parts, part = _parts(graph)
    n_found = min(MAX_AUTO_CLUSTERS, graph.size - 1) if n_clusters == "auto" else n_clusters
    if n_parts > n_found:
        return _deal_parts(np.bincount(part), n_found)[part], 0.0, False, None
    values, embedding = _embedding(graph, part, n_parts, min(n_found + 1 + GAP_NEIGHBOURS, graph.size))
    gaps = (values[:-1] - values[1:]).round(EQUAL_GAPS)  # gaps[k - 1] lies behind lambda_k
    if n_clusters == "auto" and n_found > 1:
        n_found = int(gaps[1:n_found].argmax()) + 2
    near = [*gaps[max(n_found - 1 - GAP_NEIGHBOURS, 1) : n_found - 1], *gaps[n_found : n_found + GAP_NEIGHBOURS], 0.0]
    gap = float(values[n_found - 1] - values[n_found])
    in_gap = bool(gap > 0 and gaps[n_found - 1] >= GAP_RATIO * max(near))
    embedding = embedding[:, :n_found]
    sizes = 1 / np.square(scipy.linalg.qr(embedding, mode="economic")[0]).sum(1)
    labels = part if n_parts == n_found else _assign(embedding, assign_labels, random)
    return labels, gap, in_gap, sizes


def _parts(graph: SparseMatrix) -> tuple[int, np.ndarray]:
    """How many connected parts there are, and (N,) the part of each token, 0, 1, ... by their first tokens."""
    if graph.values.device.type != "cpu":
        first, part = first_of_parts(graph.rows, graph.columns, graph.size).unique(return_inverse=True)
        return len(first), part.cpu().numpy()
    columns, offsets = graph.columns.int().numpy(), graph.offsets.int().numpy()
    links = scipy.sparse.csr_array((np.ones(len(columns)), columns, offsets), shape=(graph.size, graph.size))
    return connected_components(links, directed=False)


def first_of_parts(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """(N,) int64 the first token of the part that each token is connected with, on the device of the links.

    Each token, and the one it stands for, take the least of its neighbours, until nothing changes (Shiloach and
    Vishkin, 1982; of the forms for many processors that of Zhang, Azad and Hu, 2020).
    """
    first = torch.arange(size, device=rows.device)
    while True:
        before = first
        for _ in range(ROUNDS_OF_PARTS):
            least = first.scatter_reduce(0, rows, first[columns], "amin")
            first = least.scatter_reduce(0, first, least, "amin")
            first = first[first]
        if torch.equal(before, first):
            return first


def _deal_parts(sizes: np.ndarray, n_clusters: int) -> np.ndarray:
    """A cluster for each part, as even as dealing the largest first makes them."""
    clusters: list[tuple[int, int]] = [(0, cluster) for cluster in range(n_clusters)]
    cluster_of = np.empty(len(sizes), dtype=np.int64)
    for part in np.argsort(-sizes, kind="stable"):
        size, cluster = clusters[0]
        cluster_of[part] = cluster
        heapq.heapreplace(clusters, (size + int(sizes[part]), cluster))
    return cluster_of


def _embedding(graph: SparseMatrix, part: np.ndarray, n_parts: int, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_vectors,) leading eigenvalues of the normalised affinity, and (N, n_vectors) eigenvectors over root degree.

    Eigenvalue 1 has one eigenvector per connected part, known in closed form; an iterative solver would return an
    arbitrary basis of them. Only the others are computed, of A + I - 2 K K', whose eigenvalues are >= 0, so that the
    known ones, K, now 0, do not come out on top.
    """
    ones = torch.ones(graph.size, 1, dtype=graph.values.dtype, device=graph.values.device)
    root = graph.product(ones).sqrt()
    known = torch.zeros(graph.size, n_parts, dtype=root.dtype, device=root.device)
    known.scatter_(1, torch.from_numpy(part).to(root.device, torch.int64)[:, None], root)
    known /= known.norm(dim=0)
    matrix = replace(graph, values=graph.values / root[graph.rows, 0] / root[graph.columns, 0])
    values, vectors = leading_eigenvectors(
        lambda x: matrix.product(x).add_(x).addmm_(known, known.T @ x, alpha=-2),
        lambda: matrix.dense() + torch.eye(graph.size, dtype=root.dtype, device=root.device) - 2 * (known @ known.T),
        graph.size,
        n_vectors - n_parts,
        root.device,
    )
    values = torch.cat([torch.ones_like(known[0]), values - 1])
    return values.cpu().numpy(), (torch.cat([known, vectors], 1) / root).cpu().numpy()


def _assign(embedding: np.ndarray, assign_labels: AssignLabels, random: np.random.RandomState) -> np.ndarray:
    """(N,) labels from an (N, k) embedding."""
    if assign_labels == "kmeans":
        directions = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
        return KMeans(embedding.shape[1], n_init=10, random_state=random).fit_predict(directions)  # pyright: ignore[reportArgumentType]
    return _cluster_qr(embedding) if assign_labels == "cluster_qr" else _discretize(embedding, random)


def _cluster_qr(embedding: np.ndarray) -> np.ndarray:
    """Rows as far from each other as pivots of QR are (Damle, Minden and Ying, 2019) stand for a cluster each; the
    rotation that brings them nearest to the axes says which of them a token is like."""
    pivots = scipy.linalg.qr(embedding.T, mode="r", pivoting=True)[-1][: embedding.shape[1]]
    left, _, right = scipy.linalg.svd(embedding[pivots].T)
    return np.abs(embedding @ (left @ right)).argmax(1)


def _discretize(embedding: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The partition and the rotation of the embedding that are nearest to each other (Yu and Shi, 2003), from a
    rotation to rows as orthogonal as possible, the first of them drawn."""
    rows = embedding / np.linalg.norm(embedding, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    chosen, likeness = [random.randint(len(rows))], np.zeros(len(rows))
    while len(chosen) < rows.shape[1]:
        likeness += np.abs(rows @ rows[chosen[-1]])
        chosen.append(int(likeness.argmin()))
    labels, agreement = (rows @ rows[chosen].T).argmax(1), 0.0
    for _ in range(DISCRETIZE_ITERATIONS):
        left, strengths, right = scipy.linalg.svd(np.eye(rows.shape[1])[labels].T @ rows)
        before, agreement = agreement, strengths.sum()
        if abs(agreement - before) <= 1e-15 * len(rows):
            break
        labels = (rows @ (left @ right).T).argmax(1)
    return labels
