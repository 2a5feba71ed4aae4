"""Products of the solver are in full precision, whatever the process has set."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from videoanchor_triton.anchor.precision import full_precision_products
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.solver import SolverOptions, self_expression

from .tokens import vit_like

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


class _Precisions(TorchDispatchMode):
    """Collects the precision settings under which float32 products run, and the dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.add((out.dtype, CUDA.fp32_precision, MKLDNN.fp32_precision))
        return out


@pytest.mark.parametrize("setting", ["process-wide", "backend"])
def test_products_are_in_full_precision_whatever_is_set(setting):
    before = torch.get_float32_matmul_precision(), CUDA.fp32_precision, MKLDNN.fp32_precision
    Y = token_features(vit_like(), 16)
    expected = self_expression(Y, SolverOptions()).to_dense()
    try:
        if setting == "process-wide":
            torch.set_float32_matmul_precision("medium")
        else:
            CUDA.fp32_precision, MKLDNN.fp32_precision = "tf32", "bf16"
        changed = CUDA.fp32_precision, MKLDNN.fp32_precision
        with torch.autocast("cpu", torch.bfloat16), _Precisions() as precisions:
            found = self_expression(Y, SolverOptions()).to_dense()
        assert (CUDA.fp32_precision, MKLDNN.fp32_precision) == changed
        assert setting == "backend" or torch.get_float32_matmul_precision() == "medium"
    finally:
        CUDA.fp32_precision, MKLDNN.fp32_precision = "none", "none"
        torch.set_float32_matmul_precision(before[0])
        CUDA.fp32_precision, MKLDNN.fp32_precision = before[1:]
    assert precisions.seen == {(torch.float32, "ieee", "ieee"), (torch.float64, "ieee", "ieee")}
    assert torch.equal(found, expected)


def test_precision_settings_come_back_after_an_error():
    before = torch.get_float32_matmul_precision(), CUDA.fp32_precision
    with pytest.raises(KeyError), full_precision_products(torch.device("cpu")):
        raise KeyError
    assert (torch.get_float32_matmul_precision(), CUDA.fp32_precision) == before
