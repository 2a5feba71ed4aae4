"""The self-expression problem: visual tokens, their PCA, and the weights of its penalties."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .eigenvectors import leading_eigenvectors
from .memory import chunk_rows

# A token's norm below this part of the largest is roundoff, and so is an inner product below this part of the token's
# norm times the largest.
NEGLIGIBLE = 1e-10
# Tokens or features that go into the Gram matrix together, and columns of it.
PCA_BLOCK, PCA_PANEL = 1024, 256


class NonFiniteTokensError(ValueError):
    """Tokens hold NaN or infinite values."""


class DLPackArray(Protocol):
    """An array that hands its memory over by the DLPack protocol, as CuPy's do."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


def as_tokens(X: Tensor | np.ndarray | DLPackArray) -> Tensor:
    """Check the tokens. They are not copied.

    Args:
        X: (N, D) floating-point tensor, numpy array, or other array with DLPack (CuPy), N >= 0 tokens of D >= 1
            features.

    Returns:
        (N, D) tensor of X's precision on X's device (CPU for numpy). Nothing leaves the device. It may share X's
        memory, and is not to be written to.

    Raises:
        TypeError: X is no tensor or array, or not of a floating-point type.
        ValueError: X is not 2-D, has no features, or holds NaN or infinity.
    """
    if isinstance(X, np.ndarray):
        if X.dtype.kind != "f" or X.dtype.itemsize > 8:
            raise TypeError(f"X must hold float16, float32 or float64 values, got a numpy array of {X.dtype}")
        tokens = torch.tensor(np.ascontiguousarray(X, dtype=X.dtype.newbyteorder("=")), device="cpu")
    elif isinstance(X, Tensor):
        tokens = X.detach()
    elif hasattr(X, "__dlpack__"):
        tokens = torch.from_dlpack(X)
    else:
        raise TypeError(f"X must be a torch tensor, a numpy array or another DLPack array, got {type(X).__name__}")
    if not tokens.is_floating_point():
        raise TypeError(f"X must be of a floating-point type, got {tokens.dtype}; convert it first, X.float()")
    if tokens.ndim != 2:
        raise ValueError(f"X must be 2-D, (n_tokens, n_features), got shape {tuple(tokens.shape)}")
    if tokens.shape[1] == 0:
        raise ValueError(f"X must have at least one feature, got shape {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        tokens = tokens.float()
    if len(tokens) and not torch.isfinite(torch.stack(tokens.aminmax())).all():
        _report_not_finite(tokens)
    return tokens


def _report_not_finite(tokens: Tensor) -> None:
    count, first = 0, None
    for start, block in zip(range(0, len(tokens), PCA_BLOCK), tokens.split(PCA_BLOCK), strict=True):
        bad = (~torch.isfinite(block)).nonzero()
        if first is None and len(bad):
            first = (start + int(bad[0, 0]), int(bad[0, 1]))
        count += len(bad)
    token, feature = first or (0, 0)
    raise NonFiniteTokensError(
        f"X must be finite, got {count} NaN or infinite values, the first at token {token}, feature {feature}; check "
        f"the vision encoder's output"
    )


def computing_precision(tokens: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.promote_types(tokens.dtype, torch.float32)


def features_memory_bytes(n_tokens: int, n_features: int, rank: int | None) -> int:
    """Peak memory in bytes of `fit_features`, the tokens not counted: the Gram matrix, as much again three times where
    it is decomposed as a dense one, a block of tokens and BLAS's copies of it, the axes, the features and what is made
    of them, all in float64."""
    if rank is None:
        return 8 * n_tokens * n_features
    size = min(n_tokens, n_features)
    blocks = 4 * PCA_BLOCK * size + 2 * min(chunk_rows(1), n_tokens * n_features)
    return 8 * (4 * size**2 + blocks + min(rank, size) * (3 * n_tokens + 2 * n_features))


def power_of_two(x: Tensor) -> float:
    """The largest power of two in the magnitude of x; 1 where x has no values but 0. Divided by it, x can neither
    overflow nor vanish in products, and loses no bit."""
    largest = max(map(abs, torch.stack(x.aminmax()).tolist())) if x.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 1.0


@dataclass(frozen=True)
class Features:
    """The features Y of fitted tokens, and how they are made of tokens: Y = axes' (tokens / scale - mean).

    Attributes:
        values: (r, N) float64 Y, one token a column.
        scale: a power of two.
        mean: (D,) float64.
        axes: (D, r) float64 orthonormal; None: no projection.
    """

    values: Tensor
    scale: float
    mean: Tensor
    axes: Tensor | None

    def transform(self, tokens: Tensor) -> Tensor:
        """The features (r, n) float64 of other tokens (n, D)."""
        features = self.values.new_empty(len(self.values), len(tokens))
        for block in _chunks(len(tokens), len(self.mean)):
            part = (tokens[block].double() / self.scale).sub_(self.mean).T
            features[:, block] = part if self.axes is None else self.axes.T @ part
        return features


def token_features(tokens: Tensor, rank: int | None) -> Tensor:
    """`fit_features` of tokens (N, D): their (r, N) float64 features alone."""
    return fit_features(tokens, rank).values


def fit_features(tokens: Tensor, rank: int | None) -> Features:
    """The features Y that express each other (VideoAnchor, arXiv 2509.25151: the tokens after PCA to rank r).

    Tokens are divided by a power of two near their largest magnitude. The principal axes come from a float64 Gram
    matrix of the centred tokens, over features or over tokens, whichever is smaller, of which only the leading
    eigenvectors are computed. Components with less than `max(N, D) * 2.2e-16` of the tokens' total energy are dropped
    as roundoff: the rank is min(rank, N - 1, numerical rank), and 0 if all tokens are equal. The sign of a component is
    chosen so that its largest entry is positive, which makes Y the same for rotated features.

    Args:
        tokens: (N, D) finite tensor, N >= 1.
        rank: components to keep; None: no projection and no centring, Y is the scaled tokens themselves.

    Returns:
        The features of these tokens, and of others by `transform`.
    """
    n_tokens, n_features = tokens.shape
    scale = power_of_two(tokens)
    mean = tokens.new_zeros(n_features, dtype=torch.float64)
    if rank is None:
        values = tokens.T.to(torch.float64, memory_format=torch.contiguous_format, copy=True).div_(scale)
        return Features(values, scale, mean, None)
    over_tokens, size = n_tokens < n_features, min(n_tokens, n_features)
    # One buffer for all blocks: freed ones of its size leave holes that the allocator does not fill.
    room = tokens.new_empty(max(size * PCA_BLOCK, n_features), dtype=torch.float64)

    def scaled(part: Tensor) -> Tensor:
        return room[: part.numel()].view(part.shape).copy_(part).div_(scale)

    for block in tokens.split(len(room) // n_features):
        mean += scaled(block).sum(0)
    mean /= n_tokens
    gram = torch.zeros(size, size, dtype=torch.float64, device=tokens.device)
    for start in range(0, max(n_tokens, n_features), PCA_BLOCK):
        block = slice(start, start + PCA_BLOCK)
        part = scaled(tokens[:, block]).sub_(mean[block]) if over_tokens else scaled(tokens[block]).sub_(mean).T
        for first in range(0, size, PCA_PANEL):  # the lower triangle
            panel = slice(first, first + PCA_PANEL)
            gram[first:, panel].addmm_(part[first:], part[panel].T)
    for first in range(0, size, PCA_PANEL):
        gram[first : first + PCA_PANEL, first:] = gram[first:, first : first + PCA_PANEL].T.clone()
    around_mean = torch.trace(gram)
    floor = max(n_tokens, n_features) * torch.finfo(torch.float64).eps * (around_mean + n_tokens * mean.square().sum())
    axes, kept = gram[:, :0], 0
    if (sought := min(rank, n_tokens - 1, size)) and around_mean > floor:
        energy, axes = leading_eigenvectors(lambda x: gram @ x, lambda: gram, size, sought, tokens.device)
        kept = int((energy > floor).sum())
        axes = axes[:, :kept] * (energy[:kept] ** -0.5 if over_tokens else 1)
    if over_tokens:
        over, axes = axes, tokens.new_empty(n_features, kept, dtype=torch.float64)
        for start in range(0, n_features, PCA_BLOCK):
            block = slice(start, start + PCA_BLOCK)
            axes[block] = scaled(tokens[:, block]).sub_(mean[block]).T @ over
    features = Features(tokens.new_empty(kept, 0, dtype=torch.float64), scale, mean, axes).transform(tokens)
    largest = features.gather(1, features.abs().argmax(1, keepdim=True)) if kept else features[:, :1]
    return Features(features.mul_(largest.sign()), scale, mean, axes * largest.sign().T)


def penalty_weights(Y: Tensor, alpha_e: float, alpha_z: float) -> tuple[float, float]:
    """The published weights lambda_e = alpha_e / mu_e and lambda_z = alpha_z / mu_z.

    mu_e is the second largest L1 norm of a token, mu_z = min_i max_{j != i} |<y_i, y_j>|. Where the published rule
    divides by zero, this one is finite: tokens that correlate with no other, or are 0 beside the largest (at the mean
    of all, say), are left out of mu_z; if that leaves none, mu_z is the largest squared norm; mu_e falls back to the
    largest L1 norm; and what is still zero (all tokens zero) becomes 1.

    Args:
        Y: (r, N) tensor, one token a column, N >= 2.
        alpha_e: published 800.
        alpha_z: published 800.

    Returns:
        lambda_e, the weight of the L1 norm of the error, and lambda_z, the weight of the squared residual.
    """
    scale = power_of_two(Y)
    lambda_e, lambda_z = _scaled_weights(Y / scale, alpha_e, alpha_z)
    return lambda_e / scale, lambda_z / scale / scale


def _scaled_weights(Y: Tensor, alpha_e: float, alpha_z: float) -> tuple[float, float]:
    two_largest = Y.abs().sum(0).topk(min(2, Y.shape[1])).values
    mu_e = torch.where(two_largest[-1] > 0, two_largest[-1], two_largest[0])
    strongest = Y.new_empty(Y.shape[1])
    for block in _chunks(len(strongest), len(strongest)):
        products = (Y[:, block].T @ Y).abs_()
        products.diagonal(offset=block.start).zero_()
        strongest[block] = products.amax(1)
    norm = torch.linalg.vector_norm(Y, dim=0)
    longest = norm.amax()
    correlated = (strongest > NEGLIGIBLE * norm * longest) & (norm > NEGLIGIBLE * longest)
    mu_z = torch.where(correlated, strongest, torch.inf).amin()
    mu_z = torch.where(correlated.any(), mu_z, longest**2)
    mu_e, mu_z = torch.stack([mu_e, mu_z]).tolist()
    return alpha_e / (mu_e or 1.0), alpha_z / (mu_z or 1.0)


def _chunks(n_rows: int, width: int) -> Iterator[slice]:
    """The rows of an array (n_rows, width), as many at a time as are handled together."""
    rows = chunk_rows(width)
    return (slice(start, start + rows) for start in range(0, n_rows, rows))


@dataclass(frozen=True)
class Problem:
    """The weighted self-expression problem. For a token t, over the atoms F, each token a column of its own:

        min |c|_1 + error_bound |e|_1 + |t - F c - e|^2 / 2,   and sum(c) = 1 if affine

    which is the published |c|_1 + lambda_e |e|_1 + lambda_z / 2 |y - Y c - e|^2 in the units of F = sqrt(lambda_z) Y,
    free of the scale of the input.

    Attributes:
        atoms: (r, N) float64 F.
        error_bound: lambda_e / sqrt(lambda_z).
        affine: coefficients sum to 1.
        unit: sqrt(lambda_z), by which other tokens are multiplied to be in the units of the atoms.
    """

    atoms: Tensor
    error_bound: float
    affine: bool
    unit: float

    @classmethod
    def of(cls, Y: Tensor, *, affine: bool, alpha_e: float, alpha_z: float) -> "Problem":
        """The problem of features Y (r, N), N >= 2, one token a column, with the published weights."""
        scale = power_of_two(Y)
        Y = Y.double() / scale
        lambda_e, lambda_z = _scaled_weights(Y, alpha_e, alpha_z)
        unit = lambda_z**0.5
        return cls(unit * Y, lambda_e / unit, affine, unit / scale)
