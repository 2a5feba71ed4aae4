"""How much memory the solver needs, and how many tokens it may iterate at a time."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

# Elements of an array that are handled together.
CHUNK_ELEMENTS = 1 << 20
# A block is not made smaller than this to fit: products of fewer rows are slow.
SMALLEST_BLOCK = 16
# What the candidates of a block take, (tokens, K, p) float32: enough tokens for fast products, few for the cache.
CPU_BLOCK_BYTES, CUDA_BLOCK_BYTES = 8 << 20, 1 << 30
LARGEST_BLOCK = 1024  # on a CPU


def chunk_rows(width: int) -> int:
    """Rows (width,) of an array that are handled together when there must never be a whole one."""
    return max(1, CHUNK_ELEMENTS // max(1, width))


def candidate_atoms(n_unknowns: int, n_atoms: int) -> int:
    """K, the atoms that a token is expressed by: at most p are part of an optimum, which leaves room for others, for
    more of them where there are more atoms."""
    return min(n_atoms, max(2 * n_unknowns, min(3 * n_unknowns, n_atoms // 16)) + 16)


def token_bytes(n_atoms: int, rank: int) -> int:
    """Memory in bytes of a token while it is iterated: its candidates' rows as they are, centred and weighted, normal
    matrix and factor, slopes of all atoms, multipliers; in float64."""
    row, k = rank + 1, candidate_atoms(rank + 1, n_atoms)
    return 8 * (3 * k * row + 3 * row**2 + 3 * n_atoms + 24 * (k + row))


def solver_memory_bytes(n_tokens: int, n_atoms: int, rank: int, iterated: int) -> int:
    """Peak memory in bytes of the self-expression of `n_tokens` tokens over `n_atoms`, `iterated` of them at a time:
    the atoms in two precisions, what is found, and what is iterated. Neither the tokens are counted nor what follows
    the solver."""
    found = 16 * n_tokens * candidate_atoms(rank + 1, n_atoms)
    return 12 * (rank + 1) * (n_atoms + n_tokens) + found + iterated * token_bytes(n_atoms, rank)


class Plan(NamedTuple):
    """How many tokens are iterated together, and how many such blocks side by side."""

    block: int
    threads: int


def plan_solver(n_tokens: int, n_atoms: int, rank: int, device: torch.device, budget: int | None) -> Plan:
    """Blocks as large as run fastest, smaller if they do not fit, whatever the number of threads; and as many of
    torch's threads as fit.

    Args:
        n_tokens, n_atoms, rank: n, N and r.
        device: where it runs.
        budget: bytes; None: half of what is free.

    Raises:
        MemoryError: before anything is computed, if not even a small block fits.
    """
    row, k = rank + 1, candidate_atoms(rank + 1, n_atoms)
    cuda = device.type == "cuda"
    bytes_of_block, largest = (CUDA_BLOCK_BYTES, n_tokens) if cuda else (CPU_BLOCK_BYTES, LARGEST_BLOCK)
    block = max(1, min(n_tokens, largest, max(SMALLEST_BLOCK, bytes_of_block // (4 * k * row or 1))))
    fixed, each = solver_memory_bytes(n_tokens, n_atoms, rank, 0), token_bytes(n_atoms, rank)
    what = f"the self-expression of {n_tokens} tokens over {n_atoms} (rank {rank})"
    limit = check_fits(fixed + min(block, SMALLEST_BLOCK) * each, what, device, budget)
    threads = 1 if cuda else torch.get_num_threads()
    if limit is None:
        return Plan(block, threads)
    block = min(block, (limit - fixed) // each)
    return Plan(block, max(1, min(threads, (limit - fixed) // (block * each))))


def check_fits(n_bytes: int, what: str, device: torch.device, budget: int | None) -> int | None:
    """The bytes that may be used: `budget`, or half of what is free; None where the system does not tell.

    Raises:
        MemoryError: `what` needs more, `n_bytes`.
    """
    available = available_memory_bytes(device) if budget is None else None
    limit = available // 2 if available is not None else budget
    if limit is not None and n_bytes > limit:
        raise MemoryError(
            f"{what} needs {n_bytes / 2**30:.2g} GiB on {device}, and may use {limit / 2**30:.2g} GiB: use fewer "
            "frames or fewer tokens a frame, or raise memory_budget"
        )
    return limit


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
