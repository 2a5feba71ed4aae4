"""Small token sets with known structure."""

import numpy as np
import torch
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def planted_subspaces(
    n_subspaces: int = 4, each: int = 24, dim: int = 3, n_features: int = 40, noise: float = 0.0, seed: int = 0
) -> tuple[Tensor, np.ndarray]:
    """Float64 tokens (N, D) on random linear subspaces through the origin, shuffled, and their subspaces (N,)."""
    random = np.random.default_rng(seed)
    truth = random.permutation(np.repeat(np.arange(n_subspaces), each))
    bases = [np.linalg.qr(random.standard_normal((n_features, dim)))[0] for _ in range(n_subspaces)]
    tokens = np.stack([bases[k] @ random.standard_normal(dim) for k in truth])
    tokens += noise * random.standard_normal(tokens.shape) / np.sqrt(n_features)
    return torch.from_numpy(tokens), truth


def vit_like(n_frames: int = 8, per_frame: int = 32, n_features: int = 128, seed: int = 0) -> Tensor:
    """Float32 tokens (N, D) as a vision encoder leaves them.

    A large common mean, a power-law spectrum, objects of unequal size that move a little from frame to frame, and two
    tokens of massive norm in every frame.
    """
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, n_features + 1.0) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    n_objects, dim = 12, 4
    objects = random.choice(n_objects, per_frame, p=random.dirichlet(np.full(n_objects, 1.5)))
    centres = random.standard_normal((n_objects, n_features)) * spectrum
    bases = random.standard_normal((n_objects, dim, n_features)) * spectrum
    mean = 2 * random.standard_normal(n_features) / np.sqrt(n_features)
    place = random.standard_normal((per_frame, dim))
    frames = []
    for _ in range(n_frames):
        place = 0.9 * place + np.sqrt(1 - 0.9**2) * random.standard_normal(place.shape)
        frame = mean + centres[objects] + np.einsum("td,tdf->tf", place, bases[objects]) / 2
        frame += 0.3 * random.standard_normal(frame.shape) * spectrum
        frame[random.choice(per_frame, 2, replace=False), 7] += 8 * np.abs(random.standard_normal(2))
        frames.append(frame)
    return torch.from_numpy(np.concatenate(frames)).float()
