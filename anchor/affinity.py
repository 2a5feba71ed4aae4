"""The solver's sparse rows as matrices: coefficients W and the affinity |W| + |W|'."""

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .host_reads import read


def coefficient_matrix(indices: Tensor, values: Tensor, n_atoms: int | None = None) -> scipy.sparse.csc_array:
    """Coefficients W on the CPU: W[indices[j, m], j] = values[j, m], so that column j expresses token j.

    Args:
        indices: (n, k) integers in [0, n_atoms).
        values: (n, k) floating-point; slots of value 0 are not used, whatever their index.
        n_atoms: N; None: n, tokens express each other.

    Returns:
        (N, n) matrix of the precision of `values`, without stored zeros, indices sorted.

    Raises:
        TypeError, ValueError: the arguments are not as described, or a value is not finite.
    """
    n_atoms = len(values) if n_atoms is None else n_atoms
    from_token, to_token, weight = _links(indices, values, n_atoms)
    entries = (weight.cpu().numpy(), tuple(torch.stack([from_token, to_token]).cpu().numpy()))
    return scipy.sparse.coo_array(entries, shape=(n_atoms, len(values))).tocsc()


def affinity_matrix(indices: Tensor, values: Tensor) -> Tensor:
    """The affinity A = |W| + |W|' of the tokens that `coefficient_matrix` describes, on the device of `values`.

    Memory grows with the number of coefficients. Run to run the result is the same to the bit, on CUDA as well: an
    entry is the sum of at most two coefficients.

    Returns:
        (N, N) sparse tensor (COO, coalesced), float64, symmetric, entries > 0.

    Raises:
        TypeError, ValueError: as `coefficient_matrix`.
    """
    from_token, to_token, weight = _links(indices, values, len(values))
    pairs = torch.stack([torch.cat([from_token, to_token]), torch.cat([to_token, from_token])])
    shape = (len(values), len(values))
    return torch.sparse_coo_tensor(pairs, weight.abs().double().repeat(2), shape, check_invariants=False).coalesce()


def majority_labels(weights: scipy.sparse.csr_array, labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """The cluster with which each token shares most weight.

    Args:
        weights: (n, N) >= 0.
        labels: (N,) integers in [0, n_clusters); those below 0 have no part in it.
        n_clusters: how many there are.

    Returns:
        (n,) int64, the lowest of equal ones; -1 without any weight.
    """
    voters = np.flatnonzero(labels >= 0)
    members = scipy.sparse.csr_array((np.ones(len(voters)), (voters, labels[voters])), shape=(len(labels), n_clusters))
    votes = (weights @ members).toarray()  # pyright: ignore[reportAttributeAccessIssue]
    return np.where(votes.any(1), votes.argmax(1), -1)


def scipy_matrix(matrix: Tensor) -> scipy.sparse.csr_array:
    """A copy of a coalesced sparse tensor on the CPU."""
    rows, columns = matrix.indices().cpu().numpy()
    return scipy.sparse.coo_array((matrix.values().cpu().numpy(), (rows, columns)), shape=tuple(matrix.shape)).tocsr()


def _links(indices: Tensor, values: Tensor, n_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends of every coefficient, the token that expresses and the one that is expressed, and its value."""
    if indices.ndim != 2 or indices.shape != values.shape:
        raise ValueError(
            f"indices and values must both have shape (n_tokens, k), got {tuple(indices.shape)} and "
            f"{tuple(values.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64) or not values.is_floating_point():
        raise TypeError(
            f"indices must be int32 or int64 and values floating-point, got {indices.dtype} and {values.dtype}"
        )
    to_token, slot = (values != 0).nonzero().unbind(1)
    from_token = indices[to_token, slot].long()
    finite, low, high = read(torch.isfinite(values).all(), *_range(from_token))
    if not finite:
        raise ValueError("values must be finite, got NaN or infinite coefficients")
    if low < 0 or high >= max(n_atoms, 1):
        raise ValueError(f"indices must lie in [0, n_tokens={n_atoms}), got values from {low} to {high}")
    return from_token, to_token, values[to_token, slot]


def _range(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest; 0 of none."""
    low, high = numbers.aminmax() if len(numbers) else (numbers.sum(), numbers.sum())
    return low, high
