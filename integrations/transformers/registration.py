"""What importing this package changes for imports after it: `attn_implementation="videoanchor_triton"` is known to
transformers, and torchvision can be imported beside another build of torch. Neither of them is imported for that."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from ...app.torchvision_compat import with_declared_operators

_TARGET = "transformers.modeling_utils"


class _Around(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before the finders of one module, and when it is imported runs it by a function of its own.

    Args:
        name: of the module.
        execute: gets what runs the module.
    """

    def __init__(self, name: str, execute: Callable[[Callable[[], None]], None]) -> None:
        self._name, self._execute = name, execute

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._loader, spec.loader = spec.loader, self
                return spec
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._execute(lambda: self._loader.exec_module(module))
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _then_register(run: Callable[[], None]) -> None:
    run()
    _register()


def _register() -> None:
    importlib.import_module(".attention", __package__)  # registers as it is imported


def prepare_imports() -> None:
    """Registers the attention now if transformers' models are imported already, else as soon as they are."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _Around("torchvision", with_declared_operators))
    if _TARGET in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Around(_TARGET, _then_register))
