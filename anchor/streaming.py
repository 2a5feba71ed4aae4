"""Scores of a video that goes on: new frames are expressed over a bounded dictionary of earlier tokens."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .admm import Dictionary, Rows
from .affinity import affinity_matrix
from .blocked import kept_coefficients, solve_block
from .config import VideoAnchorConfig
from .memory import plan_block
from .precision import full_precision_products
from .problem import DLPackArray, Problem, as_tokens, penalty_weights, token_features
from .scores import ROUNDOFF, AnchorResult, _throttled
from .solver import Progress, SelfExpression, _Counter, self_expression
from .spectral import MAX_AUTO_CLUSTERS, spectral_labels
from .timing import timed
from .validation import check_integer


@dataclass(frozen=True)
class Atoms:
    """Tokens that express others, and how much they have served.

    Attributes:
        position: (K,) int64, which token of the stream each is, counted from 0.
        features: (r, K) float64, one a column.
        labels: (K,) int64 clusters.
        coefficients: (K,) float64, the signed sum of the coefficients with which each expressed others so far.
        weight: (K,) float64, the sum of their absolute values.
        even_share: (K,) float64, what `coefficients` would be if all atoms had always served equally.
    """

    position: Tensor
    features: Tensor
    labels: Tensor
    coefficients: Tensor
    weight: Tensor
    even_share: Tensor

    @property
    def row_sums(self) -> Tensor:
        return self.coefficients / self.even_share

    def __getitem__(self, chosen: Tensor | slice) -> "Atoms":
        arrays = (self.labels, self.coefficients, self.weight, self.even_share)
        return Atoms(self.position[chosen], self.features[:, chosen], *(array[chosen] for array in arrays))
