"""What a GPU has settled: written by `benchmarks/gpu_check.py --apply` from results. Empty: none has run it yet."""

# (device, Triton version) whose kernels gpu_check has shown right: the first calls there are not checked again
SHOWN_RIGHT: frozenset[tuple[str, str]] = frozenset()
