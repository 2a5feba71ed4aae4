"""Names in pictures, as they are."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_text() -> Iterator[None]:
    """Within it, or in a function that has it as decorator, no text of a figure is taken for math or TeX, and a letter
    that the font lacks is a box, without a warning."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
