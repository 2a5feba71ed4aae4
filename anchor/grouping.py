"""Groups of visual tokens, each of which one token will stand for: exactly as many as asked for, the same in each run,
on the tokens' device.

A token is seen as [z, w phi(p)]: z its embedding, centred; phi(p) the cosines and sines of the model's rotary angles at
its position, a unit vector; w the root mean square of |z|. Two tokens are then as far apart as their keys are.
"""

from itertools import product
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import as_tokens, token_features
from .validation import check_choice, check_integer

Group = Literal["ward", "farthest", "random", "tome"]
RANK = 64
"""Principal components of what a token is seen as."""
_ELEMENTS = 1 << 24  # of distances, at a time
_STEPS = [step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]
"""To 13 of the 26 neighbours in time, rows and columns; the others have it as theirs."""


class Groups(NamedTuple):
    """Tokens in groups.

    Attributes:
        member: (n,) int64 the group of each token, 0 to k - 1, in the order of the representatives.
        kept: (k,) int64 the representative of each group, one of its members, ascending.
    """

    member: Tensor
    kept: Tensor

    def means(self, x: Tensor) -> Tensor:
        """(k, D) of x (n, D): the mean over each group, summed in float32 and in one order."""
        return group_means(x, self.member, len(self.kept))

    def counts(self) -> Tensor:
        """(k,) int64, the members of each group."""
        return torch.bincount(self.member, minlength=len(self.kept))


def group_means(x: Tensor, member: Tensor, k: int) -> Tensor:
    """(k, D) means of x (n, D) over groups `member` (n,), none of which is empty; each is summed in float32, in the
    order of its members, on every device."""
    sizes = torch.bincount(member, minlength=k)
    return F.embedding_bag(member.argsort(stable=True), x.float(), F.pad(sizes.cumsum(0)[:-1], (1, 0)), mode="mean").to(
        x.dtype
    )


def group_tokens(
    tokens: Tensor,
    k: int,
    group: Group = "ward",
    *,
    grid: Tensor | None = None,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    seed: int = 0,
) -> Groups:
    """Puts tokens into exactly k groups.

    - "ward": groups that are neighbours in space and time merge, the pair first that adds least to the squared
      distances within groups (Ward's cost), in rounds over all pairs that are each other's cheapest. The
      representative is the member nearest to the group's mean position.
    - "farthest": the token farthest from all representatives becomes the next one (greedy k-centre); each token goes to
      the nearest. It costs n times k.
    - "random": representatives at random, by `seed`; each token goes to the nearest. The control.
    - "tome": bipartite soft matching of every other token (Bolya et al., arXiv 2210.09461), by cosine, repeated; the
      representative as for "ward".

    Args:
        tokens: (n, D) floating-point, n >= 1.
        k: from 1 to n.
        group: the rule.
        grid: (n, 3) int64, step in time, row and column, for "ward"; None: one token after the other. Tokens without
            neighbours merge with those before and after them, when nothing else is left.
        positions: (n, A) as the model's rotary embedding counts them; None: the grid.
        rotary: (n, E) cosines and sines of the rotary angles at the positions; None: embeddings alone.
        seed: of "random".

    Raises:
        TypeError, ValueError: k or the tokens are not as described.

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
    if group == "farthest":
        return _ordered(*_farthest(features, k))
    if group == "random":
        kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values.to(X.device)
        return Groups(_nearest(features, kept), kept)
    member = _ward(features, grid.to(X.device), k) if group == "ward" else _tome(features, k)
    off = (positions - group_means(positions.float(), member, k)[member]).square().sum(1)
    return _ordered(member, _first_of_least(off, member, k))


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


def _first_of_least(cost: Tensor, member: Tensor, k: int) -> Tensor:
    """(k,) the first member of least cost of each group."""
    n = len(cost)
    least = cost.new_full((k,), torch.inf).scatter_reduce(0, member, cost, "amin")
    index = torch.arange(n, device=cost.device)
    return index.new_full((k,), n).scatter_reduce(0, member, torch.where(cost == least[member], index, n), "amin")


def _nearest(features: Tensor, kept: Tensor) -> Tensor:
    """(n,) the nearest of the kept tokens to each, themselves to themselves."""
    parts = features.split(max(1, _ELEMENTS // len(kept)))
    member = torch.cat([torch.cdist(part, features[kept]).argmin(1) for part in parts])
    member[kept] = torch.arange(len(kept), device=kept.device)
    return member


def _farthest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first token is the farthest from the mean, which is 0. Nothing is read by the host."""
    far = features.square().sum(1)
    member = torch.zeros(len(far), dtype=torch.int64, device=far.device)
    kept = torch.zeros(k, dtype=torch.int64, device=far.device)
    for i in range(k):
        new = far.argmax().reshape(1)
        distance = (features - features.index_select(0, new)).square_().sum(1)
        closer = distance < far if i else torch.ones_like(distance, dtype=torch.bool)
        member.masked_fill_(closer, i).index_fill_(0, new, i)
        # below all distances: a representative is not chosen again, nor does it leave its group
        far = torch.where(closer, distance, far).index_fill_(0, new, -1.0)
        kept[i : i + 1] = new
    return member, kept


