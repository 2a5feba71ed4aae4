"""Subspaces of tokens: spectral clustering of the affinity |W| + |W|'."""

import heapq
import warnings
from typing import Any, Literal

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.cluster._spectral import cluster_qr, discretize
from sklearn.utils import check_random_state
from torch import Tensor

AssignLabels = Literal["discretize", "cluster_qr"]

# Up to this many tokens all eigenvectors are computed: as fast, and exact where eigenvalues repeat.
DENSE_TOKENS = 512


def sparse_coefficients(coef: Tensor) -> scipy.sparse.csc_array:
    """The nonzero entries of (N, N) coefficients as a SciPy matrix on the CPU; column j expresses token j."""
    by_token = coef.T
    present = by_token != 0
    indptr = np.zeros(len(by_token) + 1, dtype=np.int64)
    np.cumsum(present.sum(1).cpu().numpy(), out=indptr[1:])
    indices = present.nonzero()[:, 1].cpu().numpy()
    return scipy.sparse.csc_array((by_token[present].cpu().numpy(), indices, indptr), shape=tuple(coef.shape))


def affinity_matrix(coef: scipy.sparse.csc_array) -> scipy.sparse.csr_array:
    """The affinity |W| + |W|' of sparse (N, N) coefficients W, float64."""
    magnitude = abs(coef.astype(np.float64))
    return (magnitude + magnitude.T).tocsr()


def spectral_labels(
    affinity: scipy.sparse.csr_array,
    n_clusters: int,
    *,
    assign_labels: AssignLabels = "discretize",
    random_state: int | np.random.RandomState | None = 0,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Split tokens into clusters that few strong affinities cross (VideoAnchor, arXiv 2509.25151: normalised cut).

    The leading eigenvectors of D^-1/2 A D^-1/2 come from SciPy, on a CUDA device from CuPy where it is installed, and
    scikit-learn's `discretize` (the authors' choice; seeded) or `cluster_qr` turns them into labels. Where the
    eigenvectors alone leave the answer open it is fixed by rule:

    - n_clusters >= N: every token is its own cluster.
    - Tokens without any affinity share one cluster, the others make n_clusters - 1.
    - A disconnected graph with at least n_clusters parts is never cut: whole parts are dealt to the clusters,
      largest first, each to the smallest cluster so far.
    - A cluster that no token was assigned to is dropped, so there may be fewer than n_clusters.

    Args:
        affinity: (N, N) symmetric, entries >= 0, diagonal 0.
        n_clusters: >= 1.
        assign_labels: "discretize" or "cluster_qr".
        random_state: seed of the eigensolver's start and of the rotation that `discretize` starts from.
        device: where the eigenvectors are computed.

    Returns:
        (N,) int64 labels 0..k-1, every one of them in use.
    """
    degree = affinity.sum(axis=1)
    n_tokens = len(degree)
    if n_clusters >= n_tokens:
        return np.arange(n_tokens, dtype=np.int64)
    if n_clusters == 1:
        return np.zeros(n_tokens, dtype=np.int64)
    linked = np.flatnonzero(degree > 0)
    if len(linked) < n_tokens:
        labels = np.zeros(n_tokens, dtype=np.int64)
        if len(linked):
            labels[linked] = spectral_labels(
                affinity[linked][:, linked],
                n_clusters - 1,
                assign_labels=assign_labels,
                random_state=random_state,
                device=device,
            )
            labels[degree == 0] = labels.max() + 1
        return labels
    n_parts, part = connected_components(affinity, directed=False)
    if n_parts >= n_clusters:
        return _deal_parts(np.bincount(part), n_clusters)[part]
    random = check_random_state(random_state)
    embedding = _embedding(affinity, part, n_clusters, random, torch.device(device))
    labels = cluster_qr(embedding) if assign_labels == "cluster_qr" else discretize(embedding, random_state=random)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64).reshape(-1)


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
    affinity: scipy.sparse.csr_array,
    part: np.ndarray,
    n_clusters: int,
    random: np.random.RandomState,
    device: torch.device,
) -> np.ndarray:
    """(N, n_clusters) leading eigenvectors of the normalised affinity, divided by the root of the degree.

    Eigenvalue 1 has one eigenvector per connected part, known in closed form; an iterative solver would return an
    arbitrary basis of them. They are projected out, and only the others are computed.
    """
    n_tokens = len(part)
    root = np.sqrt(affinity.sum(axis=1))
    normalised = affinity.multiply(1 / root).multiply(1 / root[:, None]).tocsr()
    known = np.zeros((n_tokens, part.max() + 1))
    known[np.arange(n_tokens), part] = root
    known /= np.linalg.norm(known, axis=0)
    count = n_clusters - known.shape[1]
    start = random.uniform(-1, 1, n_tokens)
    others = _other_eigenvectors(normalised, known, count, start, device) if count else np.empty((n_tokens, 0))
    largest = np.abs(others).argmax(axis=0)
    others *= np.sign(others[largest, np.arange(count)])
    return np.hstack([known, others]) / root[:, None]


def _other_eigenvectors(
    normalised: scipy.sparse.csr_array, known: np.ndarray, count: int, start: np.ndarray, device: torch.device
) -> np.ndarray:
    if device.type == "cuda":
        try:
            import cupy  # pyright: ignore[reportMissingImports]
            import cupyx.scipy.sparse  # pyright: ignore[reportMissingImports]
            import cupyx.scipy.sparse.linalg  # pyright: ignore[reportMissingImports]

            with cupy.cuda.Device(device.index or 0):
                vectors = _eigenvectors(normalised, known, count, start, cupy, cupyx.scipy.sparse)
                return cupy.asnumpy(vectors)
        except ImportError:
            pass
        except Exception as error:  # CUDA, compiler and memory errors have no common base in CuPy
            warnings.warn(f"CuPy failed, SciPy computes the eigenvectors on the CPU: {error}", stacklevel=2)
    return _eigenvectors(normalised, known, count, start, np, scipy.sparse)


def _eigenvectors(
    normalised: scipy.sparse.csr_array, known: np.ndarray, count: int, start: np.ndarray, xp: Any, sparse: Any
) -> Any:
    """(N, count) eigenvectors of the largest eigenvalues apart from `known`; the same calls for NumPy and CuPy."""
    matrix = sparse.csr_matrix(
        (xp.asarray(normalised.data), xp.asarray(normalised.indices), xp.asarray(normalised.indptr)),
        shape=normalised.shape,
    )
    known = xp.asarray(known)

    # Shifted by 1 all eigenvalues are >= 0, so that the projected ones, now 0, cannot come out on top.
    def shifted(x: Any) -> Any:
        return matrix @ x + x - 2 * (known @ (known.T @ x))

    n_tokens = len(known)
    if n_tokens <= DENSE_TOKENS:
        values, vectors = xp.linalg.eigh(shifted(xp.eye(n_tokens)))
    else:
        operator = sparse.linalg.LinearOperator(matrix.shape, matvec=shifted, dtype=matrix.dtype)
        values, vectors = sparse.linalg.eigsh(operator, k=count, which="LA", v0=xp.asarray(start))
    return vectors[:, xp.argsort(-values)[:count]]
