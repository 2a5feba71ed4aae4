"""What GPUs have settled: written by `benchmarks/gpu_check.py --apply` from its results, data only.

Tables are by (target, head dim), PAGED also by rows, and serve 16-bit elements; what is not here is as the rules say
that consult them.
"""

# device, driver, torch, triton, commit of the results
SOURCES: tuple[tuple[str, str, str, str, str], ...] = ()

# (device, Triton version) whose kernels gpu_check has shown right: the first calls there are not checked again
SHOWN_RIGHT: frozenset[tuple[str, str]] = frozenset()

# tiles of prefill without padding, packed sequences, window and softcap: query rows, keys, warps, stages, specialised
PREFILL: dict[tuple[str, int], tuple[int, ...]] = {}

# tiles of the paged kernel by (target, head dim, rows): packed rows of a call (longest query x heads of a group), a
# power of two from 16 to 128
PAGED: dict[tuple[str, int, int], tuple[int, int, int, int]] = {}

# tiles of backward: of dQ, of dK and dV
BACKWARD: dict[tuple[str, int], tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {}

# most queries of a dense call that go to the paged kernel, prefill takes more
SHORT_QUERIES: dict[tuple[str, int], int] = {}

# whether prefill takes the log-bias form where a caller allows post-exp
LOG_BIAS: dict[tuple[str, int], bool] = {}

# whether prefill goes to the Hopper kernel
HOPPER: dict[tuple[str, int], bool] = {}
