"""Sparse subspace clustering as a scikit-learn estimator."""

from dataclasses import fields
from typing import Literal, Self, get_args

import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from .affinity import coefficient_matrix, majority_labels, scipy_matrix
from .options import SolverOptions
from .problem import DLPackArray, as_tokens, fit_features
from .solver import self_expression
from .spectral import AssignLabels, spectral_subspaces
from .timing import Stopwatch
from .validation import check_choice, check_integer


class SparseSubspaceClustering(TransformerMixin, ClusterMixin, BaseEstimator):
    """Sparse subspace clustering (Elhamifar and Vidal, 2013), with the settings of VideoAnchor.

    Each sample is expressed as a sparse combination of the others, and spectral clustering of the magnitudes of the
    coefficients groups samples that lie in the same (affine) subspace.

    Parameters
    ----------
    n_clusters : int or "auto", default=24
        Subspaces; with fewer samples than that, each is its own cluster. "auto" counts them by the eigengap of the
        affinity, see `spectral_labels` for where that fails.
    pca_rank : int or None, default=64
        Principal components of the centred samples that are used, at most as many as the samples have. None uses the
        samples as they are, which takes long for hundreds of features: the time of a sample grows with their square.
    affine, alpha_e, alpha_z, tol, memory_budget
        See `SolverOptions`.
    assign_labels : {"cluster_qr", "kmeans", "discretize"}, default="cluster_qr"
        How eigenvectors become labels, see `spectral_subspaces`.
    random_state : int or RandomState instance, default=None
        Seed of "kmeans" and "discretize"; "cluster_qr" draws nothing.
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
        |coef_| + |coef_|', float64, without what the tolerance leaves open, see `SelfExpression.affinity`.
    eigengap_ : float or None
        How far the eigenvalue of the last cluster is from the next, see `Subspaces`.
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
    >>> clustering.predict(2 * X[:2])  # new samples of the first plane
    array([1, 1])
    """

    n_features_in_: int
    feature_names_in_: np.ndarray

    def __init__(
        self,
        n_clusters: int | Literal["auto"] = 24,
        pca_rank: int | None = 64,
        *,
        affine: bool = SolverOptions.affine,
        alpha_e: float = SolverOptions.alpha_e,
        alpha_z: float = SolverOptions.alpha_z,
        tol: float = SolverOptions.tol,
        memory_budget: int | None = SolverOptions.memory_budget,
        assign_labels: AssignLabels = "cluster_qr",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.n_clusters: int | Literal["auto"] = n_clusters
        self.pca_rank = pca_rank
        self.affine = affine
        self.alpha_e = alpha_e
        self.alpha_z = alpha_z
        self.tol = tol
        self.memory_budget = memory_budget
        self.assign_labels: AssignLabels = assign_labels
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Tensor | np.ndarray | DLPackArray, y: None = None) -> Self:  # noqa: ARG002
        """Cluster the rows of X.

        Args:
            X: (n_samples, n_features) array-like. A torch tensor, or a CuPy array (any with DLPack that is not a
                numpy array), is computed on its own device, in float64 or, for all other precisions, in float32.
            y: ignored.

        Raises:
            TypeError, ValueError: X is not 2-D, floating-point (tensors) or finite, or has no samples; or a parameter
                is of the wrong type or out of its range.
            MemoryError: the solver does not fit, or not into memory_budget.

        Warns:
            ConvergenceWarning: some samples did not come within tol.
        """
        options = self._options()
        tokens = self._tokens(X, reset=True)
        if len(tokens) == 0:
            raise ValueError(f"X must have at least one sample, got shape {tuple(tokens.shape)}")
        watch = Stopwatch(tokens.device)
        with watch.stage("pca"):
            features = fit_features(tokens, self.pca_rank)
        with watch.stage("solve"):
            solution = self_expression(features.values, options, progress=_print_progress if self.verbose else None)
        with watch.stage("spectral"):
            affinity = solution.affinity()
            found = spectral_subspaces(
                affinity, self.n_clusters, assign_labels=self.assign_labels, random_state=self.random_state
            )
        self.labels_ = found.labels.cpu().numpy()
        self.n_clusters_ = int(self.labels_.max()) + 1
        self.coef_ = coefficient_matrix(solution.indices, solution.values)
        self.affinity_matrix_ = scipy_matrix(affinity)
        self.eigengap_ = found.eigengap
        self.duality_gap_ = solution.gap.cpu().numpy()
        self.n_iter_ = solution.n_iter
        self.seconds_ = watch.seconds()
        self._features = features
        return self

    def transform(self, X: Tensor | np.ndarray | DLPackArray) -> scipy.sparse.csr_array:
        """Express new samples by those of `fit`, with the weights of `fit`.

        Args:
            X: (n, n_features) as `fit` takes it, on any device. A sample of `fit` is here itself among those that
                express it, which in `coef_` it is not: it is expressed nearly by itself alone, unless it lies in the
                hull of others (in few dimensions) or, not affine, others go further in its direction.

        Returns:
            (n, n_samples_fit) float64 on the CPU; row i expresses sample i.

        Raises:
            NotFittedError: before `fit`.
            TypeError, ValueError: as `fit`; or X has other features.
        """
        check_is_fitted(self)
        tokens = self._tokens(X, reset=False)
        features = self._features.transform(tokens.to(self._features.values.device))
        solution = self_expression(features, self._options(), atoms=self._features.values)
        return coefficient_matrix(solution.indices, solution.values, solution.n_atoms).T.tocsr()

    def predict(self, X: Tensor | np.ndarray | DLPackArray) -> np.ndarray:
        """The cluster of each new sample: that with most |coefficients| of `transform`, the lowest of equal ones.

        Args:
            X: (n, n_features) as `transform` takes it. Samples of `fit` mostly get their `labels_`, not always.

        Returns:
            (n,) int64; -1 for a sample that no sample of `fit` expresses.
        """
        return majority_labels(abs(self.transform(X)), self.labels_, self.n_clusters_)

    def _options(self) -> SolverOptions:
        """The solver's settings, all parameters checked."""
        if self.n_clusters != "auto":
            check_integer("n_clusters", self.n_clusters, low=1)
        if self.pca_rank is not None:
            check_integer("pca_rank", self.pca_rank, low=1)
        check_choice("assign_labels", self.assign_labels, get_args(AssignLabels))
        check_random_state(self.random_state)
        return SolverOptions(**{field.name: getattr(self, field.name) for field in fields(SolverOptions)})

    def _tokens(self, X: Tensor | np.ndarray | DLPackArray, *, reset: bool) -> Tensor:
        """The samples as a tensor; their features are remembered, or compared with those of `fit`."""
        if isinstance(X, np.ndarray) or not hasattr(X, "__dlpack__"):
            return as_tokens(np.asarray(validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])))  # pyright: ignore[reportArgumentType]
        tokens = as_tokens(X)
        validate_data(self, tokens, reset=reset, skip_check_array=True)  # pyright: ignore[reportArgumentType]
        return tokens


def _print_progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total} samples")
