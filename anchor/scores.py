"""Scores of visual tokens: how much each is shared, from 0 to 1."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from .authors import authors_labels, authors_score, authors_self_expression, check_authors_memory
from .config import Score, ScoreFunction, VideoAnchorConfig
from .cross_frame import check_frames, cross_frame_score
from .host_reads import read
from .memory import plan_solver
from .neighbors import neighbor_expression
from .problem import DLPackArray, as_tokens, token_features
from .solver import SelfExpression, self_expression
from .spectral import spectral_subspaces
from .timing import Progress, Stopwatch, throttled

# Differences of the unscaled score below this part of its largest value are float32 roundoff.
ROUNDOFF = 1e-6
NO_FRAMES = 'score="cross_frame" needs frames, an (N,) tensor with the frame of each token, got None'


@dataclass
class AnchorResult:
    """Scores of the visual tokens of one prompt.

    Attributes:
        scores: (N,) float32 in [0, 1], on the device of the tokens.
        labels: (N,) int64 cluster of each token, on the same device.
        eigengap: how far the eigenvalue of the last cluster is from the next, see `Subspaces`; None where no
            eigenvalues were needed.
        in_gap: whether the tokens themselves say that there are as many clusters, see `Subspaces`: where it is False,
            labels change with small changes of the tokens. None as eigengap.
        n_iter: iterations of the solver, of the slowest token; 0 where none ran.
        residual: the largest relative duality gap of a token; 0.0 where no such solver ran.
        converged: every token came within the tolerance.
        duality_gap: (N,) float64 relative duality gap of each token, see `SelfExpression`; None where no such solver
            ran.
        groups: (N,) int64 the group of each token where `generate()` merged them, see `VideoAnchorConfig.keep`; -1
            of one that merge="drop" dropped.
        seconds: wall time of each stage, by the device's own clock on CUDA: "pca", "solve", "spectral", "cluster",
            "score", those that ran.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=3)
        >>> result = va.anchor_scores(torch.randn(20, 8), config)
        >>> result.scores.min(), result.scores.max()
        (tensor(0.), tensor(1.))
        >>> list(result.seconds)
        ['pca', 'solve', 'spectral', 'score']
    """

    scores: Tensor
    labels: Tensor
    n_iter: int = 0
    residual: float = 0.0
    converged: bool = True
    duality_gap: Tensor | None = None
    eigengap: float | None = None
    in_gap: bool | None = None
    groups: Tensor | None = None
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
    if labels.numel() == 0:
        return torch.zeros(0, device=coef_row_sums.device)
    finite, low, high = read(torch.isfinite(coef_row_sums).all(), *labels.aminmax())
    if not finite:
        raise ValueError("coef_row_sums must be finite, got NaN or infinite values")
    if low < 0 or high >= n_clusters:
        raise ValueError(f"labels must lie in [0, n_clusters={n_clusters}), got values from {low} to {high}")
    sizes = torch.zeros(n_clusters, dtype=torch.int64, device=labels.device)  # bincount would ask for the largest label
    sizes.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int64))
    share = sizes[labels].double() / len(labels)
    unscaled = share * coef_row_sums.double()
    lowest, highest = unscaled.amin(), unscaled.amax()
    spread = highest - lowest
    constant = spread <= ROUNDOFF * unscaled.abs().amax()
    return torch.where(constant, 0.0, (unscaled - lowest) / spread).float()


def expression_score(
    solution: SelfExpression,
    labels: Tensor,
    score: Score = "published",
    *,
    frames: Tensor | None = None,
    sizes: Tensor | None = None,
    random_state: int = 0,
) -> Tensor:
    """One of the scores of `VideoAnchorConfig.score`, see `anchor_scores`.

    Args:
        solution: self-expression of N >= 1 tokens.
        labels: (N,) integers >= 0, the cluster of each token.
        score: "size" and "row_sum" are `shared_expression_score` with constant r_i, or pi_i.
        frames: (N,) integers, the frame of each token, for "cross_frame" and "cross_frame_permuted".
        sizes: (N,) pi_i of each token, for "projector", see `Subspaces.projector_size`.
        random_state: of the permutation, for "permuted" and "cross_frame_permuted".

    Returns:
        (N,) float32 scores in [0, 1], on the device of the solution.

    Raises:
        ValueError: score="cross_frame" without frames, or see `shared_expression_score` and `cross_frame_score`.
    """
    if score.startswith("cross_frame"):
        if frames is None:
            raise ValueError(NO_FRAMES)
        scores = cross_frame_score(solution, labels, frames)
    else:
        row_sums = solution.row_sums()
        if score == "size":
            row_sums = torch.ones_like(row_sums)
        elif score == "projector":
            if sizes is None:
                raise ValueError(
                    'score="projector" needs sizes, the (N,) projector sizes of `spectral_subspaces`, got None'
                )
            row_sums = sizes * row_sums
        if score in ("row_sum", "projector"):
            labels = torch.zeros_like(labels)
        scores = shared_expression_score(row_sums, labels, int(labels.amax()) + 1)
    if score.endswith("permuted"):
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(random_state))
        scores = scores[order.to(scores.device)]
    return scores


def anchor_scores(
    X: Tensor | np.ndarray | DLPackArray,
    config: VideoAnchorConfig,
    *,
    frames: Tensor | None = None,
    progress: Progress | None = None,
) -> AnchorResult:
    """Score visual tokens by `config.scorer`.

    - "ssc": PCA, sparse self-expression, spectral clustering (the paper), and of these, by `config.score`,
      "published": `shared_expression_score`, s_hat_i = pi_i r_i (the paper);
      "size": the same with s_hat_i = pi_i, and "row_sum": with s_hat_i = r_i (the paper's ablations);
      "projector": with s_hat_i = p_i r_i, p_i the `Subspaces.projector_size`, which is steadier than pi_i under noise;
      "cross_frame": `cross_frame_score` (this package's own; benchmarks/results/cross-frame compares them);
      "permuted", "cross_frame_permuted": the published and the cross-frame scores, each given to another token at
      random (controls: same values, no place).
    - "knn": the same with `neighbor_expression` in place of self-expression: each token is the mean of its 10 nearest
      (not the paper's method). r_i is how many tokens have token i among these, over 10.
    - "kmeans": k-means on the same PCA; in the score, the row sum r_i is replaced by the closeness to the cluster's
      centre, 1 - d_i / max_j d_j with d the Euclidean distance (the paper gives no form; this one is ours).
    - "uniform": every score is 1, one cluster.
    - a function: called with X as a tensor of its own precision; one cluster.

    Half precisions are computed in float32; float64 stays. Fewer tokens than clusters make a cluster of each token;
    equal tokens, or a single one, score 0 under all of these but "uniform"; no tokens give an empty result.

    Args:
        X: (N, D) floating-point tensor, numpy or CuPy array, one token a row, as they stand in the decoder's input;
            computed on its own device.
        config: settings.
        frames: (N,) tensor of integers, the frame of each token; config.score="cross_frame" (and its
            control) needs it, nothing else uses it.
        progress: called as progress(stage, done, total) at most four times a second, and once at the end.

    Raises:
        TypeError, ValueError: X, frames, or what a scoring function returned, is not as described.
        MemoryError: the solver does not fit into config.memory_budget or the device; use fewer tokens.

    Warns:
        ConvergenceWarning: some tokens did not come within config.tol; the result says so as well.

    See Also:
        enable: scores the visual tokens of each prompt of a model, and gates its attention.
        AnchorStream: for a video that goes on.
        SparseSubspaceClustering: the clusters alone, as a scikit-learn estimator.

    Examples:
        Tokens of two planes in space:

        >>> import torch
        >>> import videoanchor_triton as va
        >>> _ = torch.manual_seed(0)
        >>> tokens = torch.cat([torch.randn(n, 2) @ torch.randn(2, 16) for n in (30, 10)])
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=2)
        >>> result = va.anchor_scores(tokens, config)
        >>> result.scores.shape
        torch.Size([40])
        >>> result.converged
        True
        >>> [len(plane.unique()) for plane in result.labels.split([30, 10])]  # one cluster each
        [1, 1]
    """
    tokens = as_tokens(X)
    report = throttled(progress)
    if frames is not None:
        frames = check_frames(frames, len(tokens))
    elif config.looks_at_frames:
        raise ValueError(NO_FRAMES)
    if len(tokens) == 0:
        result = _one_cluster(torch.zeros(0, device=tokens.device))
    elif config.scorer in ("ssc", "knn"):
        result = _subspace_scores(tokens, config, frames, report)
    elif config.scorer == "kmeans":
        result = _kmeans_scores(tokens, config, report)
    elif config.scorer == "uniform":
        result = _one_cluster(torch.ones(len(tokens), device=tokens.device))
    else:
        result = _function_scores(X.detach() if isinstance(X, Tensor) else tokens, config.scorer, report)
    if progress is not None:
        progress("score", 1, 1)
    return result


def _subspace_scores(
    tokens: Tensor, config: VideoAnchorConfig, frames: Tensor | None, report: Progress
) -> AnchorResult:
    watch = Stopwatch(tokens.device)
    (n_tokens, n_features), authors = tokens.shape, config.arithmetic == "authors"
    if authors:  # what does not fit is refused before anything is computed
        check_authors_memory(n_tokens, tokens.device, config.memory_budget)
    elif config.scorer == "ssc":
        rank = min(config.pca_rank or n_features, n_features)
        plan_solver(n_tokens, n_tokens, rank, tokens.device, config.memory_budget)
    with watch.stage("pca"):
        report("pca", 0, 1)
        features = token_features(tokens, config.pca_rank)
    with watch.stage("solve"):
        report("solve", 0, n_tokens)
        solution = token_expression(features, config, "knn" if config.scorer == "knn" else "ssc", report)
    eigengap, in_gap = None, None
    with watch.stage("spectral"):
        report("spectral", 0, 1)
        if authors:
            labels = authors_labels(solution.to_dense(), min(int(config.n_clusters), n_tokens), config.random_state)
            sizes = None
        else:
            found = spectral_subspaces(
                solution.affinity(),
                config.n_clusters,
                assign_labels=config.assign_labels,
                random_state=config.random_state,
            )
            labels, sizes, eigengap, in_gap = found.labels, found.projector_size, found.eigengap, found.in_gap
    with watch.stage("score"):
        report("score", 0, 1)
        if authors:
            scores = authors_score(solution.to_dense(), labels)
        else:
            scores = expression_score(
                solution, labels, config.score, frames=frames, sizes=sizes, random_state=config.random_state
            )
    return AnchorResult(
        scores,
        labels,
        n_iter=solution.n_iter,
        residual=solution.residual,
        converged=solution.converged,
        duality_gap=solution.gap if config.scorer == "ssc" and not authors else None,
        eigengap=eigengap,
        in_gap=in_gap,
        seconds=watch.seconds(),
    )


def token_expression(
    features: Tensor, config: VideoAnchorConfig, scorer: Literal["ssc", "knn"], progress: Progress | None = None
) -> SelfExpression:
    """What `scorer` is of `token_features`, by the settings of `config` except for its own scorer."""
    if scorer == "knn":
        return neighbor_expression(features)
    if config.arithmetic == "authors":
        return authors_self_expression(features, config)
    return self_expression(features, config, progress=progress)


def _kmeans_scores(tokens: Tensor, config: VideoAnchorConfig, report: Progress) -> AnchorResult:
    watch = Stopwatch(tokens.device)
    with watch.stage("pca"):
        report("pca", 0, 1)
        features = token_features(tokens, config.pca_rank)
    if features.shape[0] == 0:
        return _one_cluster(torch.zeros(len(tokens), device=tokens.device), watch.seconds())
    with watch.stage("cluster"):
        report("cluster", 0, 1)
        points = features.T.cpu().numpy()
        n_clusters = min(int(config.n_clusters), len(np.unique(points, axis=0)))
        kmeans = KMeans(n_clusters, n_init=10, random_state=config.random_state)  # pyright: ignore[reportArgumentType]
        found = kmeans.fit_predict(points).astype(np.int64)
        distance = np.linalg.norm(points - kmeans.cluster_centers_[found], axis=1)
    with watch.stage("score"):
        report("score", 0, 1)
        labels = torch.from_numpy(found).to(tokens.device)
        closeness = torch.from_numpy(1 - distance / (distance.max() or 1.0)).to(tokens.device)
        scores = shared_expression_score(closeness, labels, n_clusters)
    return AnchorResult(scores, labels, n_iter=int(kmeans.n_iter_), seconds=watch.seconds())


def _function_scores(tokens: Tensor, function: ScoreFunction, report: Progress) -> AnchorResult:
    watch = Stopwatch(tokens.device)
    with watch.stage("score"):
        report("score", 0, 1)
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
    return _one_cluster(scores, watch.seconds())


def _one_cluster(scores: Tensor, seconds: dict[str, float] | None = None) -> AnchorResult:
    labels = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return AnchorResult(scores, labels, seconds=seconds or {})
