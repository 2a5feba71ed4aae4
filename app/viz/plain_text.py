"""Names in pictures, as they are."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import fill


def wrapped(text: str, width: int) -> str:
    """Its lines, each broken where it is longer."""
    return "\n".join(fill(line, width) for line in text.split("\n"))


@contextmanager
def plain_text() -> Iterator[None]:
    """Within it, or in a function that has it as decorator, no text of a figure is taken for math or TeX, and a letter
    that the font lacks is a box, without a warning."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
