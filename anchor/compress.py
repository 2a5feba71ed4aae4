"""What stands for groups of visual tokens: their features, and the factors of the gate."""

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .config import VideoAnchorConfig
from .grouping import Groups, Merge, group_tokens
from .problem import as_tokens
from .scores import AnchorResult, anchor_scores


class GroupMoments(NamedTuple):
    """What the gate of groups is made of, each (k,) float32.

    Attributes:
        counts: how many tokens a group counts as.
        scores: the mean m1 of its scores.
        squares: the mean m2 of their squares.
    """

    counts: Tensor
    scores: Tensor
    squares: Tensor


def group_moments(scores: Tensor, groups: Groups, merge: Merge) -> GroupMoments:
    """Of scores (n,) of tokens in groups. With merge="mean" and "drop" a group is one token, of its mean score or of
    that of its representative."""
    means = groups.reduced(scores[:, None].float(), merge)[:, 0]
    if merge != "counts":
        return GroupMoments(torch.ones_like(means), means, means.square())
    return GroupMoments(groups.counts().float(), means, groups.means(scores[:, None].float().square())[:, 0])


def group_factors(counts: Tensor, scores: Tensor, squares: Tensor, config: VideoAnchorConfig) -> tuple[Tensor, Tensor]:
    """log gamma_K and gamma_V of groups with these moments, in their shape: a key has the sum of its members' factors,
    n (1 + alpha_k m1), and its value their mean gain weighted by these, 1 + alpha_v (m1 + alpha_k m2) / (1 + alpha_k
    m1)."""
    log_gamma_k = torch.log1p(config.alpha_k * scores) + counts.log()
    gain = (scores + config.alpha_k * squares) / (1.0 + config.alpha_k * scores)
    return log_gamma_k, 1.0 + config.alpha_v * torch.where(counts == 1, scores, gain)  # of a single token to the bit


@dataclass(frozen=True, eq=False)
class Compressed:
    """Visual tokens merged into k groups, on their device, in the order of the representatives.

    Attributes:
        features: (k, D) in the precision of the tokens: what takes the place of the visual embeddings.
        kept: (k,) int64 the token that represents each group, ascending: its place in the prompt, and its position ids,
            are the group's.
        groups: (n,) int64 the group of each token, -1 of one that merge="drop" dropped.
        counts: (k,) int64 the members of each group; with merge="mean" and "drop" they do not weigh.
        log_gamma_k: (k,) float32 log of the factor of the group's key, its count included.
        gamma_v: (k,) float32 factor of its value.
        gamma_q: (k,) float32 factor of its query, 1 + alpha_q times its mean score.
        scores: (k,) float32 that mean score.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, keep=3)
        >>> merged = va.compress(torch.randn(12, 8), config, scores=torch.rand(12))
        >>> merged.features.shape, merged.counts.sum()
        (torch.Size([3, 8]), tensor(12))
    """

    features: Tensor
    kept: Tensor
    groups: Tensor
    counts: Tensor
    log_gamma_k: Tensor
    gamma_v: Tensor
    gamma_q: Tensor
    scores: Tensor


