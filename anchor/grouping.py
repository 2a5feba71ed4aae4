"""Groups of visual tokens, each of which one token will stand for: exactly as many as asked for, the same in each run,
on the tokens' device.

A token is seen as [z, w phi(p)]: z its embedding, centred; phi(p) the cosines and sines of the model's rotary angles at
its position, a unit vector; w the root mean square of |z|. Two tokens are then as far apart as their keys are.
"""

import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .problem import as_tokens, token_features
from .validation import check_choice, check_integer

Group = Literal["ward", "farthest", "kmeans", "subspace", "grid", "tome", "evs", "vidcom2", "random"]
Merge = Literal["counts", "mean", "drop"]
RANK = 64
"""Principal components of what a token is seen as."""
_BLOCK = 4096  # tokens among which "farthest" looks for the farthest
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

    def pooled(self, x: Tensor, merge: Merge = "counts") -> Tensor:
        """(k, D) of x (n, D): the mean over each group, summed in float32 and in one order; of merge="drop" what the
        representatives have."""
        return x[self.kept] if merge == "drop" else group_means(x, self.member, len(self.kept))

    def counts(self, merge: Merge = "counts") -> Tensor:
        """(k,) int64, the members that each group stands for."""
        return (
            torch.bincount(self.member, minlength=len(self.kept)) if merge == "counts" else torch.ones_like(self.kept)
        )


def group_means(x: Tensor, member: Tensor, k: int) -> Tensor:
    """(k, D) means of x (n, D) over groups `member` (n,), none of which is empty; each is summed in float32, in the
    order of its members, on every device."""
    sizes = torch.bincount(member, minlength=k)
    starts = sizes.cumsum(0) - sizes
    return F.embedding_bag(member.argsort(stable=True), x.float(), starts, mode="mean").to(x.dtype)


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
    - "kmeans": scikit-learn's, from the representatives of "farthest", on the CPU. It costs n times k.
    - "grid": boxes of time, rows and columns, by halving the longest side.
    - "tome": bipartite soft matching of every other token (Bolya et al., arXiv 2210.09461), by cosine, repeated.

    The representative of a group of these is the member nearest to the group's mean position. Others choose the
    representatives, and each token goes to the nearest:

    - "farthest": the token farthest from all representatives becomes the next one (greedy k-centre). From 4,096 tokens
      on in stretches of about that many, each with its share of k, so that time and memory are linear.
    - "evs": those that differ most, by cosine, from the token at their place in the step before, after those of the
      first step (Efficient Video Sampling, arXiv 2510.14624, which keeps at least the first step).
    - "vidcom2": of each step those least like the means of the step and of the video, more of steps unlike the video
      (Video Compression Commander, arXiv 2505.14454), here to exactly k and at least one a step.
    - "random": at random, by `seed`. The control.

    Args:
        tokens: (n, D) floating-point, n >= 1.
        k: from 1 to n.
        group: the rule.
        grid: (n, 3) int64, step in time, row and column; None: one token after the other. Tokens without neighbours
            merge with those before and after them, when nothing else is left.
        positions: (n, A) as the model's rotary embedding counts them; None: the grid.
        rotary: (n, E) cosines and sines of the rotary angles at the positions; None: embeddings alone.
        labels: (n,) int64, the subspaces of "subspace".
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
    features, grid = _features(X, rotary), grid.to(X.device)
    if group == "farthest":
        return _ordered(*_farthest_in_stretches(features, k))
    if group in ("evs", "vidcom2", "random"):
        if group == "random":
            kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].to(X.device)
        else:
            kept = _evs(X.float(), grid, k) if group == "evs" else _vidcom2(X.float(), grid[:, 0], k)
        kept = kept.sort().values
        return Groups(_nearest(features, kept), kept)
    if group == "subspace" and labels is None:
        raise ValueError('group="subspace" needs labels')
    match group:
        case "kmeans":
            member = _kmeans(features, k)
        case "grid":
            member = _boxes(grid, k)
        case "tome":
            member = _tome(features, k)
        case _:
            member = _ward(features, grid, k, labels if group == "subspace" else None)
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


