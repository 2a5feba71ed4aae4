"""Makes torchvision importable in the environment that runs this, where its build does not fit that of torch.

Some package indexes serve torch as a CPU build and torchvision as a CUDA build only, so that no requirement gives pip a
pair that fits. Importing torchvision, and transformers' models and processors with it, then dies of "operator
torchvision::nms does not exist", although they need its Python transforms only. `make` runs this after each
installation. Where torchvision is absent, is whole, or fails otherwise, nothing changes.

The two operators that the import looks for are declared in this environment's copy of torchvision, where it loads its
library: no other import is slower for it. They have no implementation, and whoever calls them gets torchvision's own
error. pip replaces or removes the changed file as any other.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SYMPTOM = "operator torchvision::nms does not exist"
DECLARATION = """

if not _has_ops():  # added by tools/repair_torchvision.py of videoanchor-triton
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def import_error() -> str:
    """What a fresh Python says to `import torchvision`."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True).stderr


def main() -> None:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or SYMPTOM not in import_error():
        return
    extension = Path(spec.origin).with_name("extension.py")
    changed = extension.with_suffix(".changed")  # never in place: the file may be linked from an installer's cache
    changed.write_text(extension.read_text(encoding="utf-8") + DECLARATION, encoding="utf-8")
    os.replace(changed, extension)
    if error := import_error():
        sys.exit(f"torchvision was built for another torch, and cannot be imported:\n{error}")
    print("torchvision was built for another torch: its Python transforms are used, its compiled operators are not")


if __name__ == "__main__":
    main()