def compress(
    features: Tensor,
    config: VideoAnchorConfig,
    *,
    scores: Tensor | AnchorResult | None = None,
    grid: Tensor | None = None,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Compressed:
    """Merges the visual tokens of a prompt, for a prefill and a decoding loop of your own (this package's own, not the
    paper's). `generate()` of a model enabled with `keep` does it by itself, by the same code.

    Put `features` in place of the visual embeddings, leave the other placeholders out, keep the position ids of `kept`
    and give attention the factors, 0 and 1 for text. Layers whose features come from elsewhere (deepstack) take the
    means by `groups`, or with merge="drop" what they have at `kept`. Where decoding steps are not gated
    (decode="prefill"), the log of the counts stays in them.

    Args:
        features: (n, D) floating-point, the visual tokens of one prompt, n >= 1, of images or of videos: a group mixes
            no two kinds, so call it for each.
        config: keep, group and merge; the alphas; random_state; and what scores the tokens.
        scores: (n,) floating-point in [0, 1], or the result of `anchor_scores`, which group="subspace" needs; None
            scores them here, all of them.
        grid: (n, 3) integers, step in time (from 0 on), row and column; None: one token after the other, which have no
            neighbours but these.
        positions: (n, A) their position ids; None: the grid.
        rotary: (n, E) cosines and sines of the model's rotary angles at the positions; None: embeddings alone tell
            tokens apart.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a shape or value is not as described; keep leaves fewer tokens than the grid has steps; or
            arithmetic="authors", which rounds its factors.

    References:
        The gate: VideoAnchor, arXiv 2509.25151. A count as the logarithm of a bias on a key: ToMe's proportional
        attention, Bolya et al., arXiv 2210.09461. The sums over a group: docs/merging.md.

    See Also:
        VideoAnchorConfig: `keep`, `group` and `merge`.
        anchored_attention: takes the factors.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> tokens, grid = torch.randn(32, 16), torch.cartesian_prod(*map(torch.arange, (2, 4, 4)))
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=3, keep=0.25)
        >>> merged = va.compress(tokens, config, grid=grid)
        >>> keys, values = merged.features[None, None], merged.features[None, None]
        >>> out = va.anchored_attention(
        ...     torch.randn(1, 1, 5, 16), keys, values, log_gamma_k=merged.log_gamma_k, gamma_v=merged.gamma_v
        ... )
        >>> out.shape
        torch.Size([1, 1, 5, 16])
    """
    tokens = as_tokens(features)
    n = len(tokens)
    if not n:
        raise ValueError("features must have at least one token, got none: leave prompts without visual tokens alone")
    if config.arithmetic == "authors":
        raise ValueError('arithmetic="authors" rounds its factors, those of groups are exact: leave reproduce() out')
    for name, x, width in (("grid", grid, 3), ("positions", positions, None), ("rotary", rotary, None)):
        _check_by_token(name, x, n, width)
    if grid is not None and (grid.is_floating_point() or grid.dtype == torch.bool):
        raise TypeError(f"grid must hold integers, got {grid.dtype}")
    if scores is None:
        scores = anchor_scores(tokens, config, frames=None if grid is None else grid[:, 0])
    values = _scores_of(scores, n).to(tokens.device)
    (k,) = numbers_kept(config.keep, [n])
    if grid is not None:
        check_steps(config.keep, k, n, int(grid[:, 0].unique().numel()))
    groups = group_tokens(
        tokens,
        k,
        config.group,
        grid=grid,
        positions=positions,
        rotary=rotary,
        labels=scores.labels if isinstance(scores, AnchorResult) else None,
        seed=config.random_state,
    )
    counts, means, squares = group_moments(values, groups, config.merge)
    log_gamma_k, gamma_v = group_factors(counts, means, squares, config)
    gamma_q = 1.0 + config.alpha_q * means
    merged = groups.reduced(tokens, config.merge)
    return Compressed(
        merged, groups.kept, groups.of(config.merge), groups.counts(), log_gamma_k, gamma_v, gamma_q, means
    )


def numbers_kept(keep: float, sizes: list[int]) -> list[int]:
    """How many tokens are left of `sizes` tokens of each modality of a row."""
    total = sum(sizes)
    if not isinstance(keep, Integral):
        return [n and max(1, int(keep * n + 0.5)) for n in sizes]
    if keep >= total:
        return sizes
    if 0 in sizes:
        return [int(keep) if n else 0 for n in sizes]
    first = [max(1, int(keep) * n // total) for n in sizes[:-1]]
    return [*first, int(keep) - sum(first)]


def check_steps(keep: float, k: int, n: int, n_steps: int) -> None:
    """
    Raises:
        ValueError: k of n tokens are fewer than one for each step.
    """
    if k < n_steps:
        raise ValueError(
            f"keep={keep} leaves {k} of {n} visual tokens for {n_steps} frames or images: expected at least one for "
            f"each, keep={n_steps} or {n_steps / n:.3g}"
        )


def _check_by_token(name: str, x: Tensor | None, n: int, width: int | None) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != 2 or len(x) != n or x.shape[1] != (width or x.shape[1]):
        raise ValueError(f"{name} must have shape ({n}, {width or '...'}), a row a token, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def _scores_of(scores: Tensor | AnchorResult, n: int) -> Tensor:
    """(n,) float32."""
    values = scores.scores if isinstance(scores, AnchorResult) else scores
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"scores must be a floating-point tensor or an AnchorResult, got {_type_of(values)}")
    if values.shape != (n,):
        raise ValueError(f"scores must have shape ({n},), one a token, got {tuple(values.shape)}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("scores must be finite and in [0, 1]")
    return values.detach().float()


def _type_of(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
