"""transformers' video processors need torchvision's Python transforms. Where torchvision was built for another torch (a
CPU build of torch beside torchvision's CUDA wheel), `import torchvision`, and with it `import transformers`, dies of
"operator torchvision::nms does not exist", although nothing here needs its compiled operators."""

import importlib
import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Declares the operators that torchvision's import expects, if its own library cannot be loaded. They have no
    implementation: whoever calls them still gets torch's error."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _library = library
        importlib.import_module("torchvision")
        logger.info(
            "torchvision's compiled operators do not fit torch %s: its Python transforms are used", torch.__version__
        )
