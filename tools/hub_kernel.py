"""Lays kernels/ out as a kernel of the Hugging Face Hub, for the `kernels` library and its kernel-builder.

    python tools/hub_kernel.py --out DIR --repo-id OWNER/NAME

DIR gets a project of kernel-builder (build.toml, flake.nix, CARD.md, torch-ext/) and, since nothing is compiled ahead
of time, also what it builds: build/torch-BACKEND, one folder a backend, which `kernels.get_local_kernel(DIR)` loads and
which can be uploaded as it is. The files are those that the public calls of kernels/ import. They register their
operators in a namespace of their own, named after their content, so that several versions, and the package itself, can
be used in one process. docs/hub.md says how to publish.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
PACKAGE = ROOT / "src" / "videoanchor_triton" / "__init__.py"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 0  # by the Hub's convention of a kernel whose interface may still change
LICENSE = "Apache-2.0"
NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")

BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""
FLAKE = """{
  description = "Flake for NAME";
  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD = """---
license: {license_id}
tags:
- kernels
---
# {name}

Attention whose keys and values are gated by factors per key, as Triton kernels: prefill, decode, packed sequences and
paged caches. Needs Python 3.11, PyTorch 2.9, Triton 3.6 (on Linux), or later ones. On a CPU, and where a kernel cannot
run, `backend="auto"` computes the same with PyTorch.

```python
from kernels import get_kernel

attention = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
out = attention.anchored_attention(q, k, v, gamma_k=gamma_k, gamma_v=gamma_v)
```

Functions: {functions}. Each has a docstring with shapes, dtypes and an example. Operators of PyTorch are registered in
a namespace of this build, so that it can be used beside other versions.

Laid out by `tools/hub_kernel.py` of videoanchor-triton; what was measured is on that project's page on performance.
"""
OPS = '''"""The namespace of this build's operators."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(op_name: str) -> str:
    """The name under which this build registers an operator."""
    return f"{id}::{{op_name}}"
'''
# for releases of `kernels` that look for the module one folder deeper
COMPATIBLE = '''"""The same as the folder above."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
if "{id}" not in sys.modules:
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
globals().update({{k: v for k, v in vars(sys.modules["{id}"]).items() if not k.startswith("__")}})
'''


def public_names() -> dict[str, str]:
    """The package's public names that kernels/ defines, with the module of each."""
    tree = ast.parse(PACKAGE.read_text(encoding="utf-8"))
    home = next(x.value for x in tree.body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "_HOME")
    places = ast.literal_eval(home).items()
    return {name: place.removeprefix(".kernels.") for name, place in places if place.startswith(".kernels.")}


def needed(modules: set[str]) -> list[str]:
    """These modules of kernels/ and all that they import, within functions too."""
    found, waiting = set(), set(modules)
    while waiting:
        found.add(name := waiting.pop())
        for node in ast.walk(ast.parse((KERNELS / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting |= set(names) - found
    return sorted(found)


def ported(source: str, repo_id: str) -> str:
    """A module as it is on the Hub: operators in the namespace of the build, examples that load the kernel."""
    source, count = re.subn(r'"videoanchor::(\w+)"', r'add_op_namespace_prefix("\1")', source)
    if count:
        source = re.sub(r"^from \.", "from ._ops import add_op_namespace_prefix\nfrom .", source, count=1, flags=re.M)
    if "videoanchor::" in source or "torch.ops.videoanchor" in source or (count and "import add_op" not in source):
        raise ValueError("an operator must be registered by a plain string and a module with one import another")
    loads = f'from kernels import get_kernel; va = get_kernel("{repo_id}", version={VERSION}, trust_remote_code=True)'
    return source.replace("import videoanchor_triton as va", loads)


def sources(repo_id: str) -> dict[str, str]:
    """The files of the kernel by name."""
    names = public_names()
    files = {
        f"{module}.py": ported((KERNELS / f"{module}.py").read_text(encoding="utf-8"), repo_id)
        for module in needed(set(names.values()))
    }
    imports = "".join(f"from .{module} import {name}\n" for name, module in names.items())
    listed = "".join(f'    "{name}",\n' for name in names)
    files["__init__.py"] = f'"""Attention gated per key."""\n\n{imports}\n__all__ = [\n{listed}]\n'
    return files


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def write_variant(folder: Path, files: dict[str, str], name: str, backend: str) -> None:
    """What kernel-builder makes of the files for one backend."""
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:12]
    module = name.replace("-", "_")
    build_id = f"_{module}_{backend}_{digest}"
    files = files | {"_ops.py": OPS.format(id=build_id), f"{module}/__init__.py": COMPATIBLE.format(id=build_id)}
    write(folder, files)
    hashes = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in sorted(files.items())
    }
    metadata = {
        "name": name,
        "id": build_id,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def lay_out(out: Path, repo_id: str) -> None:
    """Write the project and its builds into `out`, which must be new or empty."""
    owner, _, name = repo_id.partition("/")
    if not owner or not NAME.fullmatch(name):
        raise ValueError(f"--repo-id must be OWNER/NAME, NAME of small letters, digits and dashes, got {repo_id!r}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out must be a new or an empty folder, got {str(out)!r}")
    files = sources(repo_id)
    about = {"name": name, "version": VERSION, "license": LICENSE, "repo_id": repo_id}
    functions = ", ".join(f"`{function}`" for function in public_names())
    project = {
        "build.toml": BUILD.format(**about, backends=", ".join(f'"{backend}"' for backend in BACKENDS)),
        "flake.nix": FLAKE.replace("NAME", name),
        "CARD.md": CARD.format(**about, license_id=LICENSE.lower(), functions=functions),
    }
    write(out, project)
    shutil.copy(ROOT / "LICENSE", out)
    write(out / "torch-ext" / name.replace("-", "_"), files)
    for backend in BACKENDS:
        write_variant(out / "build" / f"torch-{backend}", files, name, backend)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME on the Hub")
    options = parser.parse_args(arguments)
    try:
        lay_out(options.out, options.repo_id)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
