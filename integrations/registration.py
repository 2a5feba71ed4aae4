"""Makes `attn_implementation="videoanchor_triton"` known to transformers without importing transformers."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TARGET = "transformers.modeling_utils"


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before the finder of one module and registers once that module has run."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    importlib.import_module(".attention", __package__)  # registers as it is imported


def register_when_transformers_is_imported() -> None:
    """Registers now if transformers' models are imported already, else as soon as they are."""
    if _TARGET in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
