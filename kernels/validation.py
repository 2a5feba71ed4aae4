"""Checks of what the public operations are called with. Each error names the argument, what was expected, what came."""

import math
from itertools import accumulate, pairwise

import torch
from torch.autograd.forward_ad import unpack_dual

from .gates import check_gate, check_gate_values, check_key_gate_values

GATE_FORMS = ("log-bias", "post-exp")


def check_options(
    head_dim: int, scale: float | None, causal: bool, window: int | None, softcap: float | None, gate_form: str
) -> float:
    """Check what is no tensor, and return the scale, head_dim ** -0.5 where it is None."""
    if gate_form not in GATE_FORMS:
        raise ValueError(f"gate_form must be one of {GATE_FORMS}, got {gate_form!r}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an int >= 1, got {window!r}")
    if window is not None and not causal:
        raise ValueError("window needs causal=True, got causal=False")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or finite and > 0, got {softcap}")
    return scale


def check_tensors(**tensors: object) -> None:
    """Raise unless all that are not None are tensors on the first one's device."""
    device, (first, *_) = None, tensors
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if device is not None and x.device != device:
            raise ValueError(f"{name} must be on {first}'s device {device}, got {x.device}")
        device = x.device


def check_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    names: tuple[str, str] = ("k", "v"),
    batched: bool = False,
) -> None:
    """Raise unless q, k and v are floating, of one dtype, and of shapes ("B, H, N, D") that fit together.

    `batched` asks for one batch size too.
    """
    dimensions = layout.split(", ")
    for name, x in zip(("q", *names), (q, k, v), strict=True):
        if x.dim() != len(dimensions):
            raise ValueError(f"{name} must have {len(dimensions)} dimensions ({layout}), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape[-1] != q.shape[-1] or (batched and k.shape[0] != q.shape[0]):
        first = q.shape[0] if batched else dimensions[0]
        wanted = ", ".join(map(str, (first, *dimensions[1:-1], q.shape[-1])))
        raise ValueError(f"{names[0]} must have shape ({wanted}) to match q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{names[1]} must have {names[0]}'s shape {tuple(k.shape)}, got {tuple(v.shape)}")
    query_heads, kv_heads = (x.shape[dimensions.index("H")] for x in (q, k))
    if q.shape[-1] == 0 or kv_heads == 0 or query_heads == 0 or query_heads % kv_heads:
        raise ValueError(
            f"q's heads must be a multiple of {names[0]}'s heads and the head dim at least 1, "
            f"got q {tuple(q.shape)} and {names[0]} {tuple(k.shape)}"
        )


def check_gates(
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    gamma_q: torch.Tensor | None,
    q_shape: tuple[int, int, int],
    k_shape: tuple[int, int, int],
    log_gate: bool = False,
) -> None:
    """Raise unless the gates suit (B, Hq, Nq) and (B, Hkv, Nk)."""
    (batch, query_heads, queries), (_, kv_heads, keys) = q_shape, k_shape
    heads = tuple(dict.fromkeys((kv_heads, query_heads)))
    if gamma_k is not None:
        check_gate("log_gamma_k" if log_gate else "gamma_k", gamma_k, batch, heads, keys)
    if gamma_v is not None:
        check_gate("gamma_v", gamma_v, batch, heads, keys)
    if gamma_q is not None:
        check_gate("gamma_q", gamma_q, batch, (query_heads,), queries, exact=True)


def check_packed_gate(name: str, gate: torch.Tensor | None, tokens: int, heads: tuple[int, ...]) -> None:
    """Raise unless a gate is a floating (tokens,) or (tokens, H) tensor, H one of `heads`."""
    if gate is None:
        return
    if not gate.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {gate.dtype}")
    if tuple(gate.shape) not in ((tokens,), *((tokens, of_heads) for of_heads in heads)):
        shapes = " or ".join(f"({tokens}, {of_heads})" for of_heads in dict.fromkeys(heads))
        raise ValueError(f"{name} must have shape ({tokens},) or {shapes}, got {tuple(gate.shape)}")


def transforms() -> list[str]:
    """The torch.func transforms that are active, from the outermost: "Vmap", "Grad", "Jvp", "Functionalize"."""
    if torch.compiler.is_compiling():
        return []
    stack = torch._C._functorch.get_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return [level.key().name for level in stack or []]


def values_are_free(x: torch.Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph or a transform."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms()


def host_values(name: str, *tensors: torch.Tensor) -> list[list[int]]:
    """The values of tensors of one dtype, read in one wait for their device; ValueError where torch.func.vmap runs."""
    try:
        values = torch.cat([x.flatten() for x in tensors]).tolist()
        ends = [*accumulate(x.numel() for x in tensors)]
        return [values[end - x.numel() : end] for x, end in zip(tensors, ends, strict=True)]
    except RuntimeError as error:
        if "Vmap" not in transforms():
            raise
        raise ValueError(
            f"{name} must be the same in all calls of torch.func.vmap for a backend that reads it on the host; use "
            f"backend='triton', or a loop"
        ) from error


def autograd_only(*tensors: torch.Tensor | None) -> str | None:
    """Why operators that autograd alone can differentiate cannot take these tensors, or None where they can."""
    if torch.compiler.is_compiling():
        return None
    if {"Grad", "Jvp"} & {*transforms()}:
        return "torch.func differentiates here, and the kernels have a backward for autograd only"
    if any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
        return "a tensor is dual, and the kernels have no forward-mode derivative"
    return None


def check_values(
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    gamma_q: torch.Tensor | None,
    gate_form: str,
    visible: torch.Tensor | None = None,
    log_gate: bool = False,
) -> None:
    """Raise unless every gate is finite and within what its form takes, except where `visible` (B, N) hides a key."""
    if gamma_k is not None:
        check_key_gate_values(gamma_k.detach(), log_gate, gate_form == "post-exp", visible)
    if gamma_v is not None:
        check_gate_values("gamma_v", gamma_v.detach(), visible)
    if gamma_q is not None:
        check_gate_values("gamma_q", gamma_q.detach(), None)


def check_padding(key_padding_mask: torch.Tensor | None, batch: int, keys: int) -> None:
    """Raise unless the mask is a bool (batch, keys) tensor."""
    if key_padding_mask is None:
        return
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be a bool tensor, got {key_padding_mask.dtype}")
    if tuple(key_padding_mask.shape) != (batch, keys):
        raise ValueError(f"key_padding_mask must have shape ({batch}, {keys}), got {tuple(key_padding_mask.shape)}")


def check_offsets(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Raise unless the offsets are int32 (B + 1,) for one B, and the longest lengths ints >= 0."""
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {offsets.dtype}")
        if offsets.dim() != 1 or offsets.numel() == 0:
            raise ValueError(f"{name} must have shape (B + 1,), got {tuple(offsets.shape)}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's length {cu_seqlens_q.numel()}, got {cu_seqlens_k.numel()}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt):
            raise TypeError(f"{name} must be an int, got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"{name} must be at least 0, got {longest}")


def check_offset_values(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, tokens: tuple[int, int], longest: tuple[int, int]
) -> list[list[int]]:
    """Both offsets as lists; raise unless they run from 0 to `tokens` by steps of at least 0 and at most `longest`."""
    found = host_values("cu_seqlens_q and cu_seqlens_k", cu_seqlens_q, cu_seqlens_k)
    for name, marks, end, most in zip("qk", found, tokens, longest, strict=True):
        steps = [last - first for first, last in pairwise(marks)]
        if marks[0] != 0 or marks[-1] != end or min(steps, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{name} must not decrease and run from 0 to the {end} packed tokens, got {marks}"
            )
        if max(steps, default=0) > most:
            raise ValueError(f"max_seqlen_{name} must be at least the longest sequence, {max(steps)}, got {most}")
    return found


def check_cache(q: torch.Tensor, k_cache: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor | None) -> int:
    """Raise unless lengths, block table and cache suit q (B, Hq, Nq, D); returns how many keys a sequence can have."""
    batch, _, queries, _ = q.shape
    if queries < 1:
        raise ValueError(f"q must have at least 1 query, got {queries}")
    if lengths.dtype != torch.int32:
        raise TypeError(f"cache_seqlens must be an int32 tensor, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"cache_seqlens must have shape ({batch},), got {tuple(lengths.shape)}")
    if table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(
                f"k_cache must have q's batch {batch}, got {k_cache.shape[0]}; a paged cache needs a block_table"
            )
        return k_cache.shape[2]
    if table.dtype != torch.int32:
        raise TypeError(f"block_table must be an int32 tensor, got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(f"block_table must have shape ({batch}, max_pages), got {tuple(table.shape)}")
    if k_cache.shape[2] < 1:
        raise ValueError(f"the page size, k_cache.shape[2], must be at least 1, got {k_cache.shape[2]}")
    return table.shape[1] * k_cache.shape[2]


def check_cache_values(
    lengths: torch.Tensor, capacity: int, table: torch.Tensor | None, pages: int, page_size: int
) -> list[int]:
    """The lengths as a list; raise unless every one fits the cache and every page that a sequence uses exists."""
    if table is None:
        (known,), rows = host_values("cache_seqlens", lengths), None
    else:
        known, *rows = host_values("cache_seqlens and block_table", lengths, *table)
    for b, length in enumerate(known):
        if not 0 <= length <= capacity:
            raise ValueError(f"cache_seqlens must be within 0 and the cache's {capacity} keys, got {length} at {b}")
        used = [] if rows is None else rows[b][: -(-length // page_size)]
        if not all(0 <= page < pages for page in used):
            raise ValueError(
                f"block_table must name pages within 0 and {pages - 1} up to each sequence's length {length}, "
                f"got {used} at {b}"
            )
    return known
