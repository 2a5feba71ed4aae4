"""What kernels take in one piece: tensors with their strides, and what a call asks for. Triton takes NamedTuples as
kernel arguments and passes each field as an argument of its own.

A field that is an int is specialised by Triton on being 1 and on being a multiple of 16: what changes with a length
comes beside them, as an argument in the kernel's `do_not_specialize`.
"""

import math
from typing import NamedTuple

import torch

LOG2E = math.log2(math.e)


class Masks(NamedTuple):
    """What hides keys from queries, and the scale of the logits."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None


class Rows(NamedTuple):
    """(B, H, N, D), packed rows (T, H, D) as one batch entry: strides of batch, head and row, contiguous elements."""

    ptr: torch.Tensor
    b: int
    h: int
    n: int


class Logits(NamedTuple):
    """What becomes of a product q.k: scale and softcap (None: none), both times log2 e, for a logit in base 2."""

    scale: float
    cap: float | None


def logits_of(masks: Masks) -> Logits:
    """What a kernel takes of a call's scale and softcap."""
    return Logits(masks.scale * LOG2E, None if masks.softcap is None else masks.softcap * LOG2E)


def rows_of(x: torch.Tensor) -> Rows:
    """Of (B, H, N, D), or of packed (T, H, D)."""
    return Rows(x, *x.stride()[:3]) if x.dim() == 4 else Rows(x, 0, x.stride(1), x.stride(0))


class PositionGate(NamedTuple):
    """Gates by position in the sequence, neutral beyond N': log gamma_k and gamma_v, (B, Hkv or Hq, N') fp32 or None.

    Any strides: one of 0 where heads or sequences share a gate, slices of larger buffers.
    """

    log_gamma_k: torch.Tensor | None
    gamma_v: torch.Tensor | None


class Offsets(NamedTuple):
    """Where packed sequences begin and end: (sequences + 1,) int32 of queries and of keys."""

    q: torch.Tensor
    k: torch.Tensor


class Cache(NamedTuple):
    """Pages (P, Hkv, page, D), or (B, Hkv, N, D), of keys and values, and their strides; `of_v` None: those of keys."""

    k: torch.Tensor
    v: torch.Tensor
    p: int
    h: int
    n: int
    of_v: tuple[int, int, int] | None


class Slots(NamedTuple):
    """Numbers by slot, (P, heads or 1, page): fp32, or pairs of fp32 seen as one int64. h is 0 where heads share."""

    ptr: torch.Tensor
    p: int
    h: int
    n: int


class Lengths(NamedTuple):
    """What is known of a batch on the device only.

    keys: (B,) int32, None where all have the cache's N. table: (B, n) int32 with rows `row` apart, None without pages.
    seen: (B, N) uint8 with rows `seen_row` apart, 0 hides a key, or None. Both distances are `odd` of them.
    """

    keys: torch.Tensor | None
    table: torch.Tensor | None
    row: int
    seen: torch.Tensor | None
    seen_row: int


class Scales(NamedTuple):
    """Of a quantised cache: pointers to one fp32 for a tensor, or `Slots` by token and head (v None: gates hold it)."""

    k: torch.Tensor | Slots
    v: torch.Tensor | Slots | None


class Parts(NamedTuple):
    """Partial results of cut items: (2 P, BM, D) and (2 P, BM) fp32, lse to base 2."""

    out: torch.Tensor
    lse: torch.Tensor


class Sizes(NamedTuple):
    """Numbers of sequences, and of keys that one may have; `odd` of each (prescale_kernel.py)."""

    sequences: int
    keys: int


class Shares(NamedTuple):
    """Planned heads: `group` query heads each, and `kv` of them share a head of the cache."""

    group: int
    kv: int
