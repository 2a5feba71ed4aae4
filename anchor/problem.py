"""The self-expression problem: visual tokens, their PCA, and the weights of its penalties."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .memory import chunk_rows

# An inner product below this part of the largest squared norm is roundoff, not a correlation of two tokens.
NEGLIGIBLE = 1e-10
PCA_BLOCK = 1024


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
    """Peak memory in bytes of `token_features`, the tokens not counted: the Gram matrix, its eigenvectors, as much
    again twice for the eigensolver, a block of tokens and BLAS's copies of it, the features and what is made of them,
    all in float64."""
    if rank is None:
        return 8 * n_tokens * n_features
    size = min(n_tokens, n_features)
    return 8 * (4 * size**2 + 4 * PCA_BLOCK * size + 3 * min(rank, size) * n_tokens)


def token_features(tokens: Tensor, rank: int | None) -> Tensor:
    """The features Y that express each other (VideoAnchor, arXiv 2509.25151: the tokens after PCA to rank r).

    The principal axes come from a float64 Gram matrix of the centred tokens, over features or over tokens, whichever
    is smaller. Components with less than `max(N, D) * 2.2e-16` of the tokens' total energy are dropped as roundoff:
    the rank is min(rank, N - 1, numerical rank), and 0 if all tokens are equal. The sign of a component is chosen so
    that its largest entry is positive, which makes Y the same for rotated features.

    Args:
        tokens: (N, D) finite tensor, N >= 1.
        rank: components to keep; None: no projection and no centring, Y is the tokens themselves.

    Returns:
        (r, N) float64 tensor, one token a column.
    """
    if rank is None:
        return tokens.T.to(torch.float64, memory_format=torch.contiguous_format)
    n_tokens, n_features = tokens.shape
    over_tokens = n_tokens < n_features
    size = min(n_tokens, n_features)
    # One buffer for all blocks: freed ones of its size leave holes that the allocator does not fill.
    room = tokens.new_empty(max(size * PCA_BLOCK, n_features), dtype=torch.float64)
    mean = tokens.new_zeros(n_features, dtype=torch.float64)
    for block in tokens.split(len(room) // n_features):
        mean += _in_float64(block, room).sum(0)
    mean /= n_tokens
    gram = torch.zeros(size, size, dtype=torch.float64, device=tokens.device)
    for start in range(0, max(n_tokens, n_features), PCA_BLOCK):
        block = slice(start, start + PCA_BLOCK)
        if over_tokens:
            part = _in_float64(tokens[:, block], room).sub_(mean[block])
        else:
            part = _in_float64(tokens[block], room).sub_(mean).T
        gram.addmm_(part, part.T)
    total = torch.trace(gram) + n_tokens * mean.square().sum()
    energy, axes = torch.linalg.eigh(gram)
    del gram
    floor = max(n_tokens, n_features) * torch.finfo(torch.float64).eps * total
    kept = min(rank, n_tokens - 1, int((energy > floor).sum()))
    energy, axes = energy[size - kept :].flip(0), axes[:, size - kept :].flip(1)
    if over_tokens:
        features = energy.sqrt()[:, None] * axes.T
    else:
        features = tokens.new_empty(kept, n_tokens, dtype=torch.float64)
        for start in range(0, n_tokens, PCA_BLOCK):
            block = slice(start, start + PCA_BLOCK)
            features[:, block] = axes.T @ _in_float64(tokens[block], room).sub_(mean).T
    largest = features.gather(1, features.abs().argmax(1, keepdim=True)) if kept else features[:, :1]
    return (features * largest.sign()).contiguous()


def _in_float64(part: Tensor, room: Tensor) -> Tensor:
    """A copy of `part` at the start of the float64 buffer `room`."""
    return room[: part.numel()].view(part.shape).copy_(part)


def penalty_weights(Y: Tensor, alpha_e: float, alpha_z: float) -> tuple[float, float]:
    """The published weights lambda_e = alpha_e / mu_e and lambda_z = alpha_z / mu_z.

    mu_e is the second largest L1 norm of a token, mu_z = min_i max_{j != i} |<y_i, y_j>|. Where the published rule
    divides by zero, this one is finite: tokens that correlate with no other (at the mean of all, say) are left out of
    mu_z; if that leaves none, mu_z is the largest squared norm; mu_e falls back to the largest L1 norm; and what is
    still zero (all tokens zero) becomes 1.

    Args:
        Y: (r, N) tensor, one token a column, N >= 2.
        alpha_e: published 800.
        alpha_z: published 800.

    Returns:
        lambda_e, the weight of the L1 norm of the error, and lambda_z, the weight of the squared residual.
    """
    two_largest = Y.abs().sum(0).topk(2).values
    mu_e = torch.where(two_largest[1] > 0, two_largest[1], two_largest[0])
    n_tokens = Y.shape[1]
    strongest = torch.empty(n_tokens, dtype=Y.dtype, device=Y.device)
    for start in range(0, n_tokens, chunk_rows(n_tokens)):
        block = slice(start, start + chunk_rows(n_tokens))
        products = (Y[:, block].T @ Y).abs_()
        products.diagonal(offset=start).zero_()
        strongest[block] = products.amax(1)
    largest_square = Y.square().sum(0).amax()
    correlated = strongest > NEGLIGIBLE * largest_square
    mu_z = torch.where(correlated, strongest, torch.inf).amin()
    mu_z = torch.where(correlated.any(), mu_z, largest_square)
    mu_e, mu_z = torch.stack([mu_e, mu_z]).tolist()
    return alpha_e / (mu_e or 1.0), alpha_z / (mu_z or 1.0)


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
    """

    atoms: Tensor
    error_bound: float
    affine: bool

    @classmethod
    def of(cls, Y: Tensor, *, affine: bool, alpha_e: float, alpha_z: float) -> "Problem":
        """The problem of features Y (r, N), N >= 2, one token a column, with the published weights."""
        Y = Y.double()
        lambda_e, lambda_z = penalty_weights(Y, alpha_e, alpha_z)
        return cls(lambda_z**0.5 * Y, lambda_e / lambda_z**0.5, affine)
