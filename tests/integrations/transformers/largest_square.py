"""Finds the tensors made under it that are as large as query length x key length."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestSquare(TorchDispatchMode):
    """Every tensor made whose last two sizes both reach n, as (operation, shape) in `found`."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.found = n, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim >= 2 and min(tensor.shape[-2:]) >= self.n:
                self.found.add((str(function), tuple(tensor.shape)))
        return out
