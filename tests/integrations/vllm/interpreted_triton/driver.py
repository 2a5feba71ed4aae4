# pyright: reportIncompatibleMethodOverride=false
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """Is asked for nothing while TRITON_INTERPRET=1, but for its device."""

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:  # noqa: ARG002
        return 0
