"""transformers' processors need torchvision's Python transforms. Where torchvision was built for another torch (a CPU
build of torch beside torchvision's CUDA wheel), its import, and that of transformers' AutoProcessor, dies of "operator
torchvision::nms does not exist", although nothing here needs its compiled operators. Importing this package sees to it
that the import goes through; where torchvision is whole, nothing changes."""

import importlib
import importlib.util
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []


def with_declared_operators(run: Callable[[], object]) -> None:
    """Runs the import of torchvision; if its own library cannot be loaded, declares the operators that it expects, and
    runs it again. They have no implementation: whoever calls them still gets torch's error."""
    try:
        run()
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _libraries:
            raise
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)  # they go with it
        run()
        logger.info(
            "torchvision's compiled operators do not fit torch %s: its Python transforms are used", torch.__version__
        )


def make_torchvision_importable() -> None:
    """Imports torchvision, for whoever has not imported this package."""
    if importlib.util.find_spec("torchvision") is not None:
        with_declared_operators(lambda: importlib.import_module("torchvision"))
