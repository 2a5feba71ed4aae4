"""What the times of a run decide: the tables of kernels/measured.py. Imports neither torch nor triton.

A contender named "candidate TABLE = VALUE" was timed with that value in that table. Over the cases that both have, its
time is divided by that of what holds now: it is faster only if the mean of its slow runs (p80) over the other's fast
ones (p20) is below 1. A difference within the spread decides nothing.
"""

import ast
import math
import runpy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.helpers.record import Row

CANDIDATE = "candidate "
GATED = "ours, gated, post-exp"
FEW_QUERIES = "ours, gated, few queries"
BORDER = "SHORT_QUERIES"
# what a table's candidates are compared with
AGAINST = {
    "PREFILL": GATED,
    "PAGED": "ours, written",
    BORDER: FEW_QUERIES,
    "BACKWARD": GATED,
}
# tables of two values, each of which is a contender of ours: what it is for True; GATED is the other
SWITCHES = {"LOG_BIAS": "ours, gated, log-bias", "HOPPER": "ours, hopper, gated"}
WHAT = {
    "PREFILL": "tile of prefill (query rows, keys, warps, stages)",
    "PAGED": "tile of the paged kernel (query rows, keys, warps, stages)",
    BORDER: "most queries of a dense call that the paged kernel takes",
    "BACKWARD": "tiles of backward (dQ; dK and dV)",
    "LOG_BIAS": "prefill in the log-bias form, not post-exp",
    "HOPPER": "prefill by the Hopper kernel",
}
Key = tuple[Any, ...]  # (target, head dim), of PAGED (target, head dim, rows)
Tried = tuple[str, Key, Any]
MEASURED = Path(__file__).resolve().parents[2] / "kernels" / "measured.py"


@dataclass(frozen=True)
class Trial:
    """A value in a table, and how its time stands to that of what holds: of the medians, and at its worst, by case."""

    table: str
    key: Key
    value: Any
    ratios: tuple[tuple[float, float], ...]

    @property
    def ratio(self) -> float:
        return _mean(ratio for ratio, _ in self.ratios)

    @property
    def faster(self) -> bool:
        """Beyond the noise."""
        return _mean(at_worst for _, at_worst in self.ratios) < 1


def candidate_name(table: str, value: Any) -> str:
    """The name of the contender that tries a value."""
    return f"{CANDIDATE}{table} = {value!r}"


def paged_rows(rows: int) -> int:
    """The rows under which PAGED has the tile of a call with so many packed ones."""
    return min(max(16, 1 << (rows - 1).bit_length()), 128)


@cache
def held() -> dict[str, Any]:
    """The tables of kernels/measured.py."""
    return {name: value for name, value in runpy.run_path(str(MEASURED)).items() if name.isupper()}


def trials(environment: dict[str, str], rows: "Iterable[Row]") -> list[Trial]:
    """Every value that was tried, and right wherever it was timed."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.section, row.case), {})[row.contender] = row
    found: dict[Tried, list[tuple[float, float]]] = {}
    wrong: set[Tried] = set()
    for group in cases.values():
        for row in group.values():
            tried, against = _tried(row, environment.get("target", ""))
            if tried is None:
                continue
            if row.status in ("wrong", "failed"):
                wrong.add(tried)
            elif against in group and (pair := _ratio(row, group[against])):
                found.setdefault(tried, []).append(pair)
    return [Trial(*tried, tuple(ratios)) for tried, ratios in found.items() if tried not in wrong]


def chosen(tried: "Iterable[Trial]") -> dict[tuple[str, Key], tuple[Trial, bool]]:
    """For each table and key the best trial, and whether it is faster. The paged kernel ends where prefill
    first is."""
    groups: dict[tuple[str, Key], list[Trial]] = {}
    for trial in tried:
        groups.setdefault((trial.table, trial.key), []).append(trial)
    found = {}
    for place, group in groups.items():
        faster = [trial for trial in group if trial.faster]
        least = min(faster or group, key=lambda trial: trial.value if trial.table == BORDER and faster else trial.ratio)
        found[place] = least, bool(faster)
    return found


def decision_table(environment: dict[str, str], rows: "Iterable[Row]") -> str:
    """A Markdown table: what a figure decides, the present rule, the best that was tried, and what follows."""
    found = chosen(trials(environment, rows))
    if not found:
        return ""
    lines = ["| decides | for | now | best tried | its time | cases | so |", "| --- " * 7 + "|"]
    for (table, key), (trial, faster) in sorted(found.items()):
        now = held()[table].get(key, "by rule")
        target, head_dim, *rows = key
        which = f"{target}, D={head_dim}" if head_dim else target
        which += f", {rows[0]} rows" if rows else ""
        so = f"{1 - trial.ratio:.0%} faster" if faster else "nothing: within the spread, or slower"
        time = f"{trial.ratio:.3f} ({min(trial.ratios)[0]:.3f} to {max(trial.ratios)[0]:.3f})"
        lines.append(f"| {WHAT[table]} | {which} | {now} | {trial.value} | {time} | {len(trial.ratios)} | {so} |")
    return "\n".join(lines)


def _tried(row: "Row", target: str) -> tuple[Tried | None, str]:
    """What a row's contender tries, or None, and the contender that it is compared with."""
    key = (target, row.head_dim or 0)
    if row.contender.startswith(CANDIDATE):
        table, _, value = row.contender.removeprefix(CANDIDATE).partition(" = ")
        if table == "PAGED":
            key = (*key, paged_rows((row.queries or 0) * (row.query_heads or 0) // (row.kv_heads or 1)))
        return (table, key, ast.literal_eval(value)), AGAINST[table]
    for table, on in SWITCHES.items() if row.section == "prefill" else ():
        holds = held()[table].get(key, False)
        if row.contender == (GATED if holds else on):
            return (table, key, not holds), on if holds else GATED
    return None, ""


def _ratio(row: "Row", other: "Row") -> tuple[float, float] | None:
    times = (row.ms, other.ms, row.ms_p80, other.ms_p20)
    if None in times:
        return None
    ms, other_ms, slow, fast = (float(x or 0) for x in times)
    return (ms / other_ms, slow / fast) if other_ms > 0 and fast > 0 else None


def _mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))
