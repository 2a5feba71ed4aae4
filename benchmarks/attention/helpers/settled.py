"""What kernels/measured.py can hold: its tables, the values that are tried beside the present ones, and how to try one.

A value is tried by putting it into its table while a contender runs, which is how it acts once it is written there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from videoanchor_triton.kernels import measured
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.tiles import INTERPRETER, Tile, backward_tiles, paged_tile, prefill_tile, short_queries

Key = tuple[Any, ...]  # (target, head dim), of PAGED (target, head dim, rows)
HALF = 2  # bytes of an element that the tables serve
# query rows, keys, warps, stages, specialised; by target and head dim; all compile without a spill, with Triton 3.7.1,
# but for the post-exp form with specialised warps, which stays where it is slower
PREFILL: dict[Key, list[tuple[int, ...]]] = {
    ("sm_80", 128): [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 32, 8, 3)],
    ("sm_90", 128): [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3)],
    ("sm_100", 128): [(128, 128, 8, 2), (128, 128, 8, 2, True), (128, 64, 8, 3)],
    ("sm_90", 64): [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2)],
    (INTERPRETER, 16): [(16, 32, 4, 1)],
}
# those of the paged kernel; with 16 rows of 128 keys and 4 warps a gate costs least, and 64 rows are tried beside 128
PAGED: dict[Key, list[tuple[int, ...]]] = {
    ("sm_80", 128, 16): [(16, 128, 4, 2), (16, 128, 4, 3), (16, 64, 2, 3)],
    ("sm_80", 128, 128): [(64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
    ("sm_90", 128, 16): [(16, 128, 4, 2), (16, 128, 4, 3), (16, 64, 2, 4)],
    ("sm_90", 128, 128): [(64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3)],
    (INTERPRETER, 16, 16): [(16, 64, 4, 1)],
    (INTERPRETER, 16, 64): [(32, 32, 4, 1)],
}
# of dQ, and of dK and dV
BACKWARD: dict[Key, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    ("sm_80", 128): ([(64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 3)], [(32, 128, 8, 3)]),
    ("sm_90", 128): ([(128, 64, 8, 3), (64, 64, 4, 2)], [(32, 128, 8, 2), (64, 64, 8, 2)]),
    (INTERPRETER, 16): ([(16, 32, 4, 1)], [(32, 16, 4, 1)]),
}


def key_of(device: torch.device, head_dim: int) -> Key:
    """The tables' key for a device that the kernels run on."""
    target, reason = triton_target(device)
    if target is None:
        raise RuntimeError(f"the Triton kernels cannot run here: {reason}")
    return target, head_dim


@contextmanager
def entry(table: str, key: Key, value: Any) -> Iterator[None]:
    """`value` stands under `key` in a table of kernels/measured.py meanwhile."""
    entries = getattr(measured, table)
    before = dict(entries)
    entries[key] = value
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)


def present(table: str, key: Key) -> Any:
    """What holds under a key now, by the table or by the rule that consults it."""
    target, head_dim, *rows = key
    if table == "PREFILL":
        return _written(prefill_tile(target, head_dim, HALF))
    if table == "PAGED":
        return _written(paged_tile(target, head_dim, HALF, *rows))
    if table == "BACKWARD":
        return tuple(map(_written, backward_tiles(target, head_dim, HALF)))
    if table == "SHORT_QUERIES":
        return short_queries(target, head_dim)
    return getattr(measured, table).get(key, False)


def _written(tile: Tile) -> tuple[int, ...]:
    """As a table has it: the last field only where it is set."""
    return tuple(tile if tile.specialized else tile[:4])


def values(table: str, key: Key) -> list[Any]:
    """What is tried under a key, the present value left out; of backward's two tiles one is changed at a time."""
    now = present(table, key)
    if table == "BACKWARD":
        of_queries, of_keys = BACKWARD.get(key, ([], []))
        tried: list[Any] = [(tile, now[1]) for tile in of_queries] + [(now[0], tile) for tile in of_keys]
    else:
        tried = {"PREFILL": PREFILL, "PAGED": PAGED}[table].get(key, [])
    return [value for value in tried if value != now]
