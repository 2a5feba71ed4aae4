"""The steps after the solver as the authors' code takes them, for `VideoAnchorConfig.reproduce`."""

import numpy as np
import torch
from sklearn.cluster import SpectralClustering
from torch import Tensor

SCORE_EPS = 1e-5


def authors_labels(coefficients: Tensor, n_clusters: int, random_state: int) -> Tensor:
    """scikit-learn's spectral clustering of |W| + |W|', their one unseeded step seeded.

    Args:
        coefficients: (N, N) W.
        n_clusters: at most N.
        random_state: seed.

    Returns:
        (N,) int64 labels on the device of `coefficients`.
    """
    weights = coefficients.abs()
    clustering = SpectralClustering(
        n_clusters=n_clusters, affinity="precomputed", assign_labels="discretize", random_state=random_state
    )
    labels = clustering.fit_predict((weights + weights.T).cpu().numpy())
    return torch.from_numpy(labels.astype(np.int64)).to(coefficients.device)


def authors_score(coefficients: Tensor, labels: Tensor) -> Tensor:
    """The shared-expression score with their rounding: row sums of W in bfloat16, 1e-5 in the denominator, the score in
    bfloat16.

    Args:
        coefficients: (N, N) W.
        labels: (N,) int64.

    Returns:
        (N,) float32 holding bfloat16 values.
    """
    share = torch.bincount(labels) / len(labels)
    score = coefficients.bfloat16().sum(-1) * share[labels]
    lowest = score.amin()
    return ((score - lowest) / (score.amax() - lowest + SCORE_EPS)).bfloat16().float()
