"""Ordinary and hostile tokens that have stalled a solver of this problem: each token solved, and each claim true.

A claim is checked without the package: its coefficients are put into the objective in NumPy, float64, and compared
with the bounds of `reference.optimum`, an interior point of the tests' own.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores
from videoanchor_triton.anchor.solver import self_expression

from .reference import check_claims, coefficients, documented_weights
from .tokens import planted_subspaces

CHECKED = 12  # tokens of a case: the worst by their own claim, and others by lot


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def subspaces(noise: float = 0.0) -> Tensor:
    return planted_subspaces(noise=noise)[0]


def with_noise_of(size: float) -> Tensor:
    return torch.cat([subspaces(), subspaces() + size * normal(96, 40)])


def zero_tokens() -> Tensor:
    tokens = subspaces()
    tokens[::5] = 0
    return tokens


def row_scales(decades: float) -> Tensor:
    exponents = torch.rand(96, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return subspaces() * 10 ** (decades * (2 * exponents - 1))


def one_huge(size: float) -> Tensor:
    return torch.cat([subspaces(), size * subspaces()[:1] + 1])


def one_differs(n_equal: int) -> Tensor:
    return torch.cat([torch.ones(n_equal, 8), torch.zeros(60 - n_equal, 8)]).double()


def massive_features(n_tokens: int = 192) -> Tensor:
    """Bfloat16 tokens as decoders have them: two features are some 1e4 in a few tokens, others are below 1."""
    tokens = normal(n_tokens, 128) @ (torch.diag(torch.arange(1, 129.0).double() ** -0.5))
    tokens[::24, 7] = 1e4
    tokens[5::48, 100] = -6e3
    return tokens.bfloat16()


def massive_feature_of_all() -> Tensor:
    tokens = normal(192, 128)
    tokens[:, 7] += 1e4
    return tokens.bfloat16()


@cache
def patches(n_tokens: int, photograph: int = 0, size: int = 14) -> Tensor:
    """Raw pixels (n, 588) of a regular grid over one of scikit-learn's photographs."""
    pixels = load_sample_images().images[photograph].astype(np.float32)
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    blocks = pixels[: rows * size, : columns * size].reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    tokens = blocks.reshape(rows * columns, -1)
    return torch.from_numpy(tokens[:: len(tokens) // n_tokens][:n_tokens].copy())


def grid() -> Tensor:
    return torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()


def hypercube() -> Tensor:
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).double()


def digits() -> Tensor:
    return torch.from_numpy(load_digits(return_X_y=True)[0][:200])


@dataclass(frozen=True)
class Case:
    name: str
    tokens: Callable[[], Tensor]
    rank: int | None = 64
    options: dict[str, Any] = field(default_factory=dict)

    def solver_options(self, **more: Any) -> SolverOptions:
        return SolverOptions(**self.options | more)


CASES = (
    Case("planes", subspaces),
    Case("planes-noise", lambda: subspaces(0.5)),
    Case("zero-tokens", zero_tokens),
    Case("zero-tokens-raw", zero_tokens, None),
    Case("zero-tokens-linear", zero_tokens, 64, {"affine": False}),
    Case("zero-tokens-raw-linear", zero_tokens, None, {"affine": False}),
    Case("one-not-zero", lambda: one_differs(1)),
    Case("two-values", lambda: one_differs(30)),
    Case("two-values-raw-linear", lambda: one_differs(30), None, {"affine": False}),
    Case("constant-features", lambda: torch.cat([subspaces(), torch.full((96, 3), 7.0)], 1)),
    Case("row-scales-3", lambda: row_scales(3)),
    Case("row-scales-3-float32", lambda: row_scales(3).float()),
    Case("row-scales-3-raw", lambda: row_scales(3), None),
    Case("row-scales-3-linear", lambda: row_scales(3), 64, {"affine": False}),
    Case("row-scales-6", lambda: row_scales(6)),
    Case("row-scales-6-linear", lambda: row_scales(6), 64, {"affine": False}),
    Case("one-huge-1e4", lambda: one_huge(1e4)),
    Case("one-huge-1e4-linear", lambda: one_huge(1e4), 64, {"affine": False}),
    Case("one-huge-1e6-float32", lambda: one_huge(1e6).float()),
    Case("one-huge-1e6-raw", lambda: one_huge(1e6), None),
    Case("orthogonal", lambda: torch.eye(64, dtype=torch.float64)),
    Case("orthogonal-raw", lambda: torch.eye(64, dtype=torch.float64), None),
    Case("orthogonal-raw-linear", lambda: torch.eye(64, dtype=torch.float64), None, {"affine": False}),
    Case("twice", lambda: subspaces().repeat(2, 1)),
    Case("eight-times", lambda: subspaces()[:60].repeat(8, 1)),
    Case("eight-times-float32", lambda: subspaces()[:60].repeat(8, 1).float()),
    Case("eight-times-linear", lambda: subspaces()[:60].repeat(8, 1), 64, {"affine": False}),
    Case("almost-twice-1e-3", lambda: with_noise_of(1e-3)),
    Case("almost-twice-1e-6", lambda: with_noise_of(1e-6)),
    Case("almost-twice-1e-6-float32", lambda: with_noise_of(1e-6).float()),
    Case("more-features-than-tokens", lambda: normal(40, 100), None),
    Case("more-features-than-tokens-linear", lambda: normal(40, 100), None, {"affine": False}),
    *(Case(f"n-{n}", lambda n=n: normal(n, 40)) for n in (1, 2, 3, 5, 24, 25, 26)),
    Case("n-2-linear", lambda: normal(2, 40), 64, {"affine": False}),
    Case("n-3-equal-pair", lambda: normal(2, 40)[[0, 0, 1]]),
    Case("all-zero", lambda: torch.zeros(50, 8)),
    Case("all-equal", lambda: torch.full((50, 8), 3.3)),
    Case("all-equal-raw", lambda: torch.full((50, 8), 3.3), None),
    Case("one-feature", lambda: normal(200, 1)),
    Case("one-feature-integers", lambda: torch.arange(100.0)[:, None]),
    Case("one-feature-1500", lambda: normal(1500, 1).float()),
    Case("one-feature-raw-linear", lambda: normal(200, 1), None, {"affine": False}),
    Case("two-features", lambda: normal(300, 2)),
    Case("two-features-1500", lambda: normal(1500, 2).float()),
    Case("three-features-1500", lambda: normal(1500, 3).float()),
    Case("grid", grid),
    Case("hypercube", hypercube),
    Case("bf16-massive-tokens", massive_features),
    Case("bf16-massive-tokens-rank-8", massive_features, 8),
    Case("bf16-massive-feature", massive_feature_of_all),
    Case("bf16-massive-feature-raw-linear", massive_feature_of_all, None, {"affine": False}),
    Case("fp16", lambda: subspaces(0.5).half()),
    Case("digits", digits, 32),
    *(Case(f"patches-rank-{rank}", lambda: patches(300), rank) for rank in (1, 2, 4, 8, 16, 64, 128)),
    Case("patches-600-rank-8", lambda: patches(600), 8),
    Case("patches-600-rank-16", lambda: patches(600), 16),
    Case("patches-flower", lambda: patches(300, 1)),
    Case("patches-linear", lambda: patches(300), 32, {"affine": False}),
    Case("patches-raw", lambda: patches(40), None),
    Case("alpha-e-1", lambda: subspaces(0.5), 64, {"alpha_e": 1.0}),
    Case("alpha-e-0.01", lambda: subspaces(0.5), 64, {"alpha_e": 0.01}),
    Case("alpha-e-1-linear", lambda: subspaces(0.5), 64, {"alpha_e": 1.0, "affine": False}),
    Case("patches-alpha-e-1", lambda: patches(200), 16, {"alpha_e": 1.0}),
    Case("alpha-z-1", lambda: subspaces(0.5), 64, {"alpha_z": 1.0}),
    Case("alpha-z-2-linear", lambda: subspaces(0.5), 64, {"alpha_z": 2.0, "affine": False}),
    Case("alpha-z-1e6", lambda: subspaces(0.5), 64, {"alpha_z": 1e6}),
    *(Case(f"times-{scale:g}", lambda scale=scale: scale * subspaces()) for scale in (1e-300, 1e-160, 1e160, 1e300)),
    *(Case(f"times-{scale:g}-float32", lambda scale=scale: (scale * subspaces()).float()) for scale in (1e-38, 1e30)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_token_is_solved_and_every_claim_is_true(case: Case) -> None:
    Y = token_features(case.tokens(), case.rank)
    options = case.solver_options()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = self_expression(Y, options)
    gaps, C = found.gap.numpy(), coefficients(found)
    assert found.converged
    assert gaps.min() >= 0
    assert gaps.max() <= options.tol
    assert found.values.dtype == torch.float64
    assert np.count_nonzero(C.diagonal()) == 0
    Y = Y.numpy()
    if Y.shape[1] < 2 or (Y[:, :1] == Y).all():
        assert not C.any()  # nothing can be told apart
        return
    if options.affine:
        assert (np.abs(C.sum(0) - 1) <= 1e-12 * np.maximum(1, np.abs(C).sum(0))).all()
    by_lot = np.random.default_rng(0).permutation(len(gaps))
    some = dict.fromkeys([*np.argsort(-gaps)[: CHECKED // 2], *by_lot[: CHECKED // 2]])
    weights = documented_weights(Y, options.alpha_e, options.alpha_z)
    check_claims(Y, C, gaps, weights, options.affine, some)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_are_finite_and_within_0_and_1(case: Case) -> None:
    tokens = case.tokens()
    config = VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=8, pca_rank=case.rank, **case.options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = anchor_scores(tokens, config)
    assert result.converged
    assert result.scores.shape == result.labels.shape == (len(tokens),)
    assert torch.isfinite(result.scores).all()
    assert 0 <= float(result.scores.min()) <= float(result.scores.max()) <= 1
    assert 0 <= int(result.labels.min()) <= int(result.labels.max()) < 8


@pytest.mark.parametrize("rank", [16, None], ids=["rank-16", "raw"])
@pytest.mark.parametrize("exponent", [-960, -530, 530, 1000])
def test_the_unit_of_tokens_does_not_matter(exponent: int, rank: int | None) -> None:
    """Powers of two, which change no digit; 2^530 is 1e160."""
    config = VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=4, pca_rank=rank)
    expected, found = (anchor_scores(scale * subspaces(), config) for scale in (1.0, 2.0**exponent))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)
    assert expected.scores.any()
