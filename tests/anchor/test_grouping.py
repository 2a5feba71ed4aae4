"""Groups of visual tokens: as many as asked for, the same each time, and what each rule promises."""

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from videoanchor_triton.anchor import grouping_rules
from videoanchor_triton.anchor.grouping import Group, Groups, Merge, group_tokens
from videoanchor_triton.anchor.grouping_rules import cells, group_means

RULES = get_args(Group)


def clip(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of a few patches of colour that stand still, with noise, and their grid."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(*map(torch.arange, (4, 5, 6)))
    patches = torch.randn(4, 24, generator=generator)[2 * (grid[:, 1] // 3) + grid[:, 2] // 3]
    return patches + 0.1 * torch.randn(len(grid), 24, generator=generator), grid


def angles(grid: Tensor) -> Tensor:
    phase = grid.sum(1, keepdim=True) * 10000.0 ** -torch.linspace(0, 1, 8)
    return torch.cat([phase.cos(), phase.sin()], 1)


def spread(x: Tensor, groups: Groups) -> float:
    """The squared distances within groups, over those around the mean of all."""
    return float((x - groups.means(x)[groups.member]).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 17, 60, 119, 120])
@pytest.mark.parametrize("kind", ["clip", "equal", "zero", "line"])
def test_exactly_k_groups(rule: Group, k: int, kind: str) -> None:
    x, grid = clip()
    if rule == "evs" and k < 30 and kind != "line":
        with pytest.raises(ValueError, match=f"keeps the first frame whole, 30 of 120 tokens, and {k} are to be left"):
            group_tokens(x, k, rule, grid=grid)
        return
    if kind == "equal":
        x = x[:1].expand(len(x), -1)
    elif kind == "zero":
        x = torch.zeros_like(x)
    options: Any = {} if kind == "line" else {"grid": grid, "positions": grid, "rotary": angles(grid)}
    options["labels"] = torch.arange(len(x)) // 7
    groups = group_tokens(x, k, rule, **options)
    assert len(groups.kept) == k == len(groups.counts())
    assert int(groups.counts().min()) >= 1
    assert int(groups.counts().sum()) == len(x)
    assert (groups.kept.diff() > 0).all()
    assert torch.equal(groups.member[groups.kept], torch.arange(k))
    again = group_tokens(x, k, rule, **options)
    assert all(map(torch.equal, groups, again))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_tokens(rule: Group, n: int) -> None:
    for k in range(1, n + 1):
        assert len(group_tokens(torch.randn(n, 8), k, rule, labels=torch.arange(n)).kept) == k


@pytest.mark.parametrize("rule", ["ward", "farthest"])
def test_patches_are_found(rule: Group) -> None:
    """Four patches that stand still are four groups, whatever the noise; at random they are not."""
    x, grid = clip()
    patch = 2 * (grid[:, 1] // 3) + grid[:, 2] // 3
    groups = group_tokens(x, 4, rule, grid=grid)
    pairs = torch.stack([groups.member, patch]).unique(dim=1)
    assert pairs.shape[1] == 4, "one group, one patch"
    found = group_tokens(x, 4, "random", grid=grid, seed=1)
    assert torch.stack([found.member, patch]).unique(dim=1).shape[1] > 4, "the check can fail"


def test_ward_merges_the_cheapest_neighbours() -> None:
    """In a line: 0 and 0.1 and then 5 and 5.2; 0.05 stands far from 0 and has no neighbour that is like it."""
    x = torch.tensor([[0.0], [0.1], [5.0], [5.2], [0.05]])
    assert group_tokens(x, 4).member.tolist() == [0, 0, 1, 2, 3]
    assert group_tokens(x, 3).member.tolist() == [0, 0, 1, 1, 2]


def test_ward_is_what_it_says() -> None:
    """Rounds, from the members alone: of the pairs of neighbouring groups that are each other's cheapest, the cheaper
    half merge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator).double()
    grid = torch.cartesian_prod(*map(torch.arange, (2, 3, 4)))
    near = (grid[:, None] - grid).abs().amax(-1) == 1
    sets = [[i] for i in range(24)]

    def spread_of(members: list[int]) -> float:
        return float((x[members] - x[members].mean(0)).square().sum())

    def cost(pair: tuple[int, int]) -> float:
        a, b = (sets[i] for i in pair)
        return spread_of(a + b) - spread_of(a) - spread_of(b)

    while len(sets) > 5:
        pairs = [(i, j) for i in range(len(sets)) for j in range(i) if near[sets[i]][:, sets[j]].any()]
        cheapest = [min((pair for pair in pairs if i in pair), key=cost) for i in range(len(sets))]
        mutual = sorted({pair for pair in cheapest if cheapest.count(pair) == 2}, key=cost)
        merged = mutual[: min(len(sets) - 5, len(mutual) // 2 + 1)]
        gone = {i for pair in merged for i in pair}
        sets = [sets[i] + sets[j] for i, j in merged] + [one for i, one in enumerate(sets) if i not in gone]
    member = group_tokens(x, 5, grid=grid).member
    found = [(member == group).nonzero()[:, 0].tolist() for group in range(5)]
    assert sorted(map(sorted, sets)) == sorted(found)


def test_ward_spreads_least() -> None:
    x, grid = clip(seed=3)
    rules = [rule for rule in RULES if rule not in ("subspace", "evs")]
    found = {rule: spread(x, group_tokens(x, 20, rule, grid=grid)) for rule in rules}
    assert found["ward"] < found["random"]
    assert found["ward"] < found["tome"]


def test_ward_has_no_bridge_between_distant_tokens_until_nothing_else_is_left() -> None:
    """Two islands in the grid, with equal tokens: each is one group, and they merge last."""
    x = torch.randn(1, 8).expand(8, -1)
    grid = torch.tensor([[0, 0, column] for column in (0, 1, 2, 3, 10, 11, 12, 13)])
    assert group_tokens(x, 2, grid=grid).member.tolist() == [0] * 4 + [1] * 4
    assert len(group_tokens(x, 1, grid=grid).kept) == 1


def test_farthest_covers_the_outliers() -> None:
    """Each of three single tokens far away is a representative, which ward gives up for the wall."""
    x = torch.cat([0.5 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), 20 * torch.eye(4)[:3]])
    kept = group_tokens(x, 5, "farthest").kept
    assert {60, 61, 62} <= set(kept.tolist())


def test_farthest_is_the_greedy_k_centre() -> None:
    x, grid = clip(seed=2)
    groups = group_tokens(x, 9, "farthest", grid=grid)
    z = (x - x.mean(0)).double()
    chosen = [int(z.square().sum(1).argmax())]
    while len(chosen) < 9:
        chosen.append(int(torch.cdist(z, z[chosen]).amin(1).argmax()))
    assert sorted(chosen) == groups.kept.tolist()
    assert torch.equal(torch.cdist(z, z[groups.kept]).argmin(1), groups.member)


def test_subspaces_stay_apart_as_long_as_there_are_enough_groups() -> None:
    x, grid = clip(seed=5)
    labels = grid[:, 2] // 2  # three columns of two, each connected
    for k in (3, 10, 50):
        member = group_tokens(x, k, "subspace", grid=grid, labels=labels).member
        assert torch.stack([member, labels]).unique(dim=1).shape[1] == k, "one group, one label"
    assert torch.equal(
        group_tokens(x, 10, "subspace", grid=grid, labels=torch.zeros(120)).member,
        group_tokens(x, 10, "ward", grid=grid).member,
    )
    with pytest.raises(ValueError, match="needs labels"):
        group_tokens(x, 10, "subspace", grid=grid)


def test_evs_keeps_what_changes() -> None:
    """The first step, and then the tokens least like the one at their place before."""
    x, grid = clip(seed=6)
    frames = x.reshape(4, 5, 6, -1)
    change = [1 - float(F.cosine_similarity(frames[t, y, c], frames[t - 1, y, c], dim=0)) if t else 9.0
              for t, y, c in grid.tolist()]  # fmt: skip
    for k in (30, 40, 77):
        expected = sorted(range(120), key=lambda i: -change[i])[:k]
        assert group_tokens(x, k, "evs", grid=grid).kept.tolist() == sorted(expected)


def test_vidcom2_keeps_what_is_unlike_the_rest() -> None:
    """From the paper: the score of each token, and how many of each step."""
    generator = torch.Generator().manual_seed(7)
    grid = torch.cartesian_prod(*map(torch.arange, (3, 4, 5)))
    x = torch.randn(60, 12, generator=generator) + 3
    x[40:] += torch.randn(12, generator=generator)  # the last step is another scene
    chosen = x.var(0, correction=0).argsort()[:6]
    z = torch.stack([row[chosen] / row[chosen].norm() for row in x]).double()

    def like(i: int, centre: Tensor) -> float:
        distance = float((z[i] - centre).square().sum())
        return sum(math.exp(-distance / (2 * 2.0**a)) for a in range(-3, 2))

    video = [like(i, z.mean(0)) for i in range(60)]
    score = [video[i] + like(i, z[i // 20 * 20 : i // 20 * 20 + 20].mean(0)) for i in range(60)]
    unlike = torch.tensor([-sum(video[20 * t : 20 * t + 20]) / 20 for t in range(3)]).double()
    share = 1 + torch.softmax(unlike / 0.01, 0) - 1 / 3
    for k in (9, 24, 45):
        kept = group_tokens(x, k, "vidcom2", grid=grid).kept.tolist()
        counts = [sum(i // 20 == t for i in kept) for t in range(3)]
        for t in range(3):
            assert abs(counts[t] - min(float(share[t] / share.sum()) * k, 20)) < (1.5 if k < 45 else 4)
            mine = sorted(range(20 * t, 20 * t + 20), key=lambda i: score[i])
            assert {i for i in kept if i // 20 == t} == set(mine[: counts[t]])
        assert counts[2] > counts[0]
    assert len({i // 20 for i in group_tokens(x, 3, "vidcom2", grid=grid).kept.tolist()}) == 3


def test_rotary_angles_keep_places_apart() -> None:
    """Two contents by turns, along a line: with angles, a group is one content within a stretch of it."""
    place = torch.arange(64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, generator=generator)[place % 2] + 1e-2 * torch.randn(64, 8, generator=generator)
    phase = place[:, None] * 0.05

    def stretches(rotary: Tensor | None) -> bool:
        member = group_tokens(x, 8, "farthest", rotary=rotary).member
        first, second = member[0::2], member[1::2]
        runs = sum(len(one.unique_consecutive()) for one in (first, second))
        return runs == 8 and not set(first.tolist()) & set(second.tolist())

    assert stretches(torch.cat([phase.cos(), phase.sin()], 1))
    assert not stretches(None), "the check can fail"


def test_representative_is_nearest_to_the_mean_place() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [9.0]])
    positions = torch.tensor([[0], [1], [5], [9]])
    assert group_tokens(x, 2, positions=positions).kept.tolist() == [1, 3]


def test_farthest_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels, from the definition: each block chooses more than its share alone; those stand that were farthest,
    and a token goes to the nearest one of its block."""
    x, grid = clip(seed=4)
    k, z = 14, (x - x.mean(0)).double()
    monkeypatch.setattr(grouping_rules, "_BLOCK", 30)
    groups = group_tokens(x, k, "farthest", grid=grid)
    found = []
    for number in range(4):
        mine = (cells(grid, 4) == number).nonzero()[:, 0]
        chosen, radius = [int(mine[z[mine].square().sum(1).argmax()])], [torch.inf]
        while len(chosen) < 2 * 4:
            away = torch.cdist(z[mine], z[chosen]).amin(1)
            chosen.append(int(mine[away.argmax()]))
            radius.append(float(away.amax()))
        found += zip(radius, chosen, [number] * len(chosen), strict=True)
    found = sorted(found, reverse=True)[:k]
    assert sorted(index for _, index, _ in found) == groups.kept.tolist()
    for number in range(4):
        mine = (cells(grid, 4) == number).nonzero()[:, 0]
        kept = torch.tensor(sorted(index for _, index, block in found if block == number))
        assert torch.equal(kept[torch.cdist(z[mine], z[kept]).argmin(1)], groups.kept[groups.member[mine]])


def test_farthest_is_plain_where_that_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grid = clip(seed=5)
    plain, nine = (group_tokens(x, k, "farthest", grid=grid) for k in (7, 9))
    monkeypatch.setattr(grouping_rules, "_BLOCK", 30)
    assert all(map(torch.equal, plain, group_tokens(x, 7, "farthest", grid=grid)))  # 120 x 7 <= 30^2
    assert not torch.equal(nine.kept, group_tokens(x, 9, "farthest", grid=grid).kept), "the check can fail"


@pytest.mark.parametrize("k", [8, 64])
def test_a_grid_that_divides_is_regular(k: int) -> None:
    grid = torch.cartesian_prod(*map(torch.arange, (4, 8, 8)))
    groups = group_tokens(torch.randn(256, 8), k, "grid", grid=grid)
    assert groups.counts().eq(256 // k).all()
    for block in range(k):
        mine = grid[groups.member == block]
        sides = mine.amax(0) - mine.amin(0) + 1
        assert int(sides.prod()) == len(mine), "a box, and full"
        assert int(sides.amax()) <= 2 * int(sides.amin())


@pytest.mark.parametrize("k", [1, 5, 13, 50, 119])
def test_a_grid_that_does_not_divide_is_even(k: int) -> None:
    """Boxes all the same, none of them much larger than another; the tokens do not matter."""
    x, grid = clip()
    groups = group_tokens(x, k, "grid", grid=grid)
    assert int(groups.counts().amax()) <= 2 * -(-len(x) // k)
    assert torch.equal(groups.member, group_tokens(-x.flip(0), k, "grid", grid=grid).member)
    for block in range(k):
        mine = grid[groups.member == block]
        assert int((mine.amax(0) - mine.amin(0) + 1).prod()) == len(mine)


def test_kmeans_spreads_least_and_fills_up() -> None:
    x, grid = clip(seed=3)
    found = {rule: spread(x, group_tokens(x, 20, rule, grid=grid)) for rule in ("kmeans", "random", "grid")}
    assert found["kmeans"] < min(found["random"], found["grid"])
    one, two = (group_tokens(x, 20, "kmeans", seed=seed) for seed in (0, 1))
    assert not torch.equal(one.member, two.member)
    few = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0]])  # two different tokens, four groups
    assert sorted(group_tokens(few, 4, "kmeans").counts().tolist()) == [1, 1, 1, 2]


def test_reduced() -> None:
    x = torch.tensor([[0.0], [2.0], [7.0]])
    groups = Groups(torch.tensor([0, 0, 1]), torch.tensor([1, 2]))
    assert [groups.reduced(x, how)[:, 0].tolist() for how in get_args(Merge)] == [[1.0, 7.0], [1.0, 7.0], [2.0, 7.0]]


def test_random_depends_on_the_seed_alone() -> None:
    x, grid = clip()
    one, two = (group_tokens(x, 30, "random", grid=grid, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.kept, two.kept)
    assert torch.equal(group_tokens(-x, 30, "random", grid=grid, seed=0).kept, one.kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_means(dtype: torch.dtype) -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    member = torch.arange(50) % 6
    expected = torch.stack([x[member == group].double().mean(0) for group in range(6)])
    found = group_means(x, member, 6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=2 * torch.finfo(dtype).eps + 1e-6)


def test_bad_input() -> None:
    x, _ = clip()
    for k in (0, 121, -1):
        with pytest.raises(ValueError, match=r"k must be >= 1 and <= 120, got"):
            group_tokens(x, k)
    with pytest.raises(TypeError, match=r"k must be an integer, got 0\.5"):
        group_tokens(x, 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group must be one of 'ward', 'subspace'"):
        group_tokens(x, 3, "k-medoids")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="X must be finite"):
        group_tokens(x.where(x < 1, torch.nan), 3)
