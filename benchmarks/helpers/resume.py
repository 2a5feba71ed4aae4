"""What an earlier call of gpu_check.py with the same --out left behind."""

import json
from pathlib import Path
from typing import Any

from benchmarks.helpers.record import COMPILE, FAILED, TIME_BUDGET, Row


class Refused(Exception):
    """The run cannot begin or go on; the text says why."""


def earlier(out: Path, retry: bool) -> tuple[dict[str, Any], list[Row]]:
    """The environment and the rows that stand; without results of an earlier call, nothing.

    What the time budget left out is run now, and with `retry` what failed. Kernels are compiled anew wherever tasks are
    left: another machine has none of them.
    """
    results = out / "gpu_check.json"
    if not results.exists():
        return {}, []
    try:
        content = json.loads(results.read_text())
        rows = [Row(**row) for row in content.pop("rows")]
    except (ValueError, TypeError, KeyError) as failure:
        raise Refused(f"{results} is not what this version writes ({failure}): give another --out or --anew") from None
    again = (FAILED,) if retry else ()
    return content, [r for r in rows if r.section != COMPILE and r.reason != TIME_BUDGET and r.status not in again]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two environments, or nothing."""
    names = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} {before.get(name)} there, {now[name]} here" for name in names)
