"""The one place that decides whether the Triton kernels can take a call."""

import importlib.util
import logging
from functools import cache
from typing import Any

import torch

from .hopper import hopper_enabled, hopper_refusal
from .tiles import HEAD_DIMS, INTERPRETER, MAX_QUERIES, PREFILL

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_GRID = 65535
logger = logging.getLogger(__name__)


def _interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1, which runs them on any device's tensors."""
    import triton

    from .prefill import prefill_kernel

    return not isinstance(prefill_kernel, triton.JITFunction)


@torch.compiler.assume_constant_result
def triton_target(device: torch.device) -> tuple[str | None, str]:
    """The tile table's row for a device, or None and the reason why there is none."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    if _interpreted():
        return INTERPRETER, ""
    if device.type != "cuda":
        return None, f"the tensors are on {device.type}; without a GPU the kernels run only under TRITON_INTERPRET=1"
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return (arch, "") if arch in PREFILL else (None, f"no tiles are known for {arch}")
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(name[3:]) for name in PREFILL if name.startswith("sm_")]
    near = [arch for arch in known if arch // 10 == major and arch <= 10 * major + minor]
    return (f"sm_{max(near)}", "") if near else (None, f"no tiles are known for sm_{major}{minor}")


def triton_refusal(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, batch: int = 1
) -> str | None:
    """Why the Triton kernels cannot take such a call, or None where they can."""
    target, reason = triton_target(device)
    if target is None:
        return reason
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, the kernels take {', '.join(str(known) for known in DTYPES)}"
    if head_dim not in HEAD_DIMS:
        return f"the head dim is {head_dim}, the kernels take {', '.join(str(known) for known in HEAD_DIMS)}"
    if batch > MAX_GRID:
        return f"the batch is {batch}, the kernels take up to {MAX_GRID}"
    return None


def hopper_choice(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    asked: str,
    window: int | None,
    softcap: float | None,
    padding: bool,
    value_gate: bool,
) -> bool:
    """Whether a call that a Triton kernel will take goes to the Hopper kernel; ValueError if asked for and it cannot.

    With "auto" and the path switched on, a refusal is said once for each reason.
    """
    if asked == "triton" or (asked == "auto" and (not hopper_enabled() or q.shape[2] <= MAX_QUERIES)):
        return False
    target, reason = triton_target(q.device)
    if target is not None:
        features: dict[str, Any] = {"window": window, "softcap": softcap, "padding": padding, "value_gate": value_gate}
        reason = hopper_refusal(q, k, v, target, **features)
    if reason and asked == "hopper":
        raise ValueError(f"backend='hopper' cannot take this call: {reason}; use backend='triton' or 'auto'")
    if reason and not torch.compiler.is_compiling():
        _log_portable(reason)
    return not reason


@cache
def _log_portable(reason: str) -> None:
    logger.info("prefill runs on the portable Triton kernel instead of the Hopper one: %s", reason)
