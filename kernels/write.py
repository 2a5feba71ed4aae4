"""The launch that writes keys, values and gates of a step into a paged cache."""

from typing import Any

import torch
import triton

from .gate_pages import GatePages
from .operands import Rows, rows_of
from .validation_paged import TOPS, per_token
from .write_kernel import Gammas, Tokens, write_kernel

# elements of a tile
TILE = 2048


def _gammas(gamma_k: torch.Tensor | None, gamma_v: torch.Tensor | None) -> Gammas:
    strides = []
    for gate in (gamma_k, gamma_v):
        shared = gate is not None and (gate.dim() == 1 or gate.shape[1] == 1)
        strides += [0, 0] if gate is None else [gate.stride(0), 0 if shared else gate.stride(1)]
    return Gammas(gamma_k, gamma_v, *strides)


def _gate_rows(gate: GatePages | None) -> Rows | None:
    if gate is None:
        return None
    values = gate.values
    return Rows(values, values.stride(0), values.stride(1) if values.shape[1] > 1 else 0, values.stride(2))


def _scale_rows(scale: torch.Tensor | None) -> Rows | None:
    return None if scale is None else Rows(scale, *(scale.stride() if per_token(scale) else (0, 0, 0)))


def write_arguments(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    gate: GatePages | None,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    log_gate: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> dict[str, Any]:
    """What `write_kernel` is launched with, and compiled ahead of time with. Rows of k, v and the pages contiguous."""
    tokens, kv_heads, head_dim = k.shape
    pages, _, page, _ = k_pages.shape
    columns = triton.next_power_of_2(head_dim)
    return {
        "tokens": Tokens(k, v, *k.stride()[:2], *v.stride()[:2]),
        "k_pages": rows_of(k_pages),
        "v_pages": rows_of(v_pages),
        "slots": slot_mapping,
        "gammas": _gammas(gamma_k, gamma_v),
        "gate": _gate_rows(gate),
        "k_scale": _scale_rows(k_scale),
        "v_scale": _scale_rows(v_scale),
        "T": tokens,
        "n_slots": pages * page,
        "Hkv": kv_heads,
        "D": head_dim,
        "BD": columns,
        "BT": max(1, TILE // columns),
        "PAGE": page,
        "WRITTEN": gate is not None and gate.form == "written",
        "LOG": log_gate,
        "PER_TOKEN": per_token(k_scale),
        "TOP": TOPS.get(k_pages.dtype, 0.0),
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    gate: GatePages | None,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    log_gate: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Launch `write_kernel`: k, v (T, Hkv, D) into the slots (T,) of pages (P, Hkv, page, D), gates (T,) or (T, H)."""
    given = write_arguments(k, v, k_pages, v_pages, slot_mapping, gate, gamma_k, gamma_v, log_gate, k_scale, v_scale)
    write_kernel[(triton.cdiv(k.shape[0], given["BT"]) * k.shape[1],)](**given)
