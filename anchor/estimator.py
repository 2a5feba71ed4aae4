"""Sparse subspace clustering as a scikit-learn estimator."""

from dataclasses import fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import validate_data
from torch import Tensor

from .affinity import affinity_matrix, coefficient_matrix, scipy_matrix
from .problem import DLPackArray, as_tokens, computing_precision, token_features
from .solver import Algorithm, SolverOptions, self_expression
from .spectral import AssignLabels, spectral_labels
from .timing import Stopwatch


class SparseSubspaceClustering(ClusterMixin, BaseEstimator):
    """Sparse subspace clustering (Elhamifar and Vidal, 2013), with the settings and the ADMM of VideoAnchor.

    Each sample is expressed as a sparse combination of the others, and spectral clustering of the magnitudes of the
    coefficients groups samples that lie in the same (affine) subspace.

    Parameters
    ----------
    n_clusters : int or "auto", default=24
        Subspaces; with fewer samples than that, each is its own cluster. "auto" counts them by the eigengap of the
        affinity, see `spectral_labels` for where that fails.
    pca_rank : int, default=None
        Principal components of the centred samples that are used, at most as many as the samples have; None uses the
        samples as they are.
    algorithm, affine, alpha_e, alpha_z, rho, relaxation, max_iter, tol, memory_budget
        See `SolverOptions`.
    assign_labels : {"discretize", "cluster_qr", "kmeans"}, default="discretize"
        How eigenvectors become labels.
    random_state : int or RandomState instance, default=None
        Seed of the spectral step. An integer makes the labels the same in every run.
    verbose : bool or int, default=False
        Print the solver's progress.

    Attributes
    ----------
    labels_ : ndarray of shape (n_samples,)
        int64 cluster of each sample, on the CPU as all attributes.
    n_clusters_ : int
        Clusters found; may be fewer than n_clusters, see `spectral_labels`.
    coef_ : scipy.sparse array of shape (n_samples, n_samples)
        coef_[:, j] expresses sample j. Diagonal 0; columns sum to 1 when affine, unless all samples are equal: then
        all is 0.
    affinity_matrix_ : scipy.sparse array of shape (n_samples, n_samples)
        |coef_| + |coef_|', float64.
    duality_gap_ : ndarray of shape (n_samples,)
        float64 relative duality gap of each sample's coefficients, see `SelfExpression`.
    n_iter_ : int
        Iterations of the solver, the most for a sample.
    seconds_ : dict of str to float
        Wall time of the stages "pca", "solve" and "spectral".
    n_features_in_ : int
        Features seen in fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where X has names that are all strings (a pandas DataFrame).

    See Also
    --------
    self_expression : The coefficients alone.
    anchor_scores : VideoAnchor's score of each sample, from the same coefficients and clusters.
    sklearn.cluster.SpectralClustering : The spectral step, of an affinity of your own.

    References
    ----------
    Elhamifar and Vidal: Sparse Subspace Clustering: Algorithm, Theory, and Applications. IEEE TPAMI 35 (11), 2013.
    VideoAnchor, arXiv 2509.25151.

    Examples
    --------
    Ten samples of each of two planes in an eight-dimensional space:

    >>> import numpy as np
    >>> from videoanchor_triton import SparseSubspaceClustering
    >>> rng = np.random.default_rng(0)
    >>> X = np.vstack([rng.normal(size=(10, 2)) @ rng.normal(size=(2, 8)) for _ in range(2)])
    >>> clustering = SparseSubspaceClustering(n_clusters=2, random_state=0).fit(X)
    >>> clustering.labels_
    array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    >>> clustering.coef_.shape
    (20, 20)
    """

    n_features_in_: int
    feature_names_in_: np.ndarray

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_clusters": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "pca_rank": [Interval(Integral, 1, None, closed="left"), None],
        "algorithm": [StrOptions(set(get_args(Algorithm)))],
        "affine": ["boolean"],
        "alpha_e": [Interval(Real, 0, None, closed="neither")],
        "alpha_z": [Interval(Real, 0, None, closed="neither")],
        "rho": [Interval(Real, 0, None, closed="neither"), None],
        "relaxation": [Interval(Real, 0, 2, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "memory_budget": [Interval(Integral, 1, None, closed="left"), None],
        "assign_labels": [StrOptions(set(get_args(AssignLabels)))],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_clusters: int | Literal["auto"] = 24,
        pca_rank: int | None = None,
        *,
        algorithm: Algorithm = SolverOptions.algorithm,
        affine: bool = SolverOptions.affine,
        alpha_e: float = SolverOptions.alpha_e,
        alpha_z: float = SolverOptions.alpha_z,
        rho: float | None = SolverOptions.rho,
        relaxation: float = SolverOptions.relaxation,
        max_iter: int = SolverOptions.max_iter,
        tol: float = SolverOptions.tol,
        memory_budget: int | None = SolverOptions.memory_budget,
        assign_labels: AssignLabels = "discretize",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.n_clusters: int | Literal["auto"] = n_clusters
        self.pca_rank = pca_rank
        self.algorithm: Algorithm = algorithm
        self.affine = affine
        self.alpha_e = alpha_e
        self.alpha_z = alpha_z
        self.rho = rho
        self.relaxation = relaxation
        self.max_iter = max_iter
        self.tol = tol
        self.memory_budget = memory_budget
        self.assign_labels: AssignLabels = assign_labels
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Tensor | np.ndarray | DLPackArray, y: None = None) -> Self:  # noqa: ARG002
        """Cluster the rows of X.

        Args:
            X: (n_samples, n_features) array-like. A torch tensor, or a CuPy array (any with DLPack that is not a
                numpy array), is computed on its own device, in float64 or, for all other precisions, in float32.
            y: ignored.

        Raises:
            TypeError, ValueError: X is not 2-D, floating-point (tensors) or finite, or has no samples.
            MemoryError: the solver does not fit, or not into memory_budget.

        Warns:
            ConvergenceWarning: some samples did not converge within max_iter.
        """
        if isinstance(X, np.ndarray) or not hasattr(X, "__dlpack__"):
            X = np.asarray(validate_data(self, X, dtype=[np.float64, np.float32]))  # pyright: ignore[reportArgumentType]
        tokens = as_tokens(X)
        if len(tokens) == 0:
            raise ValueError(f"X must have at least one sample, got shape {tuple(tokens.shape)}")
        if not isinstance(X, np.ndarray):
            validate_data(self, tokens, skip_check_array=True)  # pyright: ignore[reportArgumentType]
        options = SolverOptions(**{field.name: getattr(self, field.name) for field in fields(SolverOptions)})
        progress = _print_progress if self.verbose else None
        watch = Stopwatch(tokens.device)
        with watch.stage("pca"):
            features = token_features(tokens, self.pca_rank)
        with watch.stage("solve"):
            solution = self_expression(features, options, dtype=computing_precision(tokens), progress=progress)
        with watch.stage("spectral"):
            affinity = affinity_matrix(solution.indices, solution.values)
            labels = spectral_labels(
                affinity, self.n_clusters, assign_labels=self.assign_labels, random_state=self.random_state
            )
        self.labels_ = labels.cpu().numpy()
        self.n_clusters_ = int(self.labels_.max()) + 1
        self.coef_ = coefficient_matrix(solution.indices, solution.values)
        self.affinity_matrix_ = scipy_matrix(affinity)
        self.duality_gap_ = solution.gap.cpu().numpy()
        self.n_iter_ = solution.n_iter
        self.seconds_ = watch.seconds()
        return self


def _print_progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total} samples")
