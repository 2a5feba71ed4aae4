"""What measured numbers depend on."""

import hashlib
import platform
import subprocess
from pathlib import Path

import numpy
import scipy
import sklearn
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"


def environment(device: torch.device, cpu: str) -> dict[str, str]:
    """Device (`cpu` is the name of one that is no GPU), driver, versions and commit."""
    driver = "none"
    if device.type == "cuda":
        answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = (answer.splitlines() or [UNKNOWN])[0]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        **commit(),
    }


def commit() -> dict[str, str]:
    """The commit of the files here, and whether they have changed since ("true", "false"); unknown without Git."""
    git = ("git", "-C", str(ROOT))
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _output(*git, "rev-parse", "HEAD"),
        "dirty": changes if changes == UNKNOWN else str(bool(changes)).lower(),
    }


def source_digest() -> str:
    """A short hash of the Python files that are measured: it tells uncommitted changes apart, and needs no Git."""
    digest = hashlib.sha256()
    for folder in ("kernels", "anchor", "integrations", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    """The name of the CPU and how many threads torch and NumPy's libraries use at most."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
