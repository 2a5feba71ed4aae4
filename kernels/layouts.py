"""What every operator does with its tensors before and after a launch: layouts, results, the name of a variant."""

from collections.abc import Hashable

import torch

from .dispatch import triton_target
from .operands import Masks
from .self_check import Variant

MAX_ROW_STRIDE = 2**23
Outputs = tuple[torch.Tensor, torch.Tensor]


def outputs(q: torch.Tensor) -> Outputs:
    batch, heads, queries, head_dim = q.shape
    # the layout in which a model's output projection reads the heads
    out = q.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def packed_outputs(q: torch.Tensor) -> Outputs:
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32).T


def has_rows(x: torch.Tensor) -> bool:
    """Whether rows are contiguous, and near enough to one another that a tile's offsets fit in 32 bits."""
    return x.stride(-1) == 1 and (x.stride(-2) < MAX_ROW_STRIDE or x.shape[-2] == 1)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x if has_rows(x) else x.contiguous()


def cache_rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """A cache as it stands: raise where `rows` would copy all of it in every step."""
    if not has_rows(x):
        raise ValueError(
            f"{name} must have contiguous rows less than {MAX_ROW_STRIDE} elements apart, got strides {x.stride()}: "
            f"lay the cache out so, or use backend='sdpa'"
        )
    return x


def packed_rows(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as one batch entry (1, H, T, D) with rows as `rows` makes them."""
    return rows(x.transpose(0, 1))[None]


def gate_rows(gate: torch.Tensor | None) -> torch.Tensor | None:
    """A gate, a mask or a block table whose last dimension is contiguous, copied only where it is not."""
    return gate if gate is None or gate.stride(-1) == 1 else gate.contiguous()


def packed_gate(gate: torch.Tensor | None) -> torch.Tensor | None:
    """(T,), or (T, Hkv) as (1, Hkv, T)."""
    return gate if gate is None or gate.dim() == 1 else gate.T[None]


def launch_target(q: torch.Tensor) -> str:
    target, reason = triton_target(q.device)
    if target is None:
        raise RuntimeError(f"the Triton kernels cannot run here: {reason}")
    return target


def variant_of(
    kernel: str,
    q: torch.Tensor,
    gates: tuple[torch.Tensor | None, torch.Tensor | None],
    masks: Masks,
    *rest: Hashable,
) -> Variant:
    """What Triton compiles anew for, and tiles are chosen by."""
    gamma_k, gamma_v = gates
    return (
        kernel,
        q.device,
        q.dtype,
        f"D{q.shape[-1]}",
        None if gamma_k is None else (gamma_k.dtype, gamma_k.dim()),
        None if gamma_v is None else (gamma_v.dtype, gamma_v.dim()),
        masks.causal,
        masks.window is not None,
        masks.softcap is not None,
        *rest,
    )


def fill(results: Outputs, answers: Outputs) -> None:
    for result, answer in zip(results, answers, strict=True):
        result.copy_(answer)
