"""Paged caches in torch's own operations: writing slots, and attention of one sequence at a time over gathered pages.

What the Triton kernels are compared with, and what answers where they cannot. Lengths, slots and block tables are read
on the host: each call waits for the device, and no CUDA graph can hold it.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from .gate_pages import GatePages
from .gates import post_exp_bounds
from .validation_paged import TOPS, check_batch_values, per_token, value_scale

LOG2E = math.log2(math.e)
LEAST_SCALE = 2.0**-126
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]


def _put(pages: torch.Tensor, page: torch.Tensor, row: torch.Tensor, x: torch.Tensor) -> None:
    """(P, H, page, ...) gets (T, H or 1, ...) at the slots."""
    if pages.dtype in TOPS:  # torch has no index_put of 8-bit floats
        pages, x = pages.view(torch.uint8), x.view(torch.uint8)
    pages[page, :, row] = x


def take_pages(pages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """pages[index] along the first dimension."""
    if pages.dtype in TOPS:
        return pages.view(torch.uint8).index_select(0, index).view(pages.dtype)
    return pages.index_select(0, index)


def _gate(gate: torch.Tensor | None, token: torch.Tensor, neutral: float) -> torch.Tensor:
    """(T, H or 1) fp32 of the tokens."""
    if gate is None:
        return torch.full((token.shape[0], 1), neutral, device=token.device)
    gate = gate[token].float()
    return gate[:, None] if gate.dim() == 1 else gate


def _stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as a cache of `dtype` holds them, a quantised one within its largest number."""
    if dtype not in TOPS:
        return x.to(dtype)
    x = x.clamp(-TOPS[dtype], TOPS[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype)


def write_slots(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    gate_pages: GatePages | None,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    log_gate: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Keys, values (T, Hkv, D) and gates (T,) or (T, H) of a step into the slots (T,) of pages (P, Hkv, page, D)."""
    pages, _, size, _ = k_pages.shape
    token = ((slot_mapping >= 0) & (slot_mapping < pages * size)).nonzero()[:, 0]
    slot = slot_mapping[token].long()
    page, row = slot // size, slot % size
    k, v = k[token], v[token]
    gain = torch.ones(1, device=k.device)
    gate = None
    if gate_pages is not None:
        written = gate_pages.form == "written"
        gain = _gate(gamma_v, token, 1.0)
        gain = gain.masked_fill(~gain.isfinite(), float("nan"))
        if written:
            gate = _gate(gamma_k, token, 0.0 if log_gate else 1.0)
            low, high = post_exp_bounds(log_gate)
            held = (gate >= low) & (gate <= high)
            gate = (gate.exp() if log_gate else gate).masked_fill(~held, float("nan")) + 0 * gain
            v = v.to(torch.promote_types(v.dtype, torch.float32)) * (gate * gain)[..., None]
        else:
            gate = _gate(gamma_k, token, 0.0 if log_gate else 1.0)
            gate = gate * LOG2E if log_gate else gate.log2()
            gate = gate.masked_fill(gate == float("inf"), float("nan"))
    top = TOPS.get(k_pages.dtype)
    if top is not None:
        assert k_scale is not None
        assert v_scale is not None
        k, v = k.float(), v.float()
        if per_token(k_scale):
            of_rows = [(x.abs().amax(-1) / top).clamp(min=LEAST_SCALE) + (0 * x).sum(-1) for x in (k, v)]
            for scale, of_row in zip((k_scale, v_scale), of_rows, strict=True):
                _put(scale, page, row, of_row)
            k, v = (x / of_row[..., None] for x, of_row in zip((k, v), of_rows, strict=True))
            gain = gain * of_rows[1]
        else:
            k, v = k / k_scale.reshape(()), v / v_scale.reshape(())
    _put(k_pages, page, row, _stored(k, k_pages.dtype))
    _put(v_pages, page, row, _stored(v, v_pages.dtype))
    if gate_pages is not None and gate is not None:
        if gate_pages.form == "apart":
            gate = torch.stack(torch.broadcast_tensors(gate, gain), -1)
        _put(gate_pages.values, page, row, gate)


def key_and_value_gates(gate_pages: GatePages, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log gamma_k, and what the cache's values are to be multiplied with, of gates (...[, 2]) out of the pages."""
    if gate_pages.form == "written":
        return values.log(), 1 / values
    return values[..., 0] * math.log(2), values[..., 1]


def paged_by_sequence(
    attend: Attend,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    gate_pages: GatePages | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    precise: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed queries over the used part of each sequence's pages, which alone is read.

    Args:
        attend: (q (1, Hq, Nq, D), k, v (1, Hkv, Nk, D), log gamma_k, gamma_v (1, Hkv, Nk)) -> out (1, Hq, Nq, D), lse
            (1, Hq, Nq). Nq and Nk may be 0.
        q: (Tq, Hq, D).
        k_pages, v_pages: (P, Hkv, page, D).
        cu_seqlens_q, seqlens_k, block_table: (B + 1,), (B,), (B, max_pages) integers.
        max_seqlen_q: at least the longest sequence of queries.
        gate_pages, k_scale, v_scale, sinks: as in `anchored_attention_paged`.
        precise: what gated or quantised keys and values are computed in.

    Returns:
        out (Tq, Hq, D) in q's dtype and lse (Tq, Hq) fp32; rows of no sequence are 0 and -inf.

    Raises:
        ValueError: as `check_batch_values`.
    """
    pages, _, size, _ = k_pages.shape
    offsets, lengths = check_batch_values(cu_seqlens_q, seqlens_k, block_table, q.shape[0], max_seqlen_q, pages, size)
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    plain = gate_pages is None and k_scale is None and sinks is None
    for (first, last), length, table in zip(pairwise(offsets), lengths, block_table, strict=True):
        index = table[: -(-length // size)].long()

        def gathered(x: torch.Tensor, index: torch.Tensor = index, length: int = length) -> torch.Tensor:
            # (pages, H, page, ...) -> (1, H, length, ...)
            x = take_pages(x, index)
            return (x if plain else x.to(precise)).transpose(0, 1).flatten(1, 2)[None, :, :length]

        def scale_of(scale: torch.Tensor, gathered: Callable[..., torch.Tensor] = gathered) -> torch.Tensor:
            return gathered(scale)[..., None] if per_token(scale) else scale.reshape(()).to(precise)

        k, v = gathered(k_pages), gathered(v_pages)
        log_gamma_k = gamma_v = None
        if k_scale is not None:
            k = k * scale_of(k_scale)
        if (of_values := value_scale(gate_pages, v_scale)) is not None:
            v = v * scale_of(of_values)
        if gate_pages is not None:
            gates = key_and_value_gates(gate_pages, gathered(gate_pages.values))
            log_gamma_k, gamma_v = (gate.expand(-1, k.shape[1], -1) for gate in gates)
        rows = q[first:last].transpose(0, 1)[None]
        of_rows, of_lse = attend(rows if plain else rows.to(precise), k, v, log_gamma_k, gamma_v)
        if sinks is not None:
            with_sink = torch.logaddexp(of_lse.to(precise), sinks.to(precise)[:, None])
            shift = with_sink.masked_fill(with_sink == float("-inf"), 0)
            of_rows = of_rows * (of_lse - shift).exp()[..., None]
            of_lse = with_sink
        out[first:last] = of_rows[0].transpose(0, 1)
        lse[first:last] = of_lse[0].T
    return out, lse
