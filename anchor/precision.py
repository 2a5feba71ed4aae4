"""Full float32 products, whatever the process has set globally."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Switch TF32, bfloat16 products and autocast on `device` off inside the block; restore the settings after it.

    The product settings are global to the process, in torch as well: another thread that changes them meanwhile is
    not kept out.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    saved = [backend.fp32_precision for backend in backends]
    # The process-wide getter refuses to answer while it disagrees with a backend, so the backends come first.
    for backend in backends:
        backend.fp32_precision = "ieee"
    saved_global = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(saved_global)
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision
