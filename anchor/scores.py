"""Scores of visual tokens: how much each is shared, from 0 to 1."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from .config import ScoreFunction, VideoAnchorConfig
from .memory import check_dense_memory
from .problem import as_tokens, token_features
from .solver import Progress, self_expression
from .spectral import affinity_matrix, sparse_coefficients, spectral_labels

# Differences of the unscaled score below this part of its largest value are float32 roundoff.
ROUNDOFF = 1e-6


@dataclass
class AnchorResult:
    """Scores of the visual tokens of one prompt.

    Attributes:
        scores: (N,) float32 in [0, 1], on the device of the tokens.
        labels: (N,) int64 cluster of each token, on the same device.
        n_iter: iterations of the solver; 0 where none ran.
        residual: the largest scaled residual of a token, see `self_expression`; 0.0 where no such solver ran.
        converged: every token came within the tolerance.
        seconds: wall time of each stage, the device synchronised: "pca", "solve", "spectral", "cluster", "score",
            those that ran.
    """

    scores: Tensor
    labels: Tensor
    n_iter: int = 0
    residual: float = 0.0
    converged: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def shared_expression_score(coef_row_sums: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """The shared-expression score (VideoAnchor, arXiv 2509.25151).

    s_hat_i = pi_i r_i with pi_i the size of token i's cluster and r_i the (signed) sum of the coefficients with which
    token i expresses others; s = (s_hat - min s_hat) / (max s_hat - min s_hat). The score ranks clusters mostly by
    their size. If s_hat is constant to float32 precision (1e-6 of its largest value), nothing stands out and all
    scores are 0.

    Args:
        coef_row_sums: (N,) floating-point r.
        labels: (N,) integers in [0, n_clusters).
        n_clusters: number of clusters; some may be empty.

    Returns:
        (N,) float32 scores in [0, 1], on the device of coef_row_sums.

    Raises:
        ValueError: the shapes differ, a row sum is not finite, or a label is out of range.
    """
    if coef_row_sums.ndim != 1 or labels.shape != coef_row_sums.shape:
        raise ValueError(
            "coef_row_sums and labels must both have shape (n_tokens,), got "
            f"{tuple(coef_row_sums.shape)} and {tuple(labels.shape)}"
        )
    if not torch.isfinite(coef_row_sums).all():
        raise ValueError("coef_row_sums must be finite, got NaN or infinite values")
    if labels.numel() == 0:
        return torch.zeros(0, device=coef_row_sums.device)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_clusters:
        raise ValueError(f"labels must lie in [0, n_clusters={n_clusters}), got values from {low} to {high}")
    share = torch.bincount(labels, minlength=n_clusters)[labels].double() / len(labels)
    unscaled = share * coef_row_sums.double()
    lowest, highest = unscaled.amin(), unscaled.amax()
    spread = highest - lowest
    constant = spread <= ROUNDOFF * unscaled.abs().amax()
    return torch.where(constant, 0.0, (unscaled - lowest) / spread).float()


def anchor_scores(
    X: Tensor | np.ndarray, config: VideoAnchorConfig, *, progress: Progress | None = None
) -> AnchorResult:
    """Score visual tokens by `config.scorer`.

    - "ssc": PCA, sparse self-expression, spectral clustering, `shared_expression_score` (the paper).
    - "kmeans": k-means on the same PCA; in the score, the row sum r_i is replaced by the closeness to the cluster's
      centre, 1 - d_i / max_j d_j with d the Euclidean distance (the paper gives no form; this one is ours).
    - "uniform": every score is 1, one cluster.
    - a function: called with X as a tensor of its own precision; one cluster.

    Half precisions are computed in float32; float64 stays. Fewer tokens than clusters make a cluster of each token;
    equal tokens, or a single one, score 0 under "ssc" and "kmeans"; no tokens give an empty result.

    Args:
        X: (N, D) floating-point tensor or numpy array, one token a row, as they stand in the decoder's input.
        config: settings.
        progress: called as progress(stage, done, total) at most four times a second, and once at the end.

    Raises:
        TypeError, ValueError: X, or what a scoring function returned, is not as described.
        MemoryError: the dense solver does not fit; use fewer tokens.

    Warns:
        ConvergenceWarning: some tokens did not converge within config.max_iter; the result says so as well.
    """
    tokens = as_tokens(X)
    report = _throttled(progress)
    if len(tokens) == 0:
        result = _one_cluster(torch.zeros(0, device=tokens.device))
    elif config.scorer == "ssc":
        result = _subspace_scores(tokens, config, report)
    elif config.scorer == "kmeans":
        result = _kmeans_scores(tokens, config, report)
    elif config.scorer == "uniform":
        result = _one_cluster(torch.ones(len(tokens), device=tokens.device))
    else:
        result = _function_scores(X.detach() if isinstance(X, Tensor) else tokens, config.scorer, report)
    if progress is not None:
        progress("score", 1, 1)
    return result


def _subspace_scores(tokens: Tensor, config: VideoAnchorConfig, report: Progress) -> AnchorResult:
    seconds: dict[str, float] = {}
    n_tokens, n_features = tokens.shape
    check_dense_memory(n_tokens, min(config.pca_rank or n_features, n_features), tokens.dtype, tokens.device)
    with _stage("pca", seconds, tokens.device, report):
        features = token_features(tokens, config.pca_rank)
    with _stage("solve", seconds, tokens.device, report):
        solution = self_expression(features, config.solver_options(), dtype=tokens.dtype, progress=report)
    with _stage("spectral", seconds, tokens.device, report):
        found = spectral_labels(
            affinity_matrix(sparse_coefficients(solution.coef)),
            config.n_clusters,
            assign_labels=config.assign_labels,
            random_state=config.random_state,
            device=tokens.device,
        )
        labels = torch.from_numpy(found).to(tokens.device)
    with _stage("score", seconds, tokens.device, report):
        row_sums = solution.coef.sum(1, dtype=torch.float64)
        scores = shared_expression_score(row_sums, labels, config.n_clusters)
    return AnchorResult(scores, labels, solution.n_iter, solution.residual, solution.converged, seconds)


def _kmeans_scores(tokens: Tensor, config: VideoAnchorConfig, report: Progress) -> AnchorResult:
    seconds: dict[str, float] = {}
    with _stage("pca", seconds, tokens.device, report):
        features = token_features(tokens, config.pca_rank)
    if features.shape[0] == 0:
        return _one_cluster(torch.zeros(len(tokens), device=tokens.device), seconds)
    with _stage("cluster", seconds, tokens.device, report):
        points = features.T.cpu().numpy()
        n_clusters = min(config.n_clusters, len(np.unique(points, axis=0)))
        kmeans = KMeans(n_clusters, n_init=10, random_state=config.random_state)  # pyright: ignore[reportArgumentType]
        found = kmeans.fit_predict(points).astype(np.int64)
        distance = np.linalg.norm(points - kmeans.cluster_centers_[found], axis=1)
    with _stage("score", seconds, tokens.device, report):
        labels = torch.from_numpy(found).to(tokens.device)
        closeness = torch.from_numpy(1 - distance / (distance.max() or 1.0)).to(tokens.device)
        scores = shared_expression_score(closeness, labels, n_clusters)
    return AnchorResult(scores, labels, n_iter=int(kmeans.n_iter_), seconds=seconds)


def _function_scores(tokens: Tensor, function: ScoreFunction, report: Progress) -> AnchorResult:
    seconds: dict[str, float] = {}
    with _stage("score", seconds, tokens.device, report):
        returned = function(tokens)
    if not isinstance(returned, Tensor | np.ndarray):
        raise ValueError(
            f"scorer must return a tensor or an array of scores, got {type(returned).__name__} from {function!r}"
        )
    scores = torch.as_tensor(returned).detach().to(tokens.device, torch.float32)
    if scores.shape != (len(tokens),):
        raise ValueError(
            f"scorer must return scores of shape ({len(tokens)},), one per token, got {tuple(scores.shape)} from "
            f"{function!r}"
        )
    outside = ~((scores >= 0) & (scores <= 1))
    if outside.any():
        raise ValueError(
            f"scorer must return finite scores in [0, 1], got {float(scores[outside][0])} "
            f"({int(outside.sum())} scores are outside) from {function!r}"
        )
    return _one_cluster(scores, seconds)


def _one_cluster(scores: Tensor, seconds: dict[str, float] | None = None) -> AnchorResult:
    labels = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return AnchorResult(scores, labels, seconds=seconds or {})


@contextmanager
def _stage(name: str, seconds: dict[str, float], device: torch.device, report: Progress) -> Iterator[None]:
    report(name, 0, 1)
    start = _now(device)
    yield
    seconds[name] = _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _throttled(progress: Progress | None) -> Progress:
    """`progress`, called at most four times a second."""
    next_call = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal next_call
        now = time.monotonic()
        if progress is not None and now >= next_call:
            next_call = now + 0.25
            progress(stage, done, total)

    return report
