"""Groups of visual tokens, each of which one token will stand for: exactly as many as asked for, the same in each run,
on the tokens' device.

A token is seen as [z, w phi(p)]: z its embedding, centred; phi(p) the cosines and sines of the model's rotary angles at
its position, a unit vector; w the root mean square of |z|. Two tokens are then as far apart as their keys are.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouping_rules import cells, evs, farthest, first_of_least, group_means, kmeans, nearest, tome, vidcom2, ward
from .problem import as_tokens, token_features
from .validation import check_choice, check_integer

Group = Literal["ward", "subspace", "farthest", "kmeans", "grid", "tome", "evs", "vidcom2", "random"]
Merge = Literal["counts", "mean", "drop"]
RANK = 64
"""Principal components of what a token is seen as."""


class Groups(NamedTuple):
    """Tokens in groups.

    Attributes:
        member: (n,) int64 the group of each token, 0 to k - 1, in the order of the representatives.
        kept: (k,) int64 the representative of each group, one of its members, ascending.
    """

    member: Tensor
    kept: Tensor

    def of(self, merge: Merge) -> Tensor:
        """(n,) int64: `member`, but with merge="drop" -1 of what is no representative."""
        if merge != "drop":
            return self.member
        return torch.full_like(self.member, -1).index_copy_(0, self.kept, self.member[self.kept])

    def means(self, x: Tensor) -> Tensor:
        """(k, D) of x (n, D): the mean over each group, summed in float32 and in one order."""
        return group_means(x, self.member, len(self.kept))

    def reduced(self, x: Tensor, merge: Merge) -> Tensor:
        """(k, D) of x (n, D): `means`, or with merge="drop" what the representatives have."""
        every = len(self.kept) == len(self.member)  # each alone: to the bit, in every precision
        return x[self.kept] if merge == "drop" or every else self.means(x)

    def counts(self) -> Tensor:
        """(k,) int64, the members of each group."""
        return torch.bincount(self.member, minlength=len(self.kept))


def group_tokens(
    tokens: Tensor,
    k: int,
    group: Group = "ward",
    *,
    grid: Tensor | None = None,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Groups:
    """Puts tokens into exactly k groups.

    - "ward": groups that are neighbours in space and time merge, the pair first that adds least to the squared
      distances within groups (Ward's cost), in rounds over all pairs that are each other's cheapest. The
      representative is the member nearest to the group's mean position.
    - "subspace": the same among tokens with the same label, across labels when nothing else is left.
    - "farthest": the token farthest from all representatives becomes the next one (greedy k-centre); each token goes to
      the nearest. It costs n times k, and so more than 4,096 tokens are put in blocks of about as many ("grid"), unless
      n times k is at most 4,096^2: each block chooses alone, and of the choices of all those stand that were farthest.
    - "random": representatives at random, by `seed`; each token goes to the nearest. The control.
    - "evs": likewise those that differ most, by cosine, from the token at their place in the step before, after those
      of the first step, all of which stay (Efficient Video Sampling, arXiv 2510.14624).
    - "vidcom2": likewise, of each step, those least like the means of the step and of the video, more of steps unlike
      the video (Video Compression Commander, arXiv 2505.14454), here exactly k and at least one a step.
    - "tome": bipartite soft matching of every other token (Bolya et al., arXiv 2210.09461), by cosine, repeated; the
      representative as for "ward".
    - "kmeans": scikit-learn's k-means, seeded by `seed`, on the host; it costs n times k in each iteration. Where it
      finds fewer groups, the tokens farthest from their means are groups of their own. The representative as for
      "ward".
    - "grid": blocks of the grid, whatever the tokens are: the box of all is halved across its longest side, groups in
      proportion to tokens, until a block is a group. The representative as for "ward".

    Args:
        tokens: (n, D) floating-point, n >= 1.
        k: from 1 to n.
        group: the rule.
        grid: (n, 3) int64, step in time, row and column, for "ward", "grid" and many tokens of "farthest"; None: one
            token after the other. Tokens without neighbours merge with those before and after them, when nothing else
            is left.
        positions: (n, A) as the model's rotary embedding counts them; None: the grid.
        rotary: (n, E) cosines and sines of the rotary angles at the positions; None: embeddings alone.
        labels: (n,) int64, the subspaces of "subspace".
        seed: of "random" and "kmeans".

    Raises:
        TypeError, ValueError: k or the tokens are not as described, or too few for "evs".

    Examples:
        >>> import torch
        >>> from videoanchor_triton.anchor.grouping import group_tokens
        >>> groups = group_tokens(torch.tensor([[0.0], [0.1], [5.0], [0.2], [5.1]]), 2)
        >>> groups.counts().sum()
        tensor(5)
    """
    X = as_tokens(tokens)
    n = len(X)
    check_choice("group", group, get_args(Group))
    check_integer("k", k, low=1, high=n)
    if grid is None:
        grid = torch.stack([torch.arange(n, device=X.device), *X.new_zeros(2, n, dtype=torch.int64)], 1)
    positions = (grid if positions is None else positions).to(X.device).double()
    if k == n:
        everyone = torch.arange(n, device=X.device)
        return Groups(everyone, everyone)
    features = _features(X, rotary)
    grid = grid.to(X.device)
    match group:
        case "farthest":
            return _ordered(*farthest(features, grid, k))
        case "random" | "evs" | "vidcom2":
            if group == "random":
                kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].to(X.device)
            else:
                kept = evs(X.float(), grid, k) if group == "evs" else vidcom2(X.float(), grid[:, 0], k)
            kept = kept.sort().values
            return Groups(nearest(features, kept), kept)
        case "kmeans":
            member = kmeans(features, k, seed)
        case "grid":
            member = cells(grid, k)
        case "tome":
            member = tome(features, k)
        case _:
            if group == "subspace" and labels is None:
                raise ValueError('group="subspace" needs labels')
            member = ward(features, grid, k, labels if group == "subspace" else None)
    off = (positions - group_means(positions.float(), member, k)[member]).square().sum(1)
    return _ordered(member, first_of_least(off, member, k))


def _features(tokens: Tensor, rotary: Tensor | None) -> Tensor:
    """(n, at most RANK) float32."""
    z = tokens.float() - tokens.float().mean(0)
    if rotary is not None:
        scale = z.square().sum(1).mean().sqrt()
        z = torch.cat([z, scale * F.normalize(rotary.to(z), dim=1)], 1)
    return token_features(z, RANK).T.float().contiguous()


def _ordered(member: Tensor, kept: Tensor) -> Groups:
    """Numbers groups by their representatives `kept` (k,)."""
    kept, order = kept.sort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return Groups(rank[member], kept)
