"""Tokens for the measurements of the scores: unions of subspaces, digits, a vision encoder's look, real photographs."""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits, load_sample_images

POOLED = 7
HIDDEN = 512


@dataclass(frozen=True)
class Tokens:
    """A set of tokens and what is known about it.

    Attributes:
        X: (N, D) float64, one token a row.
        truth: (N,) subspace or class of each token, None where there is none.
        matches: (P, 2) tokens that show the same place, None where there is no camera.
        n_clusters: subspaces to look for.
        pca_rank: components to use; None: the tokens as they are.
        affine: the subspaces need not contain the origin.
    """

    X: np.ndarray
    truth: np.ndarray | None = None
    matches: np.ndarray | None = None
    n_clusters: int = 24
    pca_rank: int | None = 64
    affine: bool = True


def random_subspaces(
    n_subspaces: int, dim: int, n_features: int, each: int, noise: float = 0.0, seed: int = 0
) -> Tokens:
    """Unit vectors, uniform on random linear subspaces, plus Gaussian noise of expected squared norm noise^2.

    Five subspaces of dimension 6 in 9 dimensions without noise is the synthetic experiment of You et al. (2016).
    """
    random = np.random.default_rng(seed)
    bases = [np.linalg.qr(random.standard_normal((n_features, dim)))[0] for _ in range(n_subspaces)]
    return _on_subspaces(bases, each, noise, random)


def disjoint_subspaces(angle: float, each: int, dim: int = 4, n_features: int = 50, seed: int = 0) -> Tokens:
    """Three disjoint subspaces, each inside the sum of the other two, neighbours at one angle (degrees).

    The synthetic experiment of Elhamifar and Vidal (2013), made harder: there the smallest principal angle between
    neighbours is `angle`, here all of them are.
    """
    random = np.random.default_rng(seed)
    both = np.linalg.qr(random.standard_normal((n_features, 2 * dim)))[0]
    turns = np.deg2rad(angle) * np.arange(3)
    bases = [np.cos(turn) * both[:, :dim] + np.sin(turn) * both[:, dim:] for turn in turns]
    return _on_subspaces(bases, each, 0.0, random)


def _on_subspaces(bases: list[np.ndarray], each: int, noise: float, random: np.random.Generator) -> Tokens:
    truth = np.repeat(np.arange(len(bases)), each)
    n_features, dim = bases[0].shape
    weights = random.standard_normal((len(truth), dim))
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    X = np.stack([bases[k] @ weight for k, weight in zip(truth, weights, strict=True)])
    X += noise * random.standard_normal(X.shape) / n_features**0.5
    return Tokens(X, truth, n_clusters=len(bases), pca_rank=None, affine=False)


def vit_like(n_tokens: int, n_features: int = 512, seed: int = 0) -> Tokens:
    """Eight frames as a vision encoder leaves them, made up: a large common mean, a power-law spectrum, 24 objects of
    unequal size that move a little from frame to frame, two tokens of massive norm in every frame.

    n_tokens is rounded down to a multiple of 8.
    """
    random = np.random.default_rng(seed)
    n_frames, n_objects, dim = 8, 24, 6
    spectrum = np.arange(1, n_features + 1.0) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    per_frame = n_tokens // n_frames
    objects = random.choice(n_objects, per_frame, p=random.dirichlet(np.full(n_objects, 1.5)))
    centres = random.standard_normal((n_objects, n_features)) * spectrum
    bases = random.standard_normal((n_objects, dim, n_features)) * spectrum
    mean = 2 * random.standard_normal(n_features) / n_features**0.5
    place = random.standard_normal((per_frame, dim))
    frames = []
    for _ in range(n_frames):
        place = 0.9 * place + (1 - 0.9**2) ** 0.5 * random.standard_normal(place.shape)
        frame = mean + centres[objects] + np.einsum("td,tdf->tf", place, bases[objects]) / dim**0.5
        frame += 0.3 * random.standard_normal(frame.shape) * spectrum
        frame[random.choice(per_frame, 2, replace=False), 7] += 8 * np.abs(random.standard_normal(2))
        frames.append(frame)
    return Tokens(np.concatenate(frames), np.tile(objects, n_frames))


def digits(n_tokens: int, seed: int = 0) -> Tokens:
    """The first n of scikit-learn's digits in random order: 64 pixels, ten classes."""
    X, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
    chosen = np.random.default_rng(seed).permutation(len(X))[:n_tokens]
    return Tokens(X[chosen].astype(np.float64), classes[chosen], n_clusters=10, pca_rank=32)


def camera(n_steps: int, patch: int = 28, seed: int = 0) -> Tokens:
    """Patches of a camera that pans and zooms over scikit-learn's two photographs, n_steps frames over each.

    Frames are 252 x 336 pixels, patches `patch` x `patch`, 28 or another divisor of both that 7 divides. Every patch
    goes through the same two-layer network of random weights. The camera is that of `videoanchor demo`, so that it is
    known which tokens of neighbouring frames show the same place.
    """
    from PIL import Image

    from videoanchor_triton.app.token_grid import TokenGrid
    from videoanchor_triton.app.torchvision_compat import make_torchvision_importable

    make_torchvision_importable()
    from videoanchor_triton.app.demo import FRAME_HEIGHT, FRAME_WIDTH, camera_path, matching_tokens

    rows, columns = FRAME_HEIGHT // patch, FRAME_WIDTH // patch
    cameras, patches = [], []
    for number, photograph in enumerate(load_sample_images().images):
        for left, top, scale in camera_path(n_steps, *photograph.shape[:2]):
            view = (left, top, left + scale * FRAME_WIDTH, top + scale * FRAME_HEIGHT)
            size = (columns * POOLED, rows * POOLED)
            frame = Image.fromarray(photograph).resize(size, Image.Resampling.BOX, box=view)
            pixels = np.asarray(frame, dtype=np.float64).reshape(rows, POOLED, columns, POOLED, 3)
            patches.append(pixels.swapaxes(1, 2).reshape(rows * columns, -1))
            cameras.append((number, left, top, scale))
    pixels = np.concatenate(patches)
    pixels = (pixels - pixels.mean()) / pixels.std()
    random = np.random.default_rng(seed)
    first = random.standard_normal((pixels.shape[1], HIDDEN)) / pixels.shape[1] ** 0.5
    second = random.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5
    hidden = pixels @ first
    tokens = hidden + np.maximum(hidden, 0) @ second
    grid = TokenGrid(len(cameras), rows, columns)
    return Tokens(tokens, matches=matching_tokens(np.array(cameras), grid))
