"""The rules by which tokens are grouped, see `group_tokens`."""

import warnings
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

_ELEMENTS = 1 << 24  # of distances, at a time
_BLOCK = 4096  # tokens among which the farthest is looked for, where there are many
_STEPS = [step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]
"""To 13 of the 26 neighbours in time, rows and columns; the others have it as theirs."""


def group_means(x: Tensor, member: Tensor, k: int) -> Tensor:
    """(k, D) means of x (n, D) over groups `member` (n,), none of which is empty; each is summed in float32, in the
    order of its members, on every device."""
    sizes = torch.bincount(member, minlength=k)
    starts = sizes.cumsum(0) - sizes
    return F.embedding_bag(member.argsort(stable=True), x.float(), starts, mode="mean").to(x.dtype)


def first_of_least(cost: Tensor, member: Tensor, k: int) -> Tensor:
    """(k,) the first member of least cost of each group."""
    n = len(cost)
    least = cost.new_full((k,), torch.inf).scatter_reduce(0, member, cost, "amin")
    index = torch.arange(n, device=cost.device)
    return index.new_full((k,), n).scatter_reduce(0, member, torch.where(cost == least[member], index, n), "amin")


def nearest(features: Tensor, kept: Tensor) -> Tensor:
    """(n,) the nearest of the kept tokens to each, themselves to themselves."""
    parts = features.split(max(1, _ELEMENTS // len(kept)))
    member = torch.cat([torch.cdist(part, features[kept]).argmin(1) for part in parts])
    member[kept] = torch.arange(len(kept), device=kept.device)
    return member


def farthest(features: Tensor, grid: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n,) the group of each token and (k,) the representative of each group, see `group_tokens`."""
    n = len(features)
    if n <= _BLOCK or n * k <= _BLOCK**2:
        return _greedy(features, k)[:2]
    chosen, radii = [], []
    block = cells(grid, min(-(-n // _BLOCK), k))
    blocks = [(block == number).nonzero()[:, 0] for number in range(int(block.amax()) + 1)]
    for index in blocks:
        _, kept, radius = _greedy(features[index], min(len(index), 2 * -(-k * len(index) // n)))
        chosen.append(index[kept])
        radii.append(radius)
    # in a block each is as far as the one before it, or less: of a block the first ones stand
    kept = torch.cat(chosen)[torch.cat(radii).argsort(descending=True, stable=True)[:k]].sort().values
    member = torch.empty_like(block)
    for number, index in enumerate(blocks):
        mine = (block[kept] == number).nonzero()[:, 0]
        member[index] = mine[nearest(features[index], torch.searchsorted(index, kept[mine]))]
    return member, kept


def _greedy(features: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The group of each token, the representatives in the order of their choice, and the squared distance of each from
    those before, infinite for the first: the farthest from 0. Nothing is read by the host."""
    far = features.square().sum(1)
    member = torch.zeros(len(far), dtype=torch.int64, device=far.device)
    kept = torch.zeros(k, dtype=torch.int64, device=far.device)
    radius = far.new_full((k,), torch.inf)
    for i in range(k):
        new = far.argmax().reshape(1)
        if i:
            radius[i : i + 1] = far[new]
        distance = (features - features.index_select(0, new)).square_().sum(1)
        closer = distance < far if i else torch.ones_like(distance, dtype=torch.bool)
        member.masked_fill_(closer, i).index_fill_(0, new, i)
        # below all distances: a representative is not chosen again, nor does it leave its group
        far = torch.where(closer, distance, far).index_fill_(0, new, -1.0)
        kept[i : i + 1] = new
    return member, kept, radius


def kmeans(features: Tensor, k: int, seed: int) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1."""
    points = F.pad(features, (0, 1)).cpu().numpy()  # scikit-learn wants a column, which equal tokens have not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different tokens than groups
        found = KMeans(k, n_init=1, random_state=seed).fit_predict(points)  # pyright: ignore[reportArgumentType]
    member = torch.from_numpy(found).to(features.device, torch.int64).unique(return_inverse=True)[1]
    n_found = int(member.amax()) + 1
    off = (features - group_means(features, member, n_found)[member]).square().sum(1)
    off[first_of_least(off, member, n_found)] = -1.0  # these stay, so that no group is left empty
    alone = off.argsort(descending=True, stable=True)[: k - n_found]
    member[alone] = torch.arange(n_found, k, device=member.device)
    return member


def cells(grid: Tensor, k: int) -> Tensor:
    """(n,) a number for the block of each token, 0 to k - 1. All blocks of more than one group are halved at once, at
    the middle of their longest side, the first of equal ones."""
    n, device = len(grid), grid.device
    member, wanted = torch.zeros(n, dtype=torch.int64, device=device), torch.tensor([k], device=device)
    for_ties = torch.tensor([2, 1, 0], device=device)
    while bool((wanted > 1).any()):
        size = torch.bincount(member, minlength=len(wanted))
        at = member[:, None].expand(-1, 3)
        low, high = (
            grid.new_zeros(len(wanted), 3).scatter_reduce(0, at, grid, how, include_self=False)
            for how in ("amin", "amax")
        )
        axis = (3 * (high - low) + for_ties).argmax(1)[:, None]
        along = grid.gather(1, axis[member])[:, 0]
        middle = ((low + high) // 2).gather(1, axis)[:, 0]
        first = torch.zeros_like(size).index_add_(0, member, (along <= middle[member]).long())
        first = torch.where(first == size, size // 2, first)  # of tokens at one place, by their order
        share = (2 * wanted * first + size) // (2 * size)
        share = torch.maximum(share, wanted - (size - first)).clamp(min=1)
        share = torch.minimum(torch.minimum(share, first), wanted - 1)
        order = along.argsort(stable=True)
        order = order[member[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(n, device=device) - (size.cumsum(0) - size)[member[order]]
        halved = wanted > 1
        second = len(wanted) + halved.cumsum(0) - 1
        member = torch.where(halved[member] & (rank >= first[member]), second[member], member)
        wanted = torch.cat([torch.where(halved, share, 1), (wanted - share)[halved]])
    return member


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


def evs(tokens: Tensor, grid: Tensor, k: int) -> Tensor:
    """(k,) tokens that represent, see `group_tokens`.

    Raises:
        ValueError: k does not hold the first step.
    """
    n_first = int((grid[:, 0] == grid[:, 0].amin()).sum())
    if k < n_first:
        raise ValueError(
            f'group="evs" keeps the first frame whole, {n_first} of {len(tokens)} tokens, and {k} are to be left: keep '
            "more, or take another group"
        )
    a, b = _neighbours(grid, [(1, 0, 0)])
    change = tokens.new_full((len(tokens),), torch.inf)
    change[b] = 1 - F.cosine_similarity(tokens[a], tokens[b], dim=1)
    return change.argsort(descending=True, stable=True)[:k]


def vidcom2(tokens: Tensor, step: Tensor, k: int) -> Tensor:
    """(k,) tokens that represent, see `group_tokens`. The paper's constants: half of the features, those of least
    variance; Gaussians of squared widths 1/8 to 2; a temperature of 0.01."""
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


def ward(features: Tensor, grid: Tensor, k: int, labels: Tensor | None = None) -> Tensor:
    """(n,) a number for the group of each token, 0 to k - 1. In a round, of the pairs that are each other's cheapest,
    the cheaper half merge: about log2(n / k) halvings, each linear in tokens and neighbours. Pairs with
    two labels (n,) wait until there are no others."""
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


def tome(features: Tensor, k: int) -> Tensor:
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
