"""How far a few rows of the gradients are off: rows of dQ of a few heads, keys of dK, dV and the gates of all heads."""

from collections.abc import Callable, Iterable
from functools import reduce

import torch

from .dense_backward import (
    Gradients,
    Operands,
    block_gradients,
    block_roundings,
    block_squares,
    gate_gradients,
    prepared,
)
from .dense_rows import DENSE_KEYS, Expected, rounded, worst_error
from .gates import pad_gate
from .sampled import EDGES, Masks, edges, indices, places

Form = Callable[[Operands, Masks], Gradients]


def backward_error(
    x: Operands,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    masks: Masks,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None],
    max_seqlen_k: int | None,
    found: tuple[torch.Tensor | None, ...],
    log_gate: bool = False,
) -> torch.Tensor:
    """`worst_error` of `backward`'s gradients `found`. Packed keys beyond the longest length named are not counted."""
    packed = cu_seqlens[0] is not None
    grads = [y.transpose(0, 1)[None] if packed else y for y in found[:3] if y is not None]
    rows, keys = (
        _rows(tokens, offsets, x.q.device)
        for tokens, offsets in zip((x.q.shape[3], x.k.shape[2]), cu_seqlens, strict=True)
    )
    counted = torch.ones_like(keys, dtype=torch.bool)
    if max_seqlen_k is not None:
        counted = x.position_k[keys] < max_seqlen_k
    few = x.keys(keys)
    forms = _forms(grads[0].dtype)
    totals = [_sum(form, (prepared(block, torch.float64) for block in few.blocks()), masks) for form in forms]
    errors = [_queries_error(x, rows, masks, grads[0])]
    for i, d_found in zip((1, 2), grads[1:], strict=True):
        expected = _expected([total[i] for total in totals], d_found.dtype, d_found.dtype)
        errors.append(worst_error(d_found[:, :, keys], expected, counted[:, None]))
    errors += _gates_error(totals, gamma_k, gamma_v, found[3:], keys, counted, grads[0].dtype, packed, log_gate)
    return torch.stack(errors).amax()


def _forms(dtype: torch.dtype) -> list[Form]:
    def eager(x: Operands, masks: Masks) -> Gradients:
        return block_gradients(x, masks, eager=dtype)

    return [block_gradients, eager, block_roundings, block_squares]


def _sum(form: Form, blocks: Iterable[Operands], masks: Masks) -> Gradients:
    total = None
    for block in blocks:
        part = form(block, masks)
        # queries differ from block to block, keys do not
        total = part if total is None else Gradients(part.q, *(a + b for a, b in zip(total[1:], part[1:], strict=True)))
    assert total is not None
    return total


def _queries_error(x: Operands, rows: torch.Tensor, masks: Masks, d_q: torch.Tensor) -> torch.Tensor:
    d_q = d_q.unflatten(1, (x.k.shape[1], -1))
    errors = []
    for b, h in places((x.k.shape[0], x.k.shape[1])):
        head = x.head(b, h).queries(rows)
        parts = [head.keys(slice(i, i + DENSE_KEYS)) for i in range(0, x.k.shape[2], DENSE_KEYS)]
        sums = (
            reduce(torch.add, (form(prepared(part, torch.float64), masks).q for part in parts))
            for form in _forms(d_q.dtype)
        )
        mine = d_q[b : b + 1, h : h + 1, :, rows]
        errors.append(
            worst_error(mine, _expected(list(sums), mine.dtype, mine.dtype), torch.ones_like(mine, dtype=torch.bool))
        )
    return torch.stack(errors).amax()


def _gates_error(
    totals: list[Gradients],
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    found: tuple[torch.Tensor | None, ...],
    keys: torch.Tensor,
    counted: torch.Tensor,
    dtype: torch.dtype,
    packed: bool,
    log_gate: bool,
) -> list[torch.Tensor]:
    def of_keys(gate: torch.Tensor | None, neutral: float) -> torch.Tensor | None:
        if gate is None or packed:
            return gate if gate is None else gate[keys]
        return pad_gate(gate, max(gate.shape[-1], 1), neutral)[..., keys.clamp(max=max(gate.shape[-1], 1) - 1)]

    gates = of_keys(gamma_k, float(not log_gate)), of_keys(gamma_v, 1.0)
    results = [gate_gradients(total.log_gamma_k, total.gamma_v, *gates, packed, log_gate) for total in totals]
    errors = []
    for gate, d_gate, *forms in zip((gamma_k, gamma_v), found, *results, strict=True):
        mine = of_keys(d_gate, 0.0)
        if gate is not None and mine is not None:
            there = counted if packed else counted & (keys < gate.shape[-1])
            there = there[:, None] if packed and gate.dim() == 2 else there
            errors.append(worst_error(mine, _expected(forms, mine.dtype, dtype), there))
    return errors


def _expected(forms: list[torch.Tensor], dtype: torch.dtype, operands: torch.dtype) -> Expected:
    """Of gradients in `dtype`, whose `operands` are rounded, by which an eager form may be lucky to lose nothing."""
    exact, eager, roundings, squares = forms
    return Expected(exact, rounded(eager, dtype), roundings + torch.finfo(operands).eps / 2 * squares.sqrt())


def _rows(tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Tokens at the edges of tiles, of the longest sequence where there are several, and the first and the last."""
    if cu_seqlens is None:
        return indices(edges(tokens), device)
    longest = cu_seqlens.diff().argmax()
    first, last = (cu_seqlens.long().index_select(0, (longest + end)[None]) for end in (0, 1))
    of_longest = torch.minimum(first + indices(EDGES, device), last - 1).clamp(0, tokens - 1)
    return torch.cat([of_longest, indices((0, tokens // 2, tokens - 1), device)])
