# pyright: reportIncompatibleMethodOverride=false
from typing import Any

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Is asked for nothing while TRITON_INTERPRET=1."""

    @staticmethod
    def supports_target(target: Any) -> bool:  # noqa: ARG004
        return False

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: Any = None) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def load_dialects(self, ctx: Any) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def get_module_map(self) -> dict[str, Any]:
        return {}
