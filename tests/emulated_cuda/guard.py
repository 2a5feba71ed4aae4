"""Compiles and loads guard.cpp, before torch is imported: torch asks once whether CUDA is there."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path


class NotEmulatedError(RuntimeError):
    """Why there can be no emulated card here. `fault`: something is missing that should be installed."""

    def __init__(self, reason: str, fault: bool) -> None:
        super().__init__(reason)
        self.fault = fault


def load() -> ctypes.CDLL:
    """The compiled guard, kept in the folder of temporary files for each source and each torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotEmulatedError("the emulated card needs torch: install it with `make`", fault=True)
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise NotEmulatedError(
            "the emulated card is skipped: this torch is a CUDA build, whose own device guard cannot be replaced; run "
            "`make test` on a machine with a GPU, or install torch for the CPU",
            fault=False,
        )
    if "torch" in sys.modules:
        raise NotEmulatedError("load the emulated card before torch: torch asks once whether CUDA is there", fault=True)
    source = Path(__file__).with_name("guard.cpp")
    tag = zlib.crc32(source.read_bytes() + (torch / "version.py").read_bytes() + bytes(torch))
    library = Path(tempfile.gettempdir()) / f"emulated-cuda-{tag:08x}.so"
    if not library.exists():
        if shutil.which("g++") is None:
            raise NotEmulatedError("the emulated card needs a C++ compiler: install g++", fault=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder, library.name)
            command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include", str(source)]
            command += [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib", "-o", str(built)]
            subprocess.run(command, check=True)
            built.rename(library)  # whole or not at all, for workers side by side
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
