"""Slopes of all atoms and the swap of candidates on a GPU: `_take_in_violators` in a few launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .atoms import Atoms

TOKENS, ATOMS, BLOCK = 32, 128, 16  # of a tile of slopes, and candidates in a tile
TILE_BYTES = 1 << 15  # of its atoms at most: with the tokens, within the shared memory of every target
GROUPS = 512  # at most about so many groups of atoms


@triton.jit
def slopes_kernel(
    rows,
    x,
    taken,
    value,
    atom,
    n_tokens,
    n_atoms,
    rank,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    ATOMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: TOKENS x ATOMS absolute slopes, and of each GROUP of atoms the largest that is not taken.

    rows: (N, p); x: (tokens, p) float64; taken: (tokens, N) uint8; value, atom: (tokens, groups), value -1 where all
    are taken.
    """
    i_tokens, i_atoms = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = rows.dtype.element_ty
    n_unknowns = rank + (1 if AFFINE else 0)
    o_tokens = (i_tokens * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    o_atoms = (i_atoms * ATOMS + tl.arange(0, ATOMS)).to(tl.int64)
    o_axes = tl.arange(0, RANK)
    m_tokens, m_atoms, m_axes = o_tokens < n_tokens, o_atoms < n_atoms, o_axes < rank
    # [TOKENS, RANK]
    p_x = x + o_tokens[:, None] * n_unknowns + o_axes[None, :]
    b_x = tl.load(p_x, mask=m_tokens[:, None] & m_axes[None, :], other=0.0).to(dtype)
    # [RANK, ATOMS]
    p_rows = rows + o_atoms[None, :] * n_unknowns + o_axes[:, None]
    b_rows = tl.load(p_rows, mask=m_atoms[None, :] & m_axes[:, None], other=0.0)
    b_slopes = tl.dot(b_x, b_rows, input_precision=PRECISION, out_dtype=dtype)  # pyright: ignore[reportArgumentType]
    if AFFINE:
        b_slopes += tl.load(x + o_tokens * n_unknowns + rank, mask=m_tokens, other=0.0).to(dtype)[:, None]
    m_pairs = m_tokens[:, None] & m_atoms[None, :]
    b_taken = tl.load(taken + o_tokens[:, None] * n_atoms + o_atoms[None, :], mask=m_pairs, other=1)
    b_slopes = tl.where(b_taken != 0, -1.0, tl.abs(b_slopes))
    b_groups = tl.reshape(b_slopes, [TOKENS, ATOMS // GROUP, GROUP])
    b_value, b_place = tl.max(b_groups, 2, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    o_groups = i_atoms * (ATOMS // GROUP) + tl.arange(0, ATOMS // GROUP)
    n_groups = tl.cdiv(n_atoms, GROUP)
    p_groups = o_tokens[:, None] * n_groups + o_groups[None, :]
    m_groups = m_tokens[:, None] & (o_groups < n_groups)[None, :]
    tl.store(value + p_groups, b_value, mask=m_groups)
    tl.store(atom + p_groups, (o_groups[None, :] * GROUP + b_place).to(tl.int64), mask=m_groups)


@triton.jit
def swap_kernel(
    open_,
    rows,
    candidates,
    x,
    u,
    v,
    g,
    taken,
    value,
    atom,
    groups,
    place,
    objectives,
    scalars,
    n_atoms,
    n_candidates,
    n_swaps,
    n_groups,
    rank,
    AFFINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: of one token x is scaled to be feasible, and violators take the place of candidates.

    value (tokens, n_swaps) descending, of the groups `groups` (tokens, n_swaps), whose atoms are in `atom` (tokens,
    n_groups); place (tokens, n_swaps) of the lightest candidates; objectives (tokens, 2) primal and dual; scalars (5,)
    float64: margin, its least value, part of the gap, least objective and least dual value. Of a token that is not
    open (tokens,) nothing is written.
    """
    i_token = tl.program_id(0).to(tl.int64)
    if tl.load(open_ + i_token) == 0:
        return
    dtype: tl.constexpr = rows.dtype.element_ty
    n_unknowns = rank + (1 if AFFINE else 0)
    width = n_candidates + rank
    candidates += i_token * n_candidates
    u += i_token * width
    v += i_token * width
    g += i_token * width
    x += i_token * n_unknowns
    margin, least, part = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    primal, dual = tl.load(objectives + i_token * 2), tl.load(objectives + i_token * 2 + 1)
    gap = (primal - tl.maximum(dual, tl.load(scalars + 4))) / tl.maximum(primal, tl.load(scalars + 3))
    gap = tl.where(gap == gap, gap, 1.0)
    inside = 1 - tl.minimum(tl.maximum(part * gap, least), margin)
    shrink = inside / tl.maximum(tl.load(value + i_token * n_swaps).to(tl.float64), inside)
    o_axes, o_tile = tl.arange(0, RANK), tl.arange(0, BLOCK)
    m_axes = o_axes < rank
    b_x = tl.load(x + o_axes, mask=m_axes, other=0.0) * shrink
    mu_x = shrink * 0
    if AFFINE:
        mu_x = tl.load(x + rank) * shrink
    tl.debug_barrier()  # what is changed in place: every warp loads it, and one stores it
    tl.store(x + o_axes, b_x, mask=m_axes)
    if AFFINE:
        tl.store(x + rank, mu_x)
    total = tl.sum(tl.zeros([BLOCK], dtype=tl.float64))
    for start in range(0, width, BLOCK):
        o = start + o_tile
        m = o < width
        b_g = tl.load(g + o, mask=m, other=0.0) * shrink
        b_u, b_v = tl.load(u + o, mask=m, other=0.0), tl.load(v + o, mask=m, other=0.0)
        tl.debug_barrier()
        tl.store(g + o, b_g, mask=m)
        total += tl.sum(b_u * (1 - b_g) + b_v * (1 + b_g))
    mu = total / (2 * width)
    tl.debug_barrier()
    for start in range(0, n_swaps, BLOCK):
        o = start + o_tile
        m = o < n_swaps
        b_value = tl.load(value + i_token * n_swaps + o, mask=m, other=-1.0).to(tl.float64)
        b_group = tl.load(groups + i_token * n_swaps + o, mask=m, other=0)
        b_atom = tl.load(atom + i_token * n_groups + b_group, mask=m, other=0)
        b_place = tl.load(place + i_token * n_swaps + o, mask=m, other=0)
        b_old = tl.abs(tl.load(g + b_place, mask=m, other=0.0))
        m = m & (b_value > tl.maximum(b_old, 1 - margin))
        b_rows = tl.load(
            rows + b_atom[:, None] * n_unknowns + o_axes[None, :], mask=m[:, None] & m_axes[None, :], other=0.0
        )
        b_new = (tl.sum(b_rows * b_x.to(dtype)[None, :], 1) + mu_x.to(dtype)).to(tl.float64)
        b_new = tl.minimum(tl.maximum(b_new, -inside), inside)
        b_candidate = tl.load(candidates + b_place, mask=m, other=0)
        tl.debug_barrier()
        tl.store(taken + i_token * n_atoms + b_candidate, 0, mask=m)
        tl.store(taken + i_token * n_atoms + b_atom, 1, mask=m)
        tl.store(candidates + b_place, b_atom, mask=m)
        tl.store(u + b_place, mu / (1 - b_new), mask=m)
        tl.store(v + b_place, mu / (1 + b_new), mask=m)
        tl.store(g + b_place, b_new, mask=m)


def take_in_violators(
    atoms: Atoms,
    open_: Tensor,
    candidates: Tensor,
    taken: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    g: Tensor,
    weights: Tensor,
    objectives: Tensor,
    scalars: Tensor,
    *,
    n_swaps: int,
    tf32: bool,
) -> None:
    """Scale x to be feasible for all atoms, and let those of largest slope take the place of the lightest candidates.

    candidates, x, u, v, g and taken change in place.

    Args:
        atoms: all of them, contiguous.
        open_: (b,) uint8, 0 for tokens that are left as they are.
        candidates: (b, K) int64.
        taken: (b, N) uint8, 1 for the token itself and its candidates.
        x: (b, p) float64.
        u, v, g: (b, K + r) float64.
        weights, objectives: as `newton_step` gives them.
        scalars: (5,) float64 on the device: margin, its least value, part of the gap, least objective, least dual.
        n_swaps: candidates that may change.
        tf32: products of 10 bits, which are enough for a tolerance of 1e-3.
    """
    (n_tokens, n_candidates), n_atoms = candidates.shape, len(atoms.rows)
    rank = len(atoms.limit)
    rank_tile = max(16, triton.next_power_of_2(rank))
    atoms_tile = min(ATOMS, TILE_BYTES // (rank_tile * atoms.rows.element_size()))
    group: int = min(atoms_tile, max(4, triton.next_power_of_2(-(-n_atoms // GROUPS))))
    n_groups = -(-n_atoms // group)
    n_swaps = min(n_swaps, n_groups, n_candidates)
    value = torch.empty(n_tokens, n_groups, dtype=atoms.rows.dtype, device=x.device)
    atom = torch.empty(n_tokens, n_groups, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current card
        slopes_kernel[(triton.cdiv(n_tokens, TOKENS), triton.cdiv(n_atoms, atoms_tile))](
            atoms.rows,
            x,
            taken,
            value,
            atom,
            n_tokens,
            n_atoms,
            rank,
            AFFINE=atoms.affine,  # pyright: ignore[reportArgumentType]
            PRECISION="tf32" if tf32 else "ieee",  # pyright: ignore[reportArgumentType]
            RANK=rank_tile,  # pyright: ignore[reportArgumentType]
            TOKENS=TOKENS,  # pyright: ignore[reportArgumentType]
            ATOMS=atoms_tile,  # pyright: ignore[reportArgumentType]
            GROUP=group,  # pyright: ignore[reportArgumentType]
        )
        value, groups = value.topk(n_swaps)
        place = weights.topk(n_swaps, largest=False).indices
        swap_kernel[(n_tokens,)](
            open_,
            atoms.rows,
            candidates,
            x,
            u,
            v,
            g,
            taken,
            value,
            atom,
            groups,
            place,
            objectives,
            scalars,
            n_atoms,
            n_candidates,
            n_swaps,
            n_groups,
            rank,
            AFFINE=atoms.affine,  # pyright: ignore[reportArgumentType]
            RANK=rank_tile,  # pyright: ignore[reportArgumentType]
            BLOCK=BLOCK,  # pyright: ignore[reportArgumentType]
        )
