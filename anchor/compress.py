"""What stands for groups of visual tokens: their features, and the factors of the gate."""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import VideoAnchorConfig
from .grouping import Groups, Merge


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
