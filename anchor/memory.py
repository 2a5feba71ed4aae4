"""How much memory the dense solver needs, and whether the machine has it."""

import os
from pathlib import Path

import torch

# Elements of the state that the residual looks at together: its temporaries never exceed a few times this.
CHUNK_ELEMENTS = 1 << 20


def chunk_rows(n_tokens: int) -> int:
    """Rows of an N x N array that are handled together when the whole array must not be copied."""
    return max(1, CHUNK_ELEMENTS // max(1, n_tokens))


def dense_memory_bytes(n_tokens: int, rank: int, dtype: torch.dtype) -> int:
    """Peak memory in bytes of `self_expression` on `n_tokens` tokens with `rank` features, computed in `dtype`.

    Two N x N arrays (the ADMM state and its reflection, which becomes the coefficients), the temporaries of the
    residual, and arrays of the size of the tokens. The tokens themselves and what follows the solver are not counted.
    """
    rows = chunk_rows(n_tokens)
    in_dtype = 2 * n_tokens**2 + 6 * rows * n_tokens + 10 * n_tokens * (rank + 1) + 4 * (rank + 1) ** 2
    in_float64 = 4 * n_tokens * (rank + 1) + 5 * (rank + 1) ** 2 + 2 * rows * n_tokens
    return in_dtype * dtype.itemsize + in_float64 * 8


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


def check_dense_memory(n_tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise MemoryError, before anything is computed, if `self_expression` does not fit on `device`."""
    needed = dense_memory_bytes(n_tokens, rank, dtype)
    available = available_memory_bytes(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"the self-expression of {n_tokens} tokens (rank {rank}, {dtype}) needs {needed / 2**30:.1f} GiB on "
            f"{device}, and {available / 2**30:.1f} GiB are available; memory grows with the square of the number of "
            "tokens: use fewer frames or fewer tokens a frame"
        )
