"""`attn_implementation="videoanchor_triton"` is known to transformers once both packages are imported, in either order.

transformers' registry of attentions lies in the module of its models. Importing that here would make
`import videoanchor_triton` and `videoanchor --help` a hundred times slower (5.8 against 0.05 CPU-seconds, medians of
fresh processes; 0.8 of them for `import transformers` alone, which has no place for a name that is registered later).
So where it is not imported yet, the attention registers itself right after it, whenever that is.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODELS = "transformers.modeling_utils"


class _AfterModels:
    """Finds transformers' module of models as Python itself does, and registers the attention after it has run."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODELS else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    importlib.import_module(".attention", __package__)  # registers as it is imported


def register_with_transformers() -> None:
    """Registers the attention now if transformers' models are imported already, else as soon as they are."""
    if _MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterModels)