def _farthest_in_stretches(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of so many groups as there are stretches or more."""
    n = len(features)
    n_parts = min(k, -(-n // _BLOCK))
    shares = [k * i // n_parts for i in range(n_parts + 1)]
    starts = [-(-n * share // k) for share in shares]  # no stretch has fewer tokens than groups
    parts = [_farthest(features[starts[i] : starts[i + 1]], shares[i + 1] - shares[i]) for i in range(n_parts)]
    member = torch.cat([part + share for (part, _), share in zip(parts, shares, strict=False)])
    return member, torch.cat([kept + start for (_, kept), start in zip(parts, starts, strict=False)])


def _kmeans(features: Tensor, k: int) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1; of equal tokens, those of one group are shared out."""
    features = F.pad(features, (0, 1))  # tokens that are all equal have no components
    start = features[_farthest_in_stretches(features, k)[1]]
    options: dict[str, Any] = {"init": start.cpu().numpy(), "n_init": 1, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different tokens than groups
        member = torch.from_numpy(KMeans(k, **options).fit_predict(features.cpu().numpy())).long()
    sizes = torch.bincount(member, minlength=k)
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        largest = int(sizes.argmax())
        member[(member == largest).nonzero()[-1, 0]] = empty
        sizes[largest] -= 1
        sizes[empty] = 1
    return member.to(features.device)


def _boxes(grid: Tensor, k: int) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1: boxes with tokens in proportion to their groups."""
    places = grid.cpu().numpy()
    member = np.zeros(len(places), dtype=np.int64)
    left = [(np.arange(len(places)), 0, k)]
    while left:
        tokens, first, n_groups = left.pop()
        if n_groups == 1:
            member[tokens] = first
            continue
        axis = int(np.ptp(places[tokens], axis=0).argmax())
        tokens = tokens[places[tokens, axis].argsort(kind="stable")]
        half = n_groups // 2
        cut = round(len(tokens) * half / n_groups)
        left += [(tokens[:cut], first, half), (tokens[cut:], first + half, n_groups - half)]
    return torch.from_numpy(member).to(grid.device)


def _evs(tokens: Tensor, grid: Tensor, k: int) -> Tensor:
    """(k,) tokens."""
    a, b = _neighbours(grid, [(1, 0, 0)])
    change = tokens.new_full((len(tokens),), torch.inf)
    change[b] = 1 - F.cosine_similarity(tokens[a], tokens[b], dim=1)
    return change.argsort(descending=True, stable=True)[:k]


def _vidcom2(tokens: Tensor, step: Tensor, k: int) -> Tensor:
    """(k,) tokens. The paper's constants: half of the features, those of least variance; Gaussians of squared widths
    1/8 to 2; a temperature of 0.01."""
    step = step.unique(return_inverse=True)[1]
    n_steps = int(step.amax()) + 1
    least = tokens.var(0, correction=0).topk(max(tokens.shape[1] // 2, 1), largest=False).indices
    x = F.normalize(tokens[:, least], dim=1)

    def likeness(centre: Tensor) -> Tensor:
        distance = (x - centre).square().sum(1)
        return torch.stack([torch.exp(-distance / 2 ** (i + 1)) for i in range(-3, 2)]).sum(0)

    to_video, to_step = likeness(x.mean(0)), likeness(group_means(x, step, n_steps)[step])
    weight = F.softmax(-group_means(to_video[:, None], step, n_steps)[:, 0] / 0.01, dim=0)
    sizes = torch.bincount(step)
    share = (1 + weight - weight.mean()) * sizes
    order = (to_video + to_step).argsort(stable=True)
    order = order[step[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - F.pad(sizes.cumsum(0)[:-1], (1, 0))[step[order]]
    turn = torch.where(rank == 0, -1.0, (rank + 0.5) / share[step])  # a step's tokens come in turn, by its share
    return turn.argsort(stable=True)[:k]


def _neighbours(grid: Tensor, steps: Sequence[tuple[int, ...]] = _STEPS) -> tuple[Tensor, Tensor]:
    """Pairs of tokens next to each other in time, rows and columns, each once: two of (E,) int64."""
    place = grid - grid.amin(0) + 1
    size = (place.amax(0) + 2).tolist()
    flat = (place[:, 0] * size[1] + place[:, 1]) * size[2] + place[:, 2]
    index = torch.arange(len(grid), device=grid.device)
    nobody = len(grid)
    table = index.new_full((size[0] * size[1] * size[2],), nobody).scatter_reduce(0, flat, index, "amin")
    other = torch.stack([table[flat + (a * size[1] + b) * size[2] + c] for a, b, c in steps])
    return index.expand_as(other)[other < nobody], other[other < nobody]


def _ward(features: Tensor, grid: Tensor, k: int, labels: Tensor | None) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1. In a round, of the pairs that are each other's cheapest,
    the cheaper half merge: about log2(n / k) halvings, each linear in tokens and neighbours. Pairs with two labels wait
    until there are no others."""
    n, device = len(features), features.device
    member = torch.arange(n, device=device)
    mean, count, alive = features.clone(), features.new_ones(n), n
    a, b = _neighbours(grid)
    if labels is not None:
        same = labels[a] == labels[b]
        a, b = a[same], b[same]
    while alive > k:
        if not len(a) and labels is not None:
            a, b = (member[one] for one in _neighbours(grid))
            a, b, labels = a[a != b], b[a != b], None
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
