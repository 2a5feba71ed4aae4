"""Tile sizes by target, head dim and element size. A table: nothing autotunes.

What a GPU has settled (measured.py) goes before the tables here.
"""

from collections.abc import Set
from typing import NamedTuple, TypeVar

import torch

from . import measured

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
INTERPRETER = "interpreter"
FEW_QUERIES = 16
SHORT_QUERIES = 512
E4M3_TARGETS = ("sm_89", "sm_90", "sm_100", "sm_120", INTERPRETER)  # whose products take float8_e4m3fn caches
NARROW = ("sm_86", "sm_89", "sm_120")
TMA_TARGETS = ("sm_90", "sm_100", "sm_120")
Row = TypeVar("Row")


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, stages of the load pipeline.

    specialized: prefill's loads, products and softmax go to warps of their own (sm_100).
    """

    queries: int
    keys: int
    warps: int
    stages: int
    specialized: bool = False


# 16-bit elements, by the largest head dim that the row serves
AMPERE = {16: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)}
HOPPER = {128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)}
CDNA = {128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)}
PREFILL = {
    "sm_80": AMPERE | {128: Tile(128, 64, 8, 3)},
    "sm_86": AMPERE,
    "sm_89": AMPERE,
    "sm_90": HOPPER | {16: Tile(64, 128, 4, 2)},
    "sm_100": HOPPER,
    "sm_120": {96: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    "gfx942": CDNA,
    INTERPRETER: {256: Tile(32, 32, 4, 1)},
}
# for 16-bit variants that spill with the tiles above: target, features, head dims, tile; the first row that fits serves
PREFILL_SMALLER: tuple[tuple[str, Set[str], tuple[int, ...], Tile], ...] = (
    ("sm_80", {"window"}, (128,), Tile(128, 32, 8, 2)),
    ("sm_86", {"padded", "window", "softcap"}, (128,), Tile(128, 32, 8, 2)),
    ("sm_89", {"padded", "window", "softcap"}, (128,), Tile(128, 32, 8, 2)),
    ("sm_90", {"varlen"}, (256,), Tile(64, 64, 8, 2)),
    ("sm_100", {"padded"}, (16, 32, 64, 80, 96, 128), Tile(128, 64, 8, 2)),
    ("sm_100", {"window"}, (80, 96), Tile(128, 64, 8, 3)),
    ("sm_100", {"varlen", "window", "softcap"}, (128,), Tile(128, 64, 8, 3)),
)
# fp32 products run outside the tensor cores, unrolled: larger tiles spill
PREFILL_FP32 = {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 8, 1)}
# the paged kernel, by the largest head dim and number of packed rows; keys of a tile at least 32 times its warps, or
# Triton 3.6.0 loads each gate several times
PAGED_WIDE = {
    128: {16: Tile(16, 128, 4, 3), 32: Tile(32, 128, 4, 3), 64: Tile(64, 128, 4, 3), 128: Tile(128, 64, 8, 3)},
    256: {16: Tile(16, 64, 2, 3), 32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2)},
}
PAGED_NARROW = {
    128: {16: Tile(16, 64, 2, 3), 32: Tile(32, 64, 2, 3), 64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 3)},
    256: {16: Tile(16, 32, 1, 3), 32: Tile(32, 32, 2, 3), 64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2)},
}
PAGED = {
    "sm_80": PAGED_WIDE,
    "sm_86": PAGED_NARROW,
    "sm_89": PAGED_NARROW,
    "sm_90": PAGED_WIDE,
    "sm_100": PAGED_WIDE,
    "sm_120": PAGED_NARROW,
    "gfx942": {256: {16: Tile(16, 64, 2, 1), 32: Tile(32, 64, 4, 1), 128: Tile(64, 32, 4, 1)}},
    INTERPRETER: {256: {16: Tile(16, 32, 4, 1), 128: Tile(64, 32, 4, 1)}},
}
PAGED_FP32 = {64: {128: Tile(16, 32, 4, 2)}, 128: {128: Tile(16, 32, 4, 1)}, 256: {128: Tile(16, 16, 4, 1)}}

# backward, 16-bit elements: the tiles of dQ, and of dK and dV
BACKWARD_AMPERE = {
    64: (Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
}
BACKWARD_ADA = BACKWARD_AMPERE | {256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))}
BACKWARD_HOPPER = {
    64: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: (Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
    256: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
}
BACKWARD = {
    "sm_80": BACKWARD_AMPERE,
    "sm_86": BACKWARD_ADA,
    "sm_89": BACKWARD_ADA,
    "sm_90": BACKWARD_HOPPER,
    "sm_100": BACKWARD_HOPPER,
    "sm_120": {
        64: (Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "gfx942": {
        64: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
        128: (Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
        256: (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
    },
    INTERPRETER: {256: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))},
}
BACKWARD_FP32 = {256: (Tile(16, 16, 4, 2), Tile(16, 16, 8, 1))}
BACKWARD_FP32_CDNA = {256: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 1))}


def split_head_dim(target: str, head_dim: int) -> tuple[int, int]:
    """Two powers of two that add up to `head_dim` (the second may be 0), so that no matrix product is padded."""
    if head_dim == 128 and target in ("sm_80", "sm_86", "sm_89"):
        return 64, 64  # fewer registers: the whole spills on sm_80
    return {80: (64, 16), 96: (64, 32)}.get(head_dim, (head_dim, 0))


def _row(table: dict[int, Row], size: int) -> Row:
    return table[min(known for known in table if known >= size)]


def prefill_tile(
    target: str,
    head_dim: int,
    element_size: int,
    *,
    padded: bool = False,
    varlen: bool = False,
    window: bool = False,
    softcap: bool = False,
) -> Tile:
    """The tile of prefill for a target of `PREFILL`, and for what the call has."""
    call = {"padded": padded, "varlen": varlen, "window": window, "softcap": softcap}
    features = {name for name, asked in call.items() if asked}
    if element_size < 4:
        if not features and (target, head_dim) in measured.PREFILL:
            return Tile(*measured.PREFILL[target, head_dim])
        for heavy_target, heavy, head_dims, tile in PREFILL_SMALLER:
            if target == heavy_target and head_dim in head_dims and features >= heavy:
                return tile
    return _row(PREFILL[target] if _tabled(target, element_size) else PREFILL_FP32, head_dim)


def paged_tile(target: str, head_dim: int, element_size: int, rows: int) -> Tile:
    """The tile of the paged kernel where the longest query has `rows` packed rows (queries times heads of a group)."""
    rows = min(max(16, 1 << (rows - 1).bit_length()), 128)
    if element_size < 4 and (target, head_dim, rows) in measured.PAGED:
        return Tile(*measured.PAGED[target, head_dim, rows])
    return _row(_row(PAGED[target] if _tabled(target, element_size) else PAGED_FP32, head_dim), rows)


def backward_tiles(target: str, head_dim: int, element_size: int) -> tuple[Tile, Tile]:
    """The tiles of backward's dQ kernel, and of its dK and dV kernel."""
    if element_size < 4 and (target, head_dim) in measured.BACKWARD:
        of_queries, of_keys = measured.BACKWARD[target, head_dim]
        return Tile(*of_queries), Tile(*of_keys)
    fp32 = BACKWARD_FP32_CDNA if target == "gfx942" else BACKWARD_FP32
    return _row(BACKWARD[target] if _tabled(target, element_size) else fp32, head_dim)


def short_queries(target: str, head_dim: int) -> int:
    """The most queries of a dense call that go to the paged kernel where its keys are many times as many."""
    return measured.SHORT_QUERIES.get((target, head_dim), FEW_QUERIES if target == INTERPRETER else SHORT_QUERIES)


def takes_few_queries(target: str, head_dim: int, queries: int, keys: int) -> bool:
    """Whether a dense call goes to the paged kernel, which splits the keys and packs the heads of a group."""
    return queries <= FEW_QUERIES or (queries <= short_queries(target, head_dim) and keys >= 4 * queries)


def paged_programs(target: str, device: torch.device, tile: Tile) -> int:
    """Programs of the paged kernel: as many as stand on the device at once."""
    return multiprocessors(device) * (2 if tile.queries * tile.keys <= 1024 and target in NARROW else 1)


def _tabled(target: str, element_size: int) -> bool:
    return target == INTERPRETER or element_size < 4


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 for the interpreter, so that small problems split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
