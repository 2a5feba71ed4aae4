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
    """Orthogonal matching pursuit of the columns of Y (r, N): the atom of largest slope joins, least squares anew, until
    there are `terms` atoms or a residual of squared norm `least`."""
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

    By ADMM; the inverse is (r, r) and shared, thresholds are the tokens' own.
    """
    norms = Y.norm(dim=0).clamp_min(1e-300)
    F = Y / norms
    (rank, n_tokens), rho = F.shape, PENALTY
    inverse = torch.linalg.inv(rho * torch.eye(rank, dtype=F.dtype) + F @ F.T)
    indices, values, worst, zero = [], [], 0.0, F.new_zeros(())
    for own in torch.arange(n_tokens).split(BLOCK):
        t, mine = F.T[own], (torch.arange(len(own)), own)
        largest = (t @ F).abs_().index_put_(mine, zero).amax(1, keepdim=True).clamp_min(1e-12)
        l1, l2 = largest / EFFORT, largest * (1 - L1_SHARE) / L1_SHARE / EFFORT  # divided by gamma

        c, u = t.new_zeros(len(own), n_tokens), t.new_zeros(len(own), n_tokens)
        weight = 1 / (1 + l2 / rho)
        gap = t.new_tensor(1.0)
        for k in range(MOST_ITERATIONS):
            right = t @ F + rho * (c - u)
            a = (right - ((right @ F.T) @ inverse) @ F) / rho
            a = RELAXATION * a + (1 - RELAXATION) * c
            c = _shrink(a + u, l1 / rho) * weight
            c[mine] = 0
            u += a - c
            if k % 20 == 19:
                nu = t - c @ F.T
                primal = l1[:, 0] * c.abs().sum(1) + l2[:, 0] / 2 * c.square().sum(1) + nu.square().sum(1) / 2
                beyond = _shrink((nu @ F).index_put_(mine, zero), l1).square().sum(1)
                dual = (t * nu).sum(1) - nu.square().sum(1) / 2 - beyond / (2 * l2[:, 0])
                gap = ((primal - dual) / primal).amax()
                if gap <= tol:
                    break
        worst = max(worst, float(gap))
        kept = max(1, int((c != 0).sum(1).amax()))
        chosen = c.abs().topk(kept).indices
        indices.append(chosen)
        values.append(c.gather(1, chosen))
    width = max(x.shape[1] for x in indices)
    found, weights = (
        torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in parts]) for parts in (indices, values)
    )
    return found, weights * norms[:, None] / norms[found], worst


def _shrink(x: Tensor, threshold: Tensor) -> Tensor:
    return x - x.clamp(-threshold, threshold)
