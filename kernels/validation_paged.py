"""Checks of what calls over a paged cache are given. Each error names the argument, what was expected, what came."""

import os
from itertools import pairwise

import torch

from .gate_pages import GatePages, check_form
from .gates import check_gate_values, check_key_gate_values, post_exp_bounds
from .validation import host_values, values_are_free

# the largest number of a quantised cache's dtype
TOPS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
DEBUG = "VIDEOANCHOR_DEBUG"


def values_are_wanted(x: torch.Tensor) -> bool:
    """Whether values are to be looked at: on the CPU, and with VIDEOANCHOR_DEBUG=1 wherever no graph is made."""
    setting = os.environ.get(DEBUG, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"the environment variable {DEBUG} must be 0 or 1, got {setting!r}")
    if setting != "1" or torch.compiler.is_compiling():
        return values_are_free(x)
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise unless x is a floating (tokens, heads, D)."""
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have shape (tokens, heads, D), got {tuple(x.shape)}")
    if not x.is_floating_point() or x.dtype in TOPS:
        raise TypeError(f"{name} must be a floating tensor of 16 bits or more, got {x.dtype}")


def check_pages(name: str, x: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Raise unless pages (P, Hkv, page, D) are of x's head dim, and of its dtype or quantised, K and V alike."""
    if k_pages.dim() != 4 or 0 in k_pages.shape or k_pages.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"k_pages must have shape (P, Hkv, page, {x.shape[-1]}) to match {name}, got {tuple(k_pages.shape)}"
        )
    if k_pages.dtype != x.dtype and k_pages.dtype not in TOPS:
        raise TypeError(f"k_pages must have {name}'s dtype {x.dtype}, float8_e4m3fn or int8, got {k_pages.dtype}")
    if v_pages.dtype != k_pages.dtype:
        raise TypeError(f"v_pages must have k_pages' dtype {k_pages.dtype}, got {v_pages.dtype}")
    if v_pages.shape != k_pages.shape or v_pages.stride() != k_pages.stride():
        raise ValueError(
            f"v_pages must have k_pages' shape {tuple(k_pages.shape)} and strides {k_pages.stride()}, "
            f"got {tuple(v_pages.shape)} and {v_pages.stride()}"
        )


def check_scales(k_pages: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """Raise unless both scales are there exactly where the cache is quantised: one element, or (P, Hkv, page)."""
    of_slots = tuple(k_pages.shape[:3])
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_pages.dtype not in TOPS:
            if scale is not None:
                raise ValueError(f"{name} must be None for a cache of {k_pages.dtype}, which is not quantised")
            continue
        if scale is None:
            raise ValueError(f"{name} must be given for a cache of {k_pages.dtype}, got None")
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} must be a float32 tensor, got {scale.dtype}")
        if tuple(scale.shape) != of_slots and (scale.numel() != 1 or scale.dim() > 1):
            raise ValueError(f"{name} must have one element or shape {of_slots}, got {tuple(scale.shape)}")
    if k_scale is not None and v_scale is not None and per_token(k_scale) != per_token(v_scale):
        raise ValueError(
            f"v_scale must have k_scale's shape {tuple(k_scale.shape)}, got {tuple(v_scale.shape)}: both are of the "
            f"tensor, or both of tokens and heads"
        )


def per_token(scale: torch.Tensor | None) -> bool:
    """Whether a scale of quantised pages is one a slot and head, not one of the tensor."""
    return scale is not None and scale.dim() == 3


def value_scale(gate_pages: GatePages | None, v_scale: torch.Tensor | None) -> torch.Tensor | None:
    """The scale that values are to be multiplied with: None where there is none, or the gates of slots hold it."""
    held = gate_pages is not None and gate_pages.form == "apart" and per_token(v_scale)
    return None if held else v_scale


