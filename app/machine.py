"""The machine that a command runs on: versions, devices, and what attention can do there."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..integrations.errors import InputError


def devices_of(device: str) -> list[torch.device]:
    """The devices that `device` ("auto", "cpu", "cuda" or "cuda:N") stands for; "auto" is all GPUs, or else the CPU.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device}: no CUDA device here; use --device cpu")
    if device != "auto":
        return [torch.device(device)]
    return [torch.device("cuda", n) for n in range(torch.cuda.device_count())] or [torch.device("cpu")]


def one_device(device: str) -> torch.device:
    """The first of `devices_of`, which must be a CPU or a GPU that is there.

    Raises:
        InputError: it is not.
    """
    try:
        found = devices_of(device)[0]
    except RuntimeError as error:
        raise InputError(f"device {device}: expected auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {device}: expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: {torch.cuda.device_count()} CUDA devices are visible, numbered from 0")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def slow_arithmetic(dtype: torch.dtype, device: torch.device) -> str | None:
    """A sentence where a CPU has no instructions for products in a model's dtype, and takes several times as long as in
    float32; None where it has them, and where torch does not know (before `torch.cpu.get_capabilities`)."""
    with_them = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "avx_ne_convert"},
        torch.float16: {"avx512_fp16", "amx_fp16", "avx_ne_convert"},
    }
    if device.type != "cpu" or dtype not in with_them or not hasattr(torch.cpu, "get_capabilities"):
        return None
    able = torch.cpu.get_capabilities()
    if able.get("architecture") != "x86_64" or any(able.get(one) for one in with_them[dtype]):
        return None
    return (
        f"this CPU has no instructions for {str(dtype).removeprefix('torch.')}, and takes several times as long as in "
        "float32: --dtype float32 is faster, in twice the memory"
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("videoanchor-triton", "torch", "triton", "transformers", "scikit-learn", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(devices: list[torch.device]) -> dict[str, Any]:
    """Versions, and a line about each backend for each device, for JSON; `machine_lines` is for people."""
    from ..kernels.dispatch import available_backends  # imports Triton, for which `demo` sets something first

    cuda = torch.version.cuda or torch.version.hip or "none, torch is built for the CPU"
    return {
        "versions": {**versions(), "cuda": cuda, "driver": _driver()},
        "devices": [
            {"device": str(device), "name": _name(device), "backends": available_backends(device)} for device in devices
        ],
    }


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{torch.get_num_threads()} threads"
    has = torch.cuda.get_device_properties(device)
    return f"{torch.cuda.get_device_name(device)}, {has.total_memory / 2**30:.0f} GiB"


def _driver() -> str:
    if not torch.cuda.is_available():
        return "none"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        said = []
    return said[0] if said else "unknown"
