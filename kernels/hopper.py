"""The Hopper prefill path: what it takes, whether "auto" uses it, and its launch."""

import math
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from . import measured
from .operands import Masks, logits_of, rows_of
from .tiles import Tile

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SWITCH = "VIDEOANCHOR_HOPPER"
# Gluon's interface is experimental: the versions whose names and behaviour are known
TRITON_VERSIONS = ((3, 6), (3, 9))
# a warpgroup is 4 warps and takes half of the query rows, 64 on the tensor cores
TILES = {64: Tile(128, 128, 4, 3), 128: Tile(128, 128, 4, 2)}
# registers of a thread at launch; the kernel moves them from the loader to the two warpgroups (240, 240 and 24)
REGISTERS = 168


@torch.compiler.assume_constant_result
def hopper_enabled(head_dim: int) -> bool:
    """Whether backend="auto" may choose this path: as VIDEOANCHOR_HOPPER says, else where a GPU found it faster."""
    setting = os.environ.get(SWITCH, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"the environment variable {SWITCH} must be 0 or 1, got {setting!r}")
    return setting == "1" if setting else measured.HOPPER.get(("sm_90", head_dim), False)


@torch.compiler.assume_constant_result
def gluon_refusal() -> str | None:
    """Why the installed Triton cannot compile the kernel, or None where it can."""
    try:
        import triton

        from . import hopper_kernel  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton's Gluon is missing or has changed: {error}"
    if TRITON_VERSIONS[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= TRITON_VERSIONS[1]:
        return None
    low, high = (".".join(map(str, version)) for version in TRITON_VERSIONS)
    return f"Triton is {triton.__version__}, the Hopper kernel takes {low} to {high}"


def hopper_refusal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    target: str,
    *,
    window: int | None = None,
    softcap: float | None = None,
    padding: bool = False,
    varlen: bool = False,
    value_gate: bool = False,
) -> str | None:
    """Why this path cannot take a call of validated tensors (B, H, N, D), or None where it can."""
    if reason := gluon_refusal():
        return reason
    if target != "sm_90":
        return f"the target is {target}, the Hopper kernel takes sm_90"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {q.dtype}, the Hopper kernel takes torch.float16 and torch.bfloat16"
    if q.shape[-1] not in TILES:
        return f"the head dim is {q.shape[-1]}, the Hopper kernel takes {' and '.join(map(str, TILES))}"
    features = {"window": window is not None, "softcap": softcap is not None, "padding": padding, "varlen": varlen}
    if asked := [name for name, wanted in features.items() if wanted]:
        return f"the Hopper kernel has no {' and no '.join(asked)}"
    if value_gate and q.dtype == torch.float16:
        return "the Hopper kernel has no gamma_v in torch.float16"  # see SPLIT in prescale.py
    if q.numel() == 0 or k.numel() == 0:
        return "there are no queries or no keys"
    return next((reason for name, x in (("q", q), ("k", k), ("v", v)) if (reason := _unaddressable(name, x))), None)


def hopper_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
    form: int,
    tile: Tile,
) -> dict[str, Any]:
    """What `hopper_kernel` is launched with, and compiled with: tensors that the copy engine can address."""
    from .prefill_kernel import Groups

    heads, (queries, keys) = q.shape[1], (x.shape[2] for x in (q, k))
    return {
        "q": _descriptor(q, tile.queries // 2),
        "k": _descriptor(k, tile.keys),
        "v": _descriptor(v, tile.keys),
        "gate": None if gate is None else _descriptor(gate, tile.keys),
        "out": rows_of(out),
        "lse": lse,
        "scale_log2": logits_of(masks).scale,
        "groups": Groups(heads // k.shape[1], heads // v.shape[1], 1 if gate is None else heads // gate.shape[1]),
        "Nq": queries,
        "Nk": keys,
        "STAGES": tile.stages,
        "GATE": form,
        "CAUSAL": masks.causal,
        "num_warps": tile.warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": True,
    }


def hopper_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    masks: Masks,
    form: int,
    tile: Tile | None = None,
) -> None:
    """Launch the kernel on tensors that `hopper_refusal` does not name.

    q (B, Hq, Nq, D); k (B, Hkv, Nk, D); v (B, Hkv or Hq, Nk, D), multiplied by the factors of the values (and of the
    keys in the post-exp form); gate (B, 1, Hkv or Hq, at least Nk) in fp32: none for `form` NO_GATE, log2 gamma_k for
    LOG_BIAS, gamma_k for POST_EXP (prescale.py). Writes out, q's shape with contiguous rows, and lse (B, Hq, Nq) fp32,
    contiguous. `tile` replaces that of the table.
    """
    from .hopper_kernel import hopper_kernel

    tile = tile or TILES[q.shape[-1]]
    # torch.compile asks hopper_refusal about tensors whose addresses it does not know yet
    q, k, v = (
        x if _unaddressable("", x) is None else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    gate = None if gate is None else _gate_rows(gate, k.shape[2])
    grid = (math.ceil(q.shape[2] / tile.queries), q.shape[1], q.shape[0])
    hopper_kernel[grid](**hopper_arguments(q, k, v, gate, out, lse, masks, form, tile))


def _unaddressable(name: str, x: torch.Tensor) -> str | None:
    """Why the copy engine cannot address x, or None where it can. Strides of dimensions of size 1 do not matter."""
    if x.stride(-1) != 1:
        return f"{name}'s last dimension has stride {x.stride(-1)}, the Hopper kernel takes contiguous rows"
    if not torch.compiler.is_compiling() and x.data_ptr() % 16:
        return f"{name} does not begin at a multiple of 16 bytes"
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if any(stride <= 0 or stride * x.element_size() % 16 for stride in strides):
        return f"{name}'s strides {x.stride()} are not all positive multiples of 16 bytes"
    return None


def _gate_rows(gate: torch.Tensor, keys: int) -> torch.Tensor:
    """The gate (B, heads, Nk) as the copy engine can address it, one head where all share one."""
    gate = (gate[:, :1] if gate.stride(1) == 0 else gate)[..., :keys]
    if _unaddressable("gate", gate) is None:
        return gate
    return F.pad(gate, (0, -keys % 4)).contiguous()[..., :keys]


def _descriptor(x: torch.Tensor, rows: int) -> "TensorDescriptor":
    """Tiles of `rows` rows (of `rows` elements, for a gate). The copy engine reads 0 beyond x's own dimensions."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, *x.shape[3:]]
    strides = [stride if size > 1 else x.shape[-1] * 8 for size, stride in zip(x.shape, x.stride(), strict=True)]
    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], block, layout)  # pyright: ignore[reportArgumentType]
