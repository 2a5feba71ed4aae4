"""The one place that decides which implementation takes a call, and says so where it is not the best one."""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import measured
from .hopper import hopper_enabled, hopper_refusal
from .reference import reference_attention
from .sdpa import sdpa_attention
from .tiles import HEAD_DIMS, INTERPRETER, PREFILL, takes_few_queries

BACKENDS = ("auto", "triton", "hopper", "sdpa", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_GRID = 65535
Outputs = tuple[torch.Tensor, torch.Tensor]
logger = logging.getLogger(__name__)


def _interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1, which runs them on any device's tensors."""
    import triton

    from .prefill_kernel import prefill_kernel

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


def choose_backend(
    backend: str, q: torch.Tensor, no_hopper: str | None = None, refused: str | None = None, batch: int | None = None
) -> str:
    """The backend for a call. `no_hopper` names an op that "hopper" lacks, `refused` says why Triton cannot take it."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "hopper" and no_hopper:
        raise ValueError(f"backend='hopper' is for prefill and cannot take {no_hopper}; use backend='triton' or 'auto'")
    if backend in ("sdpa", "reference", "hopper"):
        return backend
    refused = refused or triton_refusal(q.device, q.dtype, q.shape[-1], q.shape[0] if batch is None else batch)
    if backend == "triton":
        if refused is not None:
            raise ValueError(f"backend='triton' cannot take this call: {refused}; use backend='sdpa' or 'auto'")
        return backend
    if q.device.type != "cuda":
        return "sdpa"
    if refused is not None and not torch.compiler.is_compiling():
        _log_fallback(no_hopper, refused)
    return "triton" if refused is None else "sdpa"


@cache
def _log_fallback(op: str | None, refusal: str) -> None:
    told = "%s on torch's scaled_dot_product_attention instead of Triton%s: %s"
    if op is None:
        logger.info(told, "attention runs", "", refusal)
    else:  # see sequences.py
        host = ", a sequence at a time with lengths read on the host, so that no CUDA graph can hold the call"
        logger.warning(told, f"{op} run" + "s" * (op == "decode"), host, refusal)


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
    if asked == "triton" or (asked == "auto" and not hopper_enabled(q.shape[-1])):
        return False
    target, reason = triton_target(q.device)
    if asked == "auto" and (target is None or takes_few_queries(target, q.shape[-1], q.shape[2], k.shape[2])):
        return False
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


def torch_backend(
    backend: str,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    positive_gate: bool,
    return_lse: bool,
    log_gate: bool = False,
) -> Callable[..., Outputs]:
    """SDPA (whose lse is None unless asked for) or the reference, with their options set.

    With `log_gate` the gamma_k that it is called with holds log gamma_k.
    """

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gamma_k: torch.Tensor | None,
        gamma_v: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> Outputs:
        options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        options |= {"gamma_v": gamma_v, "key_padding_mask": key_padding_mask}
        if backend == "sdpa":
            options |= {"positive_gate": positive_gate, "return_lse": return_lse, "log_gate": log_gate}
            return sdpa_attention(q, k, v, gamma_k=gamma_k, **options)
        out, lse = reference_attention(q, k, v, **{"log_gamma_k" if log_gate else "gamma_k": gamma_k}, **options)
        return out.to(q.dtype), lse.float()

    return attend


def _hopper_line() -> str:
    chosen = [str(head_dim) for (_, head_dim), faster in sorted(measured.HOPPER.items()) if faster]
    return f"prefill only, {'head dim ' + ' and '.join(chosen) if chosen else 'off'} unless VIDEOANCHOR_HOPPER says so"


def available_backends(device: torch.device | str) -> dict[str, str]:
    """One line for each backend of `anchored_attention`: what it can do on `device`.

    See Also:
        anchored_attention: takes these names as `backend`.

    Examples:
        >>> import videoanchor_triton as va
        >>> backends = va.available_backends("cpu")
        >>> list(backends)
        ['triton', 'hopper', 'sdpa', 'reference']
        >>> backends["sdpa"]
        'yes, any dtype and head dim'
    """
    device = torch.device(device)
    refusal = triton_refusal(device)
    target = triton_target(device)[0]
    return {
        "triton": f"yes, tiles for {target}" if refusal is None else f"no: {refusal}",
        "hopper": _hopper_line() if target == "sm_90" else "no: it takes sm_90 only",
        "sdpa": "yes, any dtype and head dim",
        "reference": "yes, dense in fp64, for tests",
    }
