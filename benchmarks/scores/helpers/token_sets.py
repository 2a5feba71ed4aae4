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
    truth = np.repeat(np.arange(n_subspaces), each)
    weights = random.standard_normal((len(truth), dim))
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    X = np.stack([bases[k] @ weight for k, weight in zip(truth, weights, strict=True)])
    X += noise * random.standard_normal(X.shape) / n_features**0.5
    return Tokens(X, truth, n_clusters=n_subspaces, pca_rank=None, affine=False)


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


def photo(n_tokens: int, patch: int = 28, seed: int = 0) -> Tokens:
    """n patches of scikit-learn's two photographs, half of each, on a regular grid, made tokens as in `camera`."""
    pixels = []
    for image, count in zip(load_sample_images().images, (n_tokens - n_tokens // 2, n_tokens // 2), strict=True):
        height, width = (side - patch for side in image.shape[:2])
        rows = max(1, round((count * height / width) ** 0.5))
        ys, xs = np.linspace(0, height, rows).astype(int), np.linspace(0, width, -(-count // rows)).astype(int)
        corners = [(y, x) for y in ys for x in xs][:count]
        views = np.stack([image[y : y + patch, x : x + patch].astype(np.float64) for y, x in corners])
        pooled = views.reshape(count, POOLED, patch // POOLED, POOLED, patch // POOLED, 3).mean((2, 4))
        pixels.append(pooled.reshape(count, -1))
    return Tokens(embedded(np.concatenate(pixels), np.random.default_rng(seed)))


def embedded(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(N, HIDDEN) tokens from the pixels (N, values) of patches: two layers of random weights."""
    pixels = (pixels - pixels.mean()) / pixels.std()
    hidden = pixels @ random.standard_normal((pixels.shape[1], HIDDEN)) / pixels.shape[1] ** 0.5
    return hidden + np.maximum(hidden, 0) @ random.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5


def camera(n_steps: int, patch: int = 28, seed: int = 0) -> Tokens:
    """Patches of a camera that pans and zooms over scikit-learn's two photographs, n_steps frames over each.

    Frames are 252 x 336 pixels, patches `patch` x `patch`, 28 or another divisor of both that 7 divides. Every patch
    goes through the same two-layer network of random weights. The camera is that of `videoanchor demo`, so that it is
    known which tokens of neighbouring frames show the same place.
    """
    from PIL import Image

    from videoanchor_triton.app.demo import FRAME_HEIGHT, FRAME_WIDTH, camera_path, matching_tokens
    from videoanchor_triton.app.token_grid import TokenGrid

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
    tokens = embedded(np.concatenate(patches), np.random.default_rng(seed))
    grid = TokenGrid(len(cameras), rows, columns)
    return Tokens(tokens, matches=matching_tokens(np.array(cameras), grid))
