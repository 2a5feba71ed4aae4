"""Rows that are on disk after each, so that the same command goes on where it ended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.helpers import report
from benchmarks.helpers.resume import RefusedError, difference


class Results:
    """The rows of one dataclass in out/name.csv, .json and .md.

    Args:
        out, name: the folder, and the name of the files.
        row_type: the dataclass.
        key: names of its fields that tell rows apart.
        environment: of this run; rows of another are refused.
        summary: Markdown of all rows.
        anew: rows on disk are replaced.

    Raises:
        RefusedError: the rows on disk were measured elsewhere, or are not of this dataclass.
    """

    def __init__(
        self, out: Path, name: str, row_type: type, key: tuple[str, ...], environment: dict[str, str],
        summary: Callable[[list[Any]], str], anew: bool = False,
    ) -> None:  # fmt: skip
        self.out, self.name, self.key, self.environment, self.summary = out, name, key, environment, summary
        self.rows: list[Any] = []
        file = out / f"{name}.json"
        if file.exists() and not anew:
            content = json.loads(file.read_text())
            rows = content.pop("rows")
            if differs := difference(content, environment):
                raise RefusedError(f"{file} holds results of another run ({differs}): give another --out or --anew")
            try:
                self.rows = [row_type(**row) for row in rows]
            except TypeError as failure:
                raise RefusedError(f"{file} is not what this version writes ({failure}): give --anew") from None

    def known(self, **key: Any) -> bool:
        """Whether there is a row with this key."""
        return any(all(getattr(row, name) == key[name] for name in self.key) for row in self.rows)

    def add(self, row: Any) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        report.write(self.out, self.name, self.environment, self.rows, self.summary(self.rows))