def check_gate_pages(gate_pages: object, k_pages: torch.Tensor, v_scale: torch.Tensor | None) -> None:
    """Raise unless the gates are None, or GatePages of the cache's blocks, slots, heads and device."""
    if gate_pages is None:
        return
    if not isinstance(gate_pages, GatePages):
        raise TypeError(f"gate_pages must be GatePages, got {type(gate_pages).__name__}")
    values, form = gate_pages
    check_form(form)
    pages, kv_heads, page_size, _ = k_pages.shape
    if not isinstance(values, torch.Tensor) or values.dtype != torch.float32:
        found = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"gate_pages.values must be a float32 tensor, got {found}")
    if values.device != k_pages.device:
        raise ValueError(f"gate_pages must be on the cache's device {k_pages.device}, got {values.device}")
    pair = (2,) if form == "apart" else ()
    shapes = [(pages, heads, page_size, *pair) for heads in dict.fromkeys((kv_heads, 1))]
    if tuple(values.shape) not in shapes:
        raise ValueError(
            f"gate_pages of the form {form!r} must have values of shape {' or '.join(map(str, shapes))} for this "
            f"cache, got {tuple(values.shape)}"
        )
    first = 0 if torch.compiler.is_compiling() else values.storage_offset()
    if pair and (values.stride(-1) != 1 or any(offset % 2 for offset in (first, *values.stride()[:-1]))):
        raise ValueError(
            f"gate_pages' pairs must lie together at even offsets, got strides {values.stride()} from {first} on"
        )
    if pair and per_token(v_scale) and values.shape[1] != kv_heads:
        raise ValueError(
            f"gate_pages must have the cache's {kv_heads} heads where values are quantised token by token, got 1: a "
            f"slot holds gamma_v times the head's scale"
        )


def check_batch(
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: object,
) -> None:
    """Raise unless offsets (B + 1,), lengths (B,) and block table (B, pages of a sequence) are int32, of one B."""
    given = {"cu_seqlens_q": cu_seqlens_q, "seqlens_k": seqlens_k, "block_table": block_table}
    for name, x in given.items():
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {x.dtype}")
    if seqlens_k.dim() != 1:
        raise ValueError(f"seqlens_k must have shape (B,), got {tuple(seqlens_k.shape)}")
    batch = seqlens_k.shape[0]
    if tuple(cu_seqlens_q.shape) != (batch + 1,):
        raise ValueError(
            f"cu_seqlens_q must have shape ({batch + 1},) to match seqlens_k, got {tuple(cu_seqlens_q.shape)}"
        )
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] == 0:
        raise ValueError(f"block_table must have shape ({batch}, max_pages >= 1), got {tuple(block_table.shape)}")
    if isinstance(max_seqlen_q, bool) or not isinstance(max_seqlen_q, int | torch.SymInt):
        raise TypeError(f"max_seqlen_q must be an int, got {type(max_seqlen_q).__name__}")
    if max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q must be at least 0, got {max_seqlen_q}")


def check_heads(q: torch.Tensor, k_pages: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor | None) -> None:
    """Raise unless q's heads share the cache's, sinks are one a query head, and out is as q."""
    query_heads, kv_heads = q.shape[1], k_pages.shape[1]
    if query_heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k_pages' {kv_heads} heads, got {query_heads}")
    if sinks is not None:
        if not sinks.is_floating_point():
            raise TypeError(f"sinks must be a floating tensor, got {sinks.dtype}")
        if tuple(sinks.shape) != (query_heads,):
            raise ValueError(f"sinks must have shape ({query_heads},), got {tuple(sinks.shape)}")
    if out is not None:
        if out.dtype != q.dtype:
            raise TypeError(f"out must have q's dtype {q.dtype}, got {out.dtype}")
        if out.shape != q.shape or out.stride(-1) != 1:
            raise ValueError(
                f"out must have q's shape {tuple(q.shape)} and contiguous rows, got {tuple(out.shape)} with strides "
                f"{out.stride()}"
            )


