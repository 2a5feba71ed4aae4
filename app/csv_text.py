"""CSV whose text a spreadsheet shows and does not run."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_OPENINGS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def csv_cell(value: Any) -> Any:
    """`value` as a cell: text that a spreadsheet would take for a formula gets a quote before it (OWASP, "CSV
    Injection"). Numbers stay, also those written as text; `text_of_cell` is the way back."""
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def text_of_cell(cell: str) -> str:
    """The text that `csv_cell` was given."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; what a row lacks is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(csv_cell, columns))
    writer.writerows([csv_cell(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def _is_formula(text: str) -> bool:
    bare = text.lstrip("'")  # a text with quotes of its own gets one more, so that it comes back whole
    return bare.startswith(_OPENINGS) and not _NUMBER.fullmatch(bare)
