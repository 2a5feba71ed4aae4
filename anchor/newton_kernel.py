"""A step of Mehrotra's predictor-corrector on a GPU, one program a token: `Iterates.advance` in a single launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .atoms import Atoms

BLOCK = 32  # candidates in a tile
MATRIX_BYTES = 1 << 16  # of a normal matrix at most: the shared memory of the smallest target


@triton.jit
def _atoms(rows, candidates, o_candidates, n_candidates, o_axes, rank, n_unknowns):
    """[BLOCK, RANK] the rows of some candidates, without the column of mu; 0 outside."""
    atom = tl.load(candidates + o_candidates, mask=o_candidates < n_candidates, other=0)
    mask = (o_candidates < n_candidates)[:, None] & (o_axes < rank)[None, :]
    return tl.load(rows + atom[:, None] * n_unknowns + o_axes[None, :], mask=mask, other=0.0)


@triton.jit
def _solve(inverse, pivots, mean, total, right, right_mu, AFFINE: tl.constexpr):
    """The step of nu and of mu, mu eliminated first; of what is then the matrix of nu, L diag(pivots) L', `inverse` is
    that of L without its diagonal of ones. As accurate as by substitution, which the inverse of the matrix is not."""
    if AFFINE:
        right -= mean * right_mu
    nu = (right + tl.sum(inverse * right[None, :], 1)) / pivots
    nu += tl.sum(inverse * nu[:, None], 0)
    if AFFINE:
        return nu, right_mu / total - tl.sum(mean * nu)
    return nu, right_mu * 0


@triton.jit
def _used(above, below, dg):
    """What a whole step, primal and dual, uses up of what there is to the boundary, the most of all."""
    a, b = dg / above, dg / below
    return tl.maximum(tl.maximum(a, 1 - a), tl.maximum(-b, 1 + b))


@triton.jit
def _centred(u, v, above, below, dg, mu):
    """Where the multipliers go, of second order."""
    return (mu - u * dg * (1 - dg / above)) / above, (mu + v * dg * (1 + dg / below)) / below


@triton.jit
def newton_kernel(
    open_,
    rows,
    candidates,
    target,
    quadratic,
    limit,
    x,
    u,
    v,
    g,
    slopes,
    coefficients,
    weights,
    objectives,
    scalars,
    n_candidates,
    rank,
    AFFINE: tl.constexpr,
    TOGETHER: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one token of `newton_step`, whose arguments these are, of n_candidates K and rank r <= RANK. Of one
    that is not open (tokens,) nothing is written.

    u, v, g: (tokens, K + r); slopes: (tokens, 2, K + r) room for those of predictor and corrector; objectives: (tokens,
    2), primal and dual; scalars: (5,) float64 bound, step, distance of slopes from 1, relative ridge, least centring.
    """
    i_token = tl.program_id(0).to(tl.int64)
    if tl.load(open_ + i_token) == 0:
        return
    dtype: tl.constexpr = rows.dtype.element_ty
    n_unknowns = rank + (1 if AFFINE else 0)
    width = n_candidates + rank
    bound, part = tl.load(scalars), tl.load(scalars + 1)
    nearest, ridge, least_centring = tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4)
    candidates += i_token * n_candidates
    coefficients += i_token * n_candidates
    weights += i_token * n_candidates
    u += i_token * width
    v += i_token * width
    g += i_token * width
    p_first, p_second = slopes + i_token * 2 * width, slopes + i_token * 2 * width + width
    p_x, p_target = x + i_token * n_unknowns, target + i_token * n_unknowns
    o_axes, o_tile = tl.arange(0, RANK), tl.arange(0, BLOCK)
    m_axes = o_axes < rank
    # [RANK]: unknowns nu and the error term's constraints, one for each
    b_x = tl.load(p_x + o_axes, mask=m_axes, other=0.0)
    b_target = tl.load(p_target + o_axes, mask=m_axes, other=0.0)
    b_quadratic = tl.load(quadratic + o_axes, mask=m_axes, other=1.0)
    b_limit = tl.load(limit + o_axes, mask=m_axes, other=1.0)
    b_ue = tl.load(u + n_candidates + o_axes, mask=m_axes, other=0.0)
    b_ve = tl.load(v + n_candidates + o_axes, mask=m_axes, other=0.0)
    b_ge = tl.load(g + n_candidates + o_axes, mask=m_axes, other=0.0)
    mu_x, mu_target = bound * 0, bound * 0
    if AFFINE:
        mu_x, mu_target = tl.load(p_x + rank), tl.load(p_target + rank)
    # normal matrix of nu: around the weighted mean of the atoms where mu, whose column is 1, is eliminated
    b_mean = tl.zeros([RANK], dtype=tl.float64)
    total = tl.sum(tl.zeros([RANK], dtype=tl.float64))
    if AFFINE:
        for start in range(0, n_candidates, BLOCK):
            o = start + o_tile
            m = o < n_candidates
            b_atoms = _atoms(rows, candidates, o, n_candidates, o_axes, rank, n_unknowns)
            b_u, b_v = tl.load(u + o, mask=m, other=0.0), tl.load(v + o, mask=m, other=0.0)
            b_g = tl.load(g + o, mask=m, other=0.0)
            b_weight = b_u / (1 - b_g) + b_v / (1 + b_g)
            b_mean += tl.sum(b_atoms * b_weight[:, None], 0)
            total += tl.sum(b_weight)
        b_mean /= total
    b_normal = tl.zeros([RANK, RANK], dtype=dtype)
    for start in range(0, n_candidates, BLOCK):
        o = start + o_tile
        m = o < n_candidates
        b_atoms = _atoms(rows, candidates, o, n_candidates, o_axes, rank, n_unknowns)
        b_u, b_v = tl.load(u + o, mask=m, other=0.0), tl.load(v + o, mask=m, other=0.0)
        b_g = tl.load(g + o, mask=m, other=0.0)
        b_weight = b_u / (1 - b_g) + b_v / (1 + b_g)
        b_atoms = (b_atoms - b_mean[None, :]).to(dtype)
        b_weighted = b_atoms * b_weight.to(dtype)[:, None]
        b_normal = tl.dot(tl.trans(b_atoms), b_weighted, b_normal, input_precision="ieee", out_dtype=dtype)
    b_mean = b_mean.to(dtype)
    above_e, below_e = 1 - b_ge, 1 + b_ge
    b_diagonal = tl.where(m_axes, b_quadratic + (b_ue / above_e + b_ve / below_e) / (b_limit * b_limit), 1.0)
    is_diagonal = o_axes[:, None] == o_axes[None, :]
    b_normal = tl.where(is_diagonal, ((b_normal + b_diagonal[:, None]) * (1 + ridge)).to(dtype), b_normal)
    b_diagonal = tl.sum(tl.where(is_diagonal, b_normal, 0.0), 1)
    # Gaussian elimination in place: of rows that are eliminated the upper triangle is left, and the inverse of L grows
    # below; a pivot lost to rounding is held up
    b_pivots = b_diagonal
    for k in range(0, RANK):
        b_row = tl.sum(tl.where(o_axes[:, None] == k, b_normal, 0.0), 0)
        pivot = tl.sum(tl.where(o_axes == k, b_row, 0.0))
        least = tl.sum(tl.where(o_axes == k, b_diagonal, 0.0)) * ridge.to(dtype)
        pivot = tl.where(pivot > least, pivot, 1000 * least)
        b_pivots = tl.where(o_axes == k, pivot, b_pivots)
        b_factor = tl.where(o_axes > k, b_row / pivot, 0.0)
        b_normal -= b_factor[:, None] * b_row[None, :]
        b_normal = tl.where((o_axes[:, None] > k) & (o_axes[None, :] == k), -b_factor[:, None], b_normal)
    b_inverse = tl.where(o_axes[:, None] > o_axes[None, :], b_normal, 0.0)
    # predictor
    b_slope = tl.where(m_axes, b_target - b_quadratic * b_x, 0.0)
    b_dx, dmu = _solve(b_inverse, b_pivots, b_mean, total.to(dtype), b_slope.to(dtype), mu_target.to(dtype), AFFINE)
    b_dge = b_dx.to(tl.float64) / b_limit
    used = tl.max(tl.where(m_axes, _used(above_e, below_e, b_dge), 0.0))
    now = tl.sum(b_ue * above_e + b_ve * below_e)
    for start in range(0, n_candidates, BLOCK):
        o = start + o_tile
        m = o < n_candidates
        b_atoms = _atoms(rows, candidates, o, n_candidates, o_axes, rank, n_unknowns)
        b_u, b_v = tl.load(u + o, mask=m, other=0.0), tl.load(v + o, mask=m, other=0.0)
        b_g = tl.load(g + o, mask=m, other=0.0)
        b_dg = (tl.sum(b_atoms * b_dx[None, :], 1) + dmu).to(tl.float64)
        tl.store(p_first + o, b_dg, mask=m)
        used = tl.maximum(used, tl.max(tl.where(m, _used(1 - b_g, 1 + b_g, b_dg), 0.0)))
        now += tl.sum(b_u * (1 - b_g) + b_v * (1 + b_g))
    tl.debug_barrier()
    rest = 1 - 1 / tl.maximum(used, 1.0)
    mu = tl.maximum(rest * rest * rest, least_centring) * now / (2 * width)
    # corrector
    b_to_ue, b_to_ve = _centred(b_ue, b_ve, above_e, below_e, b_dge, mu)
    b_right = b_slope - tl.where(m_axes, (b_to_ue - b_to_ve) / b_limit, 0.0)
    b_combined = tl.zeros([RANK], dtype=dtype)
    combined_mu = tl.sum(tl.zeros([RANK], dtype=dtype))
    for start in range(0, n_candidates, BLOCK):
        o = start + o_tile
        m = o < n_candidates
        b_atoms = _atoms(rows, candidates, o, n_candidates, o_axes, rank, n_unknowns)
        b_u, b_v = tl.load(u + o, mask=m, other=0.0), tl.load(v + o, mask=m, other=0.0)
        b_g, b_dg = tl.load(g + o, mask=m, other=0.0), tl.load(p_first + o, mask=m, other=0.0)
        b_to_u, b_to_v = _centred(b_u, b_v, 1 - b_g, 1 + b_g, b_dg, mu)
        b_to = tl.where(m, b_to_u - b_to_v, 0.0).to(dtype)
        b_combined += tl.sum(b_atoms * b_to[:, None], 0)
        combined_mu += tl.sum(b_to)
    b_right = (b_right - b_combined).to(dtype)
    b_dx, dmu = _solve(
        b_inverse, b_pivots, b_mean, total.to(dtype), b_right, (mu_target - combined_mu).to(dtype), AFFINE
    )
    b_dge = b_dx.to(tl.float64) / b_limit
    b_due = b_to_ue - b_ue + b_ue * b_dge / above_e
    b_dve = b_to_ve - b_ve - b_ve * b_dge / below_e
    primal = tl.max(tl.where(m_axes, tl.maximum(-b_due / b_ue, -b_dve / b_ve), 0.0))
    dual = tl.max(tl.where(m_axes, tl.maximum(b_dge / above_e, -b_dge / below_e), 0.0))
    for start in range(0, n_candidates, BLOCK):
        o = start + o_tile
        m = o < n_candidates
        b_atoms = _atoms(rows, candidates, o, n_candidates, o_axes, rank, n_unknowns)
        b_u, b_v = tl.load(u + o, mask=m, other=1.0), tl.load(v + o, mask=m, other=1.0)
        b_g, b_dg = tl.load(g + o, mask=m, other=0.0), tl.load(p_first + o, mask=m, other=0.0)
        b_to_u, b_to_v = _centred(b_u, b_v, 1 - b_g, 1 + b_g, b_dg, mu)
        b_dg = (tl.sum(b_atoms * b_dx[None, :], 1) + dmu).to(tl.float64)
        tl.store(p_second + o, b_dg, mask=m)
        b_a, b_b = b_dg / (1 - b_g), b_dg / (1 + b_g)
        b_du, b_dv = b_to_u - b_u + b_u * b_a, b_to_v - b_v - b_v * b_b
        primal = tl.maximum(primal, tl.max(tl.where(m, tl.maximum(-b_du / b_u, -b_dv / b_v), 0.0)))
        dual = tl.maximum(dual, tl.max(tl.where(m, tl.maximum(b_a, -b_b), 0.0)))
    tl.debug_barrier()
    primal, dual = part / tl.maximum(primal, part), part / tl.maximum(dual, part)
    if TOGETHER:
        primal = tl.minimum(primal, dual)
        dual = primal
    # the step
    b_x += dual * b_dx
    mu_x += dual * dmu
    tl.store(p_x + o_axes, b_x, mask=m_axes)
    if AFFINE:
        tl.store(p_x + rank, mu_x)
    tl.store(u + n_candidates + o_axes, tl.maximum(b_ue + primal * b_due, 1e-300), mask=m_axes)
    tl.store(v + n_candidates + o_axes, tl.maximum(b_ve + primal * b_dve, 1e-300), mask=m_axes)
    b_ge = tl.minimum(tl.maximum(b_ge + dual * b_dge, nearest - 1), 1 - nearest)
    tl.store(g + n_candidates + o_axes, b_ge, mask=m_axes)
    total = tl.sum(tl.zeros([RANK], dtype=tl.float64))
    for start in range(0, n_candidates, BLOCK):
        o = start + o_tile
        m = o < n_candidates
        b_u, b_v = tl.load(u + o, mask=m, other=1.0), tl.load(v + o, mask=m, other=1.0)
        b_g, b_dg = tl.load(g + o, mask=m, other=0.0), tl.load(p_first + o, mask=m, other=0.0)
        b_to_u, b_to_v = _centred(b_u, b_v, 1 - b_g, 1 + b_g, b_dg, mu)
        b_dg = tl.load(p_second + o, mask=m, other=0.0)
        tl.debug_barrier()  # every warp loads all of a tile, and one stores it
        b_u += primal * (b_to_u - b_u + b_u * b_dg / (1 - b_g))
        b_v += primal * (b_to_v - b_v - b_v * b_dg / (1 + b_g))
        b_u, b_v = tl.maximum(b_u, 1e-300), tl.maximum(b_v, 1e-300)
        b_g = tl.minimum(tl.maximum(b_g + dual * b_dg, nearest - 1), 1 - nearest)
        tl.store(u + o, b_u, mask=m)
        tl.store(v + o, b_v, mask=m)
        tl.store(g + o, b_g, mask=m)
        tl.store(weights + o, tl.maximum(b_u / (1 - b_g), b_v / (1 + b_g)), mask=m)
        tl.store(coefficients + o, b_u - b_v, mask=m)
        total += tl.sum(tl.where(m, b_u - b_v, 0.0))
    tl.debug_barrier()
    # coefficients of sum 1, and their objective
    b_expressed = tl.zeros([RANK], dtype=dtype)
    value = tl.sum(tl.zeros([RANK], dtype=tl.float64))
    for start in range(0, n_candidates, BLOCK):
        o = start + o_tile
        m = o < n_candidates
        b_atoms = _atoms(rows, candidates, o, n_candidates, o_axes, rank, n_unknowns)
        b_c = tl.load(coefficients + o, mask=m, other=0.0)
        if AFFINE:
            tl.debug_barrier()
            b_c = b_c / total
            tl.store(coefficients + o, b_c, mask=m)
        b_expressed += tl.sum(b_atoms * b_c.to(dtype)[:, None], 0)
        value += tl.sum(tl.abs(b_c))
    b_rest = tl.where(m_axes, (b_target - b_expressed) / tl.sqrt(b_quadratic), 0.0)
    b_fit = tl.minimum(tl.maximum(b_rest, -bound), bound)
    value += tl.sum(bound * tl.abs(b_rest - b_fit) + b_fit * b_fit / 2)
    tl.store(objectives + i_token * 2, value)
    b_dual = tl.where(m_axes, b_target * b_x - b_quadratic * b_x * b_x / 2, 0.0)
    tl.store(objectives + i_token * 2 + 1, tl.sum(b_dual) + mu_target * mu_x)


