"""Which algorithm the solver takes, how much memory it needs, and how many tokens it may iterate at a time."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .options import Algorithm

# Elements of the state that the residual looks at together: its temporaries never exceed a few times this.
CHUNK_ELEMENTS = 1 << 20
# A block is not made smaller than this to fit: products of fewer rows are slow.
SMALLEST_BLOCK = 16
FEWEST_FOR_PRODUCTS = 128
FEWEST_ON_A_GPU = 1024
CPU_CACHE_BYTES = 1 << 20
FEWEST_CANDIDATES = 128
# On a CPU, from so many tokens for each candidate on, working sets are faster than all atoms: 1.1 to 2.5 times at 8
# (ranks 8 to 64), 0.4 times at 5.3 (rank 128). From so many tokens on, "blocked" is as fast as "dense".
WORKING_SET_RATIO = 8
BLOCKED_TOKENS = 2048


def chunk_rows(n_tokens: int) -> int:
    """Rows of an N x N array that are handled together when the whole array must not be copied."""
    return max(1, CHUNK_ELEMENTS // max(1, n_tokens))


def kept_coefficients(rank: int, n_atoms: int) -> int:
    """Coefficients that are kept of a token, the largest; the reported gap is that of the kept ones.

    One optimum has at most r + 1, but where there are many (duplicate tokens, a token among many neighbours in few
    dimensions) ADMM finds one that spreads over all of them.
    """
    return min(n_atoms, max(2 * (rank + 1), 256))


def candidate_atoms(rank: int, n_tokens: int) -> int:
    """Atoms of a working set: of those that are no part of the optimum, twice as many as can be."""
    return max(1, min(n_tokens - 1, max(3 * (rank + 1), FEWEST_CANDIDATES)))


def solver_memory_bytes(n_tokens: int, rank: int, dtype: torch.dtype, block: int) -> int:
    """Peak memory in bytes of `self_expression` when it iterates `block` of `n_tokens` tokens at a time.

    Three arrays block x N (the ADMM state, its reflection, and a product or the rows that go on), the temporaries of
    the gap, arrays of the size of the tokens, and the coefficients that are found. The tokens themselves and what
    follows the solver are not counted.
    """
    row, kept = rank + 1, n_tokens if block == n_tokens else kept_coefficients(rank, n_tokens)
    chunk = min(block, chunk_rows(n_tokens))
    iterated = (3 * block + 6 * chunk) * n_tokens + (12 * block + n_tokens) * row + 4 * row**2
    in_float64 = 4 * n_tokens * row + 5 * row**2 + 2 * chunk_rows(n_tokens) * n_tokens
    return iterated * dtype.itemsize + in_float64 * 8 + 2 * n_tokens * kept * (8 + dtype.itemsize)


def working_set_memory_bytes(n_tokens: int, rank: int, dtype: torch.dtype, block: int) -> int:
    """`solver_memory_bytes`, and the candidates' atoms: of up to 3/2 block tokens that are iterated, and of up to
    block more that are gathered, in float64 too."""
    atoms = block * candidate_atoms(rank, n_tokens) * (rank + 1)
    return solver_memory_bytes(n_tokens, rank, dtype, block) + atoms * (3 * dtype.itemsize + 2 * 8)


@dataclass(frozen=True)
class Plan:
    """How `self_expression` is computed: with which algorithm, how many tokens at a time, and its peak memory."""

    algorithm: Algorithm
    block: int
    n_bytes: int


def plan_solver(
    n_tokens: int, rank: int, dtype: torch.dtype, device: torch.device, algorithm: Algorithm, budget: int | None
) -> Plan:
    """Choose how to compute the self-expression within its memory.

    Args:
        n_tokens, rank: N and r.
        dtype: precision of the iteration.
        device: where it runs.
        algorithm: see `SolverOptions`. "dense" and "authors" iterate all tokens at once, the others as many as run
            fastest and fit.
        budget: bytes; None: half of what is free.

    Raises:
        MemoryError: before anything is computed, if it does not fit.
    """
    available = available_memory_bytes(device)
    limit: float = math.inf if available is None else available // 2
    if budget is not None:
        limit = budget
    fastest = _fastest_algorithm(n_tokens, rank) if algorithm == "auto" else algorithm
    plan = _plan(n_tokens, rank, dtype, device, fastest, limit)
    if algorithm == "auto" and plan.n_bytes > limit:
        plan = _plan(n_tokens, rank, dtype, device, "blocked", limit)
    if plan.n_bytes > limit:
        raise MemoryError(
            f"the self-expression of {n_tokens} tokens (rank {rank}, {dtype}, algorithm {plan.algorithm!r}) needs "
            f"{plan.n_bytes / 2**30:.2g} GiB on {device}, and may use {limit / 2**30:.2g} GiB: use "
            + ("algorithm='blocked', " if plan.algorithm != "blocked" else "")
            + "fewer frames or fewer tokens a frame, or raise memory_budget"
        )
    return plan


def _fastest_algorithm(n_tokens: int, rank: int) -> Algorithm:
    if n_tokens >= WORKING_SET_RATIO * candidate_atoms(rank, n_tokens):
        return "working-set"
    return "dense" if n_tokens < BLOCKED_TOKENS else "blocked"


def _plan(
    n_tokens: int, rank: int, dtype: torch.dtype, device: torch.device, algorithm: Algorithm, limit: float
) -> Plan:
    """With the largest block that fits; the smallest where none does."""
    if algorithm == "authors":
        # Float64, all coefficients kept, and the multipliers of two iterations.
        needed = solver_memory_bytes(n_tokens, rank, torch.float64, n_tokens) + 48 * n_tokens**2
        return Plan(algorithm, n_tokens, needed)
    if algorithm == "dense":
        return Plan(algorithm, n_tokens, solver_memory_bytes(n_tokens, rank, dtype, n_tokens))
    block = max(1, min(n_tokens, _fastest_block(n_tokens, dtype, device)))
    bytes_of = working_set_memory_bytes if algorithm == "working-set" else solver_memory_bytes
    while block > SMALLEST_BLOCK and bytes_of(n_tokens, rank, dtype, block) > limit:
        block = max(SMALLEST_BLOCK, block // 2)
    return Plan(algorithm, block, bytes_of(n_tokens, rank, dtype, block))


def _fastest_block(n_tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose state and its reflection stay in the cache, but enough of them for fast products."""
    cache, fewest = CPU_CACHE_BYTES, FEWEST_FOR_PRODUCTS
    if device.type == "cuda":
        fewest, cache = FEWEST_ON_A_GPU, torch.cuda.get_device_properties(device).L2_cache_size
    return max(fewest, cache // (2 * n_tokens * dtype.itemsize) if n_tokens else 0)


def available_memory_bytes(device: torch.device) -> int | None:
    """Free memory in bytes on `device`; None where the system does not tell."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [free for free in (_container_bytes(), _machine_bytes()) if free is not None]
    return min(limits, default=None)


def _container_bytes() -> int | None:
    """What the control group of a container leaves (cgroup v2), None outside of one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used)


def _machine_bytes() -> int | None:
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
