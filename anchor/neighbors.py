"""Tokens expressed by their nearest ones, which is not the paper's method: `VideoAnchorConfig(scorer="knn")`."""

import torch
from torch import Tensor

from .memory import chunk_rows
from .solver import SelfExpression

N_NEIGHBORS = 10


def neighbor_expression(Y: Tensor) -> SelfExpression:
    """Every token as the mean of its N_NEIGHBORS nearest others, of equally near ones those that come first.

    Its affinity is, but for a factor, that of scikit-learn's SpectralClustering(affinity="nearest_neighbors") with
    n_neighbors=11, which counts the token itself. Its row sums are how many tokens have token i among their nearest,
    over N_NEIGHBORS. Memory grows with N.

    Args:
        Y: (r, N) floating-point tensor, one token a column. If all tokens are equal nothing can be told apart: all
            coefficients are 0.

    Returns:
        Coefficients 1 / k of the k = min(N_NEIGHBORS, N - 1) nearest, without any gap.
    """
    points = Y.double().T
    points = points - points.mean(0)  # far from 0, distances would be lost in the roundoff of squares
    n_tokens = len(points)
    k = min(N_NEIGHBORS, max(n_tokens - 1, 0))
    indices = torch.zeros(n_tokens, max(k, min(n_tokens, 1)), dtype=torch.int64, device=Y.device)
    squares = points.square().sum(1)
    for part in torch.arange(n_tokens, device=Y.device).split(chunk_rows(n_tokens)):
        distance = squares - 2 * points[part] @ points.T
        distance.scatter_(1, part[:, None], torch.inf)
        if k:
            nearest = distance.topk(k, largest=False)
            indices[part] = nearest.indices
            tied = (distance <= nearest.values[:, -1:]).sum(1) > k
            indices[part[tied]] = distance[tied].sort(dim=1, stable=True).indices[:, :k]
    told_apart = k > 0 and not bool((points == points[:1]).all())
    values = torch.full(indices.shape, 1 / k if told_apart else 0.0, dtype=torch.float64, device=Y.device)
    return SelfExpression(indices, values, torch.zeros_like(squares), 0, 0.0, n_tokens)