def check_batch_values(
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    tokens: int,
    max_seqlen_q: int,
    pages: int,
    page_size: int,
) -> tuple[list[int], list[int]]:
    """Offsets of the queries and lengths of the keys as lists; raise unless they fit, and the pages they use exist."""
    offsets, lengths, *table = host_values(
        "cu_seqlens_q, seqlens_k and block_table", cu_seqlens_q, seqlens_k, *block_table
    )
    if offsets[0] != 0 or offsets[-1] > tokens or any(last < first for first, last in pairwise(offsets)):
        raise ValueError(f"cu_seqlens_q must not decrease from 0 to at most q's {tokens} tokens, got {offsets}")
    longest = max((last - first for first, last in pairwise(offsets)), default=0)
    if longest > max_seqlen_q:
        raise ValueError(f"max_seqlen_q must be at least the longest sequence, {longest}, got {max_seqlen_q}")
    capacity = block_table.shape[1] * page_size
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(f"seqlens_k must be within 0 and the block table's {capacity} keys, got {length} at {b}")
        used = table[b][: -(-length // page_size)]
        if not all(0 <= page < pages for page in used):
            raise ValueError(
                f"block_table must name pages within 0 and {pages - 1} up to each sequence's length {length}, "
                f"got {used} at {b}"
            )
    return offsets, lengths


def check_slots(slot_mapping: torch.Tensor, tokens: int) -> None:
    """Raise unless there is one integer a token."""
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slot_mapping must be an int32 or int64 tensor, got {slot_mapping.dtype}")
    if tuple(slot_mapping.shape) != (tokens,):
        raise ValueError(f"slot_mapping must have shape ({tokens},), got {tuple(slot_mapping.shape)}")


def check_gammas(
    gate_pages: GatePages | None,
    tokens: int,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    log_gamma_k: torch.Tensor | None,
) -> None:
    """Raise unless gates are (T,) or (T, heads of the gate pages), and there are pages that they go to."""
    for name, gate in (("gamma_k", gamma_k), ("gamma_v", gamma_v), ("log_gamma_k", log_gamma_k)):
        if gate is None:
            continue
        if gate_pages is None:
            raise ValueError(f"{name} must be None without gate_pages, which it is kept in")
        if not gate.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {gate.dtype}")
        heads = gate_pages.values.shape[1]
        if tuple(gate.shape) not in ((tokens,), (tokens, heads)):
            raise ValueError(
                f"{name} must have shape ({tokens},) or ({tokens}, {heads}), the heads of gate_pages, "
                f"got {tuple(gate.shape)}"
            )


def check_written_values(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    gate_pages: GatePages | None,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    log_gate: bool,
) -> None:
    """Raise unless every slot exists, and the gates and the numbers of tokens that have one can be kept in it."""
    slots = k_pages.shape[0] * k_pages.shape[2]
    kept = slot_mapping >= 0
    if (slot_mapping >= slots).any():
        raise ValueError(f"slot_mapping must be below the cache's {slots} slots, got {int(slot_mapping.max())}")
    if k_pages.dtype == torch.int8:
        for name, x in (("k", k), ("v", v)):
            if not x.detach()[kept].isfinite().all():
                raise ValueError(f"{name} must be finite for a cache of int8, which holds neither NaN nor infinity")
    if gate_pages is None:
        return
    if gamma_v is not None:
        check_gate_values("gamma_v", gamma_v.detach()[kept], None)
    if gamma_k is None:
        return
    gate, name = gamma_k.detach()[kept], "log_gamma_k" if log_gate else "gamma_k"
    if gate_pages.form == "apart":
        check_key_gate_values(gate, log_gate, False, None)
        return
    low, high = post_exp_bounds(log_gate)
    wrong = ~((gate >= low) & (gate <= high))
    if wrong.any():
        raise ValueError(
            f"{name} must be of a gamma_k within 2**-20 and 2**20 for gate_pages of the form 'written' ('apart' takes "
            f"others), got {float(gate[wrong][0])}"
        )
