"""The first call of each compiled variant of a kernel is compared with the dense form, at some of its own rows.

Nobody has tried every card with every Triton. A variant whose rows are wrong is not used again in this process: torch's
SDPA answers instead, and a warning says what to report. Pairs of card and Triton that `benchmarks/gpu_check.py` has
shown right (measured.py) are not checked. VIDEOANCHOR_SELF_CHECK=first, off or always says otherwise.
"""

import os
import threading
import warnings
from collections.abc import Callable, Hashable
from functools import cache

import torch
import triton

from .measured import SHOWN_RIGHT

SWITCH = "VIDEOANCHOR_SELF_CHECK"
Variant = tuple[Hashable, ...]
# whether a variant's rows were right; one that is not here has not been compared yet
_right: dict[Variant, bool] = {}
_lock = threading.Lock()


def self_checked(
    name: Callable[[], Variant],
    device: torch.device,
    launch: Callable[[], None],
    compare: Callable[[], torch.Tensor],
    answer: Callable[[], None],
    graph_refusal: str | None = None,
) -> None:
    """Fill the results of a call: by `launch`, or where its variant has been wrong by `answer`, which is torch's.

    `name` gives the variant, which costs more than looking it up, so that it is asked for only where it is needed.
    `compare` gives the error of what `launch` left, as `worst_error` does; it is read on the host, once. While a CUDA
    graph is captured nothing is compared. `graph_refusal` says why `answer` cannot be captured.
    """
    mode = _mode(device)
    if mode == "off":
        return launch()
    variant = name()
    right = _right.get(variant)
    if right is None or right:
        launch()
        if (right and mode == "first") or _capturing(device):
            return None
        with torch.no_grad():
            worst = compare().item()
        if worst <= 1:
            if worst >= 0:  # something was compared
                _right.setdefault(variant, True)
            return None
        _strike_off(variant, device, worst)
    if graph_refusal and _capturing(device):
        raise RuntimeError(
            f"the Triton kernel of this call was wrong on {_card(device)[0]}, and SDPA cannot answer while a CUDA "
            f"graph is captured: {graph_refusal}; call it outside of a graph"
        )
    with torch.no_grad():
        return answer()


def _strike_off(variant: Variant, device: torch.device, worst: float) -> None:
    with _lock:
        known = _right.get(variant) is False
        _right[variant] = False
    if not known:
        card, version = _card(device)
        warnings.warn(
            f"a Triton kernel gave wrong results on {card} with Triton {version}, {worst:.3g} times the error allowed: "
            f"{' '.join(map(str, variant))}; it is not used again in this process, and torch's SDPA answers instead. "
            f"Run `videoanchor check` and report what it prints",
            RuntimeWarning,
            stacklevel=2,
        )


def _mode(device: torch.device) -> str:
    setting = os.environ.get(SWITCH)
    if setting in ("first", "off", "always"):
        return setting
    if setting:
        raise ValueError(f"the environment variable {SWITCH} must be first, off or always, got {setting!r}")
    return "off" if _card(device) in SHOWN_RIGHT else "first"


@cache
def _card(device: torch.device) -> tuple[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, triton.__version__


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
