"""Other sparse self-expressions, batched: orthogonal matching pursuit and the elastic net (You et al. 2016, both).

As published, tokens are scaled to norm 1 and coefficients need not sum to 1. Each returns indices (N, k) and values
(N, k) of the coefficients of the tokens as they are given.
"""

import torch
from torch import Tensor

BLOCK = 256  # tokens at a time
OMP_TERMS = 10
L1_SHARE, EFFORT = 0.95, 50.0  # lambda and alpha of the elastic net, as published for images
PENALTY, RELAXATION, MOST_ITERATIONS = 0.6, 1.8, 20_000


def omp(Y: Tensor, terms: int = OMP_TERMS, least: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of the columns of Y (r, N): the atom of largest slope joins, least squares anew,
    until there are `terms` atoms or a residual of squared norm `least`."""
    norms = Y.norm(dim=0).clamp_min(1e-300)
    atoms = (Y / norms).T
    n_tokens, terms = len(atoms), min(terms, len(atoms) - 1, len(Y))
    indices, values = torch.zeros(n_tokens, terms, dtype=torch.int64), Y.new_zeros(n_tokens, terms)
    for own in torch.arange(n_tokens).split(BLOCK):
        target, found = atoms[own], own[:, None]  # the token itself stands first so that it is never chosen
        residual, weights = target, target.new_zeros(len(own), 0)
        for _ in range(terms):
            slopes = (residual @ atoms.T).abs_().scatter_(1, found, -1.0)
            found = torch.cat([found, slopes.argmax(1, keepdim=True)], 1)
            chosen = atoms[found[:, 1:]]  # (b, k, r)
            gram = chosen @ chosen.mT + 1e-10 * torch.eye(chosen.shape[1], dtype=Y.dtype)
            new = torch.linalg.solve(gram, (chosen @ target[..., None]))[..., 0]
            done = residual.square().sum(1, keepdim=True) <= least
            weights = torch.where(done, torch.nn.functional.pad(weights, (0, 1)), new)
            residual = target - (weights[:, None] @ chosen)[:, 0]
        indices[own], values[own] = found[:, 1:], weights
    return indices, values * norms[:, None] / norms[indices]


def elastic_net(Y: Tensor, tol: float = 1e-3) -> tuple[Tensor, Tensor, float]:
    """min_c lambda |c|_1 + (1 - lambda) / 2 |c|^2 + gamma / 2 |y - Y c|^2, c_own = 0, of the columns of Y (r, N), to a
    relative duality gap of tol; gamma is EFFORT times the least that gives a coefficient. Also returns the largest gap.

    By ADMM; the inverse is (r, r) and shared, thresholds are the tokens' own, and tokens leave as they converge.
    """
    norms = Y.norm(dim=0).clamp_min(1e-300)
    F = Y / norms
    (rank, n_tokens), zero = F.shape, F.new_zeros(())
    inverse = torch.linalg.inv(PENALTY * torch.eye(rank, dtype=F.dtype) + F @ F.T)
    found, worst = torch.zeros(n_tokens, n_tokens, dtype=torch.float32), 0.0
    for own in torch.arange(n_tokens).split(BLOCK):
        t, mine = F.T[own], (torch.arange(len(own)), own)
        largest = (t @ F).abs_().index_put_(mine, zero).amax(1, keepdim=True).clamp_min(1e-12)
        l1, l2 = largest / EFFORT, largest * (1 - L1_SHARE) / L1_SHARE / EFFORT  # divided by gamma
        c, u, fit = t.new_zeros(len(own), n_tokens), t.new_zeros(len(own), n_tokens), t @ F
        for k in range(1, MOST_ITERATIONS + 1):
            right = fit + PENALTY * (c - u)
            a = (right - ((right @ F.T) @ inverse) @ F) / PENALTY
            a = RELAXATION * a + (1 - RELAXATION) * c
            c = (_shrink(a + u, l1 / PENALTY) / (1 + l2 / PENALTY)).index_put_(mine, zero)
            u += a - c
            if k % 20 and k < MOST_ITERATIONS:
                continue
            nu = t - c @ F.T
            primal = l1[:, 0] * c.abs().sum(1) + (l2 * c.square()).sum(1) / 2 + nu.square().sum(1) / 2
            beyond = (_shrink((nu @ F).index_put_(mine, zero), l1).square() / l2).sum(1)
            gap = (primal - (t * nu).sum(1) + nu.square().sum(1) / 2 + beyond / 2) / primal
            left = (gap > tol) & (k < MOST_ITERATIONS)
            found[own[~left]] = c[~left].float()
            worst = max([worst, *gap[~left].tolist()])
            if not left.any():
                break
            own, t, l1, l2, c, u, fit = (x[left] for x in (own, t, l1, l2, c, u, fit))
            mine = (torch.arange(len(own)), own)
    indices = found.abs().topk(max(1, int((found != 0).sum(1).amax()))).indices
    return indices, found.gather(1, indices).to(Y.dtype) * norms[:, None] / norms[indices], worst


def _shrink(x: Tensor, threshold: Tensor) -> Tensor:
    return x - x.clamp(-threshold, threshold)