def fits(atoms: Atoms) -> bool:
    """Whether a program holds the normal matrix: up to rank 128 in float32, 64 in float64; torch's operators serve
    above."""
    return _rank_tile(atoms) ** 2 * atoms.rows.element_size() <= MATRIX_BYTES


def _rank_tile(atoms: Atoms) -> int:
    return max(16, triton.next_power_of_2(len(atoms.limit)))


def newton_step(
    atoms: Atoms,
    open_: Tensor,
    candidates: Tensor,
    target: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    *,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Iterates.advance` in one launch: x, u, v and g change in place.

    Args:
        atoms: all of them, contiguous.
        open_: (b,) uint8, 0 for tokens that are left as they are; nothing is returned of these.
        candidates: (b, K) int64.
        target, x: (b, p) float64.
        u, v, g: (b, K + r) float64.
        scalars: (5,) float64 on the device: bound of the error term, part of the way to the boundary, distance that
            slopes keep from 1, relative ridge of the normal matrix, least part of the complementarity to aim at.
        together: primal and dual step of one length.

    Returns:
        (b, K) coefficients, (b, K) the candidates' weight in the normal matrix, the larger of both sides, and (b, 2)
        primal and dual value; float64.
    """
    n_tokens, n_candidates = candidates.shape
    rank = len(atoms.limit)
    coefficients, weights = (torch.empty_like(candidates, dtype=torch.float64) for _ in range(2))
    objectives = x.new_empty(n_tokens, 2)
    with torch.cuda.device_of(x):  # Triton launches on the current card
        newton_kernel[(n_tokens,)](
            open_,
            atoms.rows,
            candidates,
            target,
            atoms.quadratic,
            atoms.limit,
            x,
            u,
            v,
            g,
            torch.empty(n_tokens, 2, n_candidates + rank, dtype=torch.float64, device=x.device),
            coefficients,
            weights,
            objectives,
            scalars,
            n_candidates,
            rank,
            AFFINE=atoms.affine,  # pyright: ignore[reportArgumentType]
            TOGETHER=together,  # pyright: ignore[reportArgumentType]
            RANK=_rank_tile(atoms),  # pyright: ignore[reportArgumentType]
            BLOCK=BLOCK,  # pyright: ignore[reportArgumentType]
            num_warps=4 if rank <= 16 else 8 if rank <= 64 else 16,  # pyright: ignore[reportCallIssue]
        )
    return coefficients, weights, objectives
