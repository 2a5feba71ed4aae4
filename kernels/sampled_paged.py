"""Which rows of a call over a paged cache the self-check looks at, and how far they are off (see `sampled`)."""

import torch

from .dense_rows import Expected, Rows, dense_rows, worst_error
from .gate_pages import GatePages
from .operands import Masks
from .pages import key_and_value_gates, take_pages
from .sampled import EDGES, indices, places, seen_from
from .validation_paged import per_token, value_scale


def paged_error(
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
    out: torch.Tensor,
    lse: torch.Tensor | None,
    masks: Masks,
) -> torch.Tensor:
    """`worst_error` of attention over pages. What lies beyond the table or the longest length named is not counted.

    An lse of None is not looked at.
    """
    query_heads, kv_heads, size = q.shape[1], *k_pages.shape[1:3]
    starts, lengths, keys = cu_seqlens_q.long(), cu_seqlens_q.diff().long(), seqlens_k.long()
    if lengths.shape[0] == 0:
        return torch.full((), -1.0, device=q.device)
    capacity = block_table.shape[1] * size
    key = torch.arange(capacity, device=q.device)
    errors = []
    for b, h in places((lengths.shape[0], query_heads), keys.argmax()):
        kv = h * kv_heads // query_heads
        entry = indices([b], q.device)
        length, n = lengths.index_select(0, entry), keys.index_select(0, entry)
        # rows beyond the sequence are its last one
        row = torch.minimum(indices([*EDGES, length[0] // 2, length[0] - 1], q.device), length - 1)
        counted = (row >= 0) & (row < max_seqlen_q) & (n >= 0) & (n <= capacity)
        rows = (starts.index_select(0, entry) + row).clamp(0, q.shape[0] - 1)
        present = key < n
        # entries past a sequence's length may be anything
        pages = block_table.index_select(0, entry)[0].long().masked_fill(~present[::size], 0)

        def gathered(x: torch.Tensor, pages: torch.Tensor = pages, kv: int = kv) -> torch.Tensor:
            # (P, H, page, ...) -> (capacity, ...)
            return take_pages(x[:, kv if x.shape[1] > 1 else 0], pages).flatten(0, 1)

        def scaled(x: torch.Tensor, scale: torch.Tensor | None, gathered=gathered) -> torch.Tensor:
            if scale is None:
                return gathered(x)
            return gathered(x).float() * (gathered(scale)[:, None] if per_token(scale) else scale.reshape(()))

        k, v = scaled(k_pages, k_scale), scaled(v_pages, value_scale(gate_pages, v_scale))
        gate_k = gate_v = None
        if gate_pages is not None:
            gate_k, gate_v = key_and_value_gates(gate_pages, gathered(gate_pages.values).double())
        visible = seen_from(row + n - length, key, present, masks.causal, masks.window)
        chosen = Rows(q[rows, h], k, v, gate_k, gate_v, present, visible)
        of_out, of_lse = dense_rows(chosen, masks.scale, masks.softcap)
        if sinks is not None:
            of_out, of_lse = _with_sink(of_out, of_lse, sinks[h].double())
        errors.append(worst_error(out[rows, h], of_out, counted[:, None]))
        if lse is not None:  # which alone says nothing of the output
            of_lse_alone = worst_error(lse[rows, h], of_lse, counted)
            errors.append(torch.where(of_lse_alone > 1, of_lse_alone, -1.0))
    return torch.stack(errors).amax()


def _with_sink(of_out: Expected, of_lse: Expected, sink: torch.Tensor) -> tuple[Expected, Expected]:
    """What one more logit without a value makes of out (R, D) and lse (R,)."""
    exact, eager = (torch.logaddexp(x, sink) for x in (of_lse.exact, of_lse.eager))
    share = (of_lse.exact - exact.masked_fill(exact == float("-inf"), 0)).exp()[:, None]
    return Expected(*(x * share for x in of_out)), of_lse._replace(exact=exact, eager=eager)
