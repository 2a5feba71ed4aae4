"""How often a call may make the host wait for the card, and copy from memory that is not pinned: one table.

Only what lines of the package ask for counts, not the caller's own, nor that of transformers.
"""

from collections import Counter
from typing import NamedTuple

from .device import EmulatedCuda

AREAS = ("kernels/", "anchor/", "integrations/", "app/")


class Budget(NamedTuple):
    reads: int
    uploads: int


BUDGETS: dict[str, Budget] = {
    "prefill, triton": Budget(reads=0, uploads=0),
    "prefill, sdpa": Budget(reads=0, uploads=0),
    "decode, triton": Budget(reads=0, uploads=0),
    "decode, sdpa": Budget(reads=0, uploads=0),
    "cache, triton": Budget(reads=0, uploads=0),
    "cache, sdpa": Budget(reads=1, uploads=0),
    "pages, triton": Budget(reads=0, uploads=0),
    "pages, sdpa": Budget(reads=1, uploads=0),
    "paged, triton": Budget(reads=0, uploads=0),
    "paged, sdpa": Budget(reads=1, uploads=0),
    "plan": Budget(reads=0, uploads=0),
    "write, triton": Budget(reads=0, uploads=0),
    "write, sdpa": Budget(reads=1, uploads=0),
    "varlen, triton": Budget(reads=0, uploads=0),
    "varlen, sdpa": Budget(reads=1, uploads=0),
    "backward, triton": Budget(reads=0, uploads=0),
    "backward, sdpa": Budget(reads=0, uploads=0),
    "packed backward, triton": Budget(reads=0, uploads=0),
    "packed backward, sdpa": Budget(reads=1, uploads=0),
    "merge": Budget(reads=0, uploads=0),
    # of the torch form, two sweeps of 48 tokens, half of which keep all atoms; the kernels ask for less
    "scores": Budget(reads=185, uploads=45),
    "features": Budget(reads=16, uploads=1),
    "spectral step": Budget(reads=20, uploads=4),
    # generate() with a scorer that is a function: the solver's own reads are apart
    "generate: prompt, two rows": Budget(reads=9, uploads=0),
    "generate: prompt, two rows of two beams": Budget(reads=11, uploads=0),
    "generate: prompt, one padded row": Budget(reads=4, uploads=0),
    "generate: prompt in chunks, two rows": Budget(reads=10, uploads=0),
    "generate: decoding step": Budget(reads=0, uploads=0),
}


def of_the_package(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """What lines of the package asked for."""
    return Counter({key: count for key, count in counts.items() if key[1].startswith(AREAS)})


def assert_within(card: EmulatedCuda, name: str) -> None:
    """Fail, with the lines that asked, where more was read or uploaded since `card.reset()` than the table allows."""
    for kind, counts, allowed in zip(Budget._fields, (card.reads, card.uploads), BUDGETS[name], strict=True):
        ours = of_the_package(counts)
        lines = "\n".join(f"  {count} {what}  {line}" for (what, line), count in ours.most_common())
        assert ours.total() <= allowed, f"{name}: {ours.total()} {kind}, {allowed} allowed\n{lines}"