def _neighbours(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of tokens next to each other in time, rows and columns, each once: two of (E,) int64."""
    place = grid - grid.amin(0) + 1
    size = (place.amax(0) + 2).tolist()
    flat = (place[:, 0] * size[1] + place[:, 1]) * size[2] + place[:, 2]
    index = torch.arange(len(grid), device=grid.device)
    nobody = len(grid)
    table = index.new_full((size[0] * size[1] * size[2],), nobody).scatter_reduce(0, flat, index, "amin")
    other = torch.stack([table[flat + (a * size[1] + b) * size[2] + c] for a, b, c in _STEPS])
    return index.expand_as(other)[other < nobody], other[other < nobody]


def _ward(features: Tensor, grid: Tensor, k: int) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1. In a round, of the pairs that are each other's cheapest,
    the cheaper half merge: about log2(n / k) halvings, each linear in tokens and neighbours."""
    n, device = len(features), features.device
    member = torch.arange(n, device=device)
    mean, count, alive = features.clone(), features.new_ones(n), n
    a, b = _neighbours(grid)
    while alive > k:
        if not len(a):  # what is left has no neighbours
            left = member.unique()
            a, b = left[:-1], left[1:]
        cost = count[a] * count[b] / (count[a] + count[b]) * (mean[a] - mean[b]).square_().sum(1)
        least = cost.new_full((n,), torch.inf).scatter_reduce(0, a, cost, "amin").scatter_reduce(0, b, cost, "amin")
        number = torch.arange(len(a), device=device)
        first = number.new_full((n,), len(a))
        for end in (a, b):  # of equal costs the first pair
            first = first.scatter_reduce(0, end, torch.where(cost == least[end], number, len(a)), "amin")
        mutual = ((first[a] == number) & (first[b] == number)).nonzero()[:, 0]
        n_merged = min(alive - k, len(mutual) // 2 + 1)
        chosen = mutual[cost[mutual].argsort(stable=True)[:n_merged]]
        into, gone = a[chosen], b[chosen]
        total = count[into] + count[gone]
        mean[into] += (count[gone] / total)[:, None] * (mean[gone] - mean[into])
        count[into] = total
        now = torch.arange(n, device=device)
        now[gone] = into
        member, alive = now[member], alive - n_merged
        a, b = now[a], now[b]
        pairs = (torch.minimum(a, b) * n + torch.maximum(a, b))[a != b].unique()
        a, b = pairs // n, pairs % n
    return member.unique(return_inverse=True)[1]


def _tome(features: Tensor, k: int) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1: of the tokens at even places, in order, those most like
    one at an odd place join it, weighted by counts, until k are left."""
    member = torch.arange(len(features), device=features.device)
    mean, count = features.clone(), features.new_ones(len(features))
    while (alive := len(mean)) > k:
        unit = F.normalize(mean, dim=1)
        even, odd = unit[0::2], unit[1::2]
        best, to = (torch.cat(part) for part in zip(*((x @ odd.T).max(1) for x in even.split(4096)), strict=True))
        gone = best.argsort(descending=True, stable=True)[: min(alive - k, len(even))]
        stay = torch.ones(alive, dtype=torch.bool, device=member.device)
        stay[2 * gone] = False
        now = stay.cumsum(0) - 1
        now[2 * gone] = now[2 * to[gone] + 1]
        total = torch.zeros_like(count[stay]).index_add_(0, now, count)
        weighted = group_means(mean * count[:, None], now, len(total)) * torch.bincount(now)[:, None]
        member, mean, count = now[member], weighted / total[:, None], total
    return member
