"""Sparse subspace clustering as a scikit-learn estimator."""

from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import validate_data
from torch import Tensor

from .memory import check_dense_memory
from .problem import as_tokens, token_features
from .solver import SolverOptions, self_expression
from .spectral import AssignLabels, affinity_matrix, sparse_coefficients, spectral_labels


class SparseSubspaceClustering(ClusterMixin, BaseEstimator):
    """Sparse subspace clustering (Elhamifar and Vidal, 2013), with the settings and the ADMM of VideoAnchor.

    Each sample is expressed as a sparse combination of the others, and spectral clustering of the magnitudes of the
    coefficients groups samples that lie in the same (affine) subspace. Memory grows with the square of the number of
    samples.

    Args:
        n_clusters: subspaces; with fewer samples than that, each is its own cluster.
        pca_rank: principal components of the centred samples that are used; None uses the samples as they are.
        affine, alpha_e, alpha_z, rho, relaxation, max_iter, tol: see `SolverOptions`.
        assign_labels: how eigenvectors become labels, "discretize" or "cluster_qr".
        random_state: seed of the spectral step.
        verbose: print the solver's progress.

    Attributes:
        labels_: (n_samples,) int64 cluster of each sample.
        coef_: (n_samples, n_samples) scipy.sparse matrix; coef_[:, j] expresses sample j. Diagonal 0; columns sum
            to 1 when affine, unless all samples are equal: then all is 0.
        affinity_matrix_: (n_samples, n_samples) scipy.sparse matrix, |coef_| + |coef_|'.
        n_iter_: iterations of the solver.
        n_features_in_: features seen in fit.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "pca_rank": [Interval(Integral, 1, None, closed="left"), None],
        "affine": ["boolean"],
        "alpha_e": [Interval(Real, 0, None, closed="neither")],
        "alpha_z": [Interval(Real, 0, None, closed="neither")],
        "rho": [Interval(Real, 0, None, closed="neither")],
        "relaxation": [Interval(Real, 0, 2, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "assign_labels": [StrOptions({"discretize", "cluster_qr"})],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_clusters: int = 24,
        pca_rank: int | None = None,
        *,
        affine: bool = SolverOptions.affine,
        alpha_e: float = SolverOptions.alpha_e,
        alpha_z: float = SolverOptions.alpha_z,
        rho: float = SolverOptions.rho,
        relaxation: float = SolverOptions.relaxation,
        max_iter: int = SolverOptions.max_iter,
        tol: float = SolverOptions.tol,
        assign_labels: AssignLabels = "discretize",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.pca_rank = pca_rank
        self.affine = affine
        self.alpha_e = alpha_e
        self.alpha_z = alpha_z
        self.rho = rho
        self.relaxation = relaxation
        self.max_iter = max_iter
        self.tol = tol
        self.assign_labels: AssignLabels = assign_labels
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Tensor | np.ndarray, y: None = None) -> Self:  # noqa: ARG002
        """Cluster the rows of X.

        Args:
            X: (n_samples, n_features) array, or torch tensor; a tensor is computed on its own device.
            y: ignored.

        Raises:
            TypeError, ValueError: X is not 2-D, floating-point (tensors) or finite.
            MemoryError: the dense solver does not fit.

        Warns:
            ConvergenceWarning: some samples did not converge within max_iter.
        """
        samples = X if isinstance(X, Tensor) else np.asarray(validate_data(self, X, dtype=[np.float64, np.float32]))  # pyright: ignore[reportArgumentType]
        tokens = as_tokens(samples)
        if len(tokens) == 0:
            raise ValueError(f"X must have at least one sample, got shape {tuple(tokens.shape)}")
        self.n_features_in_ = tokens.shape[1]
        options = SolverOptions(
            affine=self.affine,
            alpha_e=self.alpha_e,
            alpha_z=self.alpha_z,
            rho=self.rho,
            relaxation=self.relaxation,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        n_samples, n_features = tokens.shape
        check_dense_memory(n_samples, min(self.pca_rank or n_features, n_features), tokens.dtype, tokens.device)
        features = token_features(tokens, self.pca_rank)
        progress = _print_progress if self.verbose else None
        solution = self_expression(features, options, dtype=tokens.dtype, progress=progress)
        self.n_iter_ = solution.n_iter
        self.coef_ = sparse_coefficients(solution.coef)
        self.affinity_matrix_ = affinity_matrix(self.coef_)
        self.labels_ = spectral_labels(
            self.affinity_matrix_,
            self.n_clusters,
            assign_labels=self.assign_labels,
            random_state=self.random_state,
            device=tokens.device,
        )
        return self


def _print_progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of at most {total} iterations")
