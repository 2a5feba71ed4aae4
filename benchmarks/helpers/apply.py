"""`gpu_check.py --apply DIR ...`: what runs on GPUs decided is written into kernels/measured.py.

Only values that are faster beyond the noise are written; what the file holds already, and no run settles anew, stays.
A pair of device and Triton version is shown right if every check of its runs is, and struck off if one is not.
"""

import json
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.helpers.decisions import MEASURED, WHAT, Trial, Tried, chosen, held, trials
from benchmarks.helpers.environment import UNKNOWN, commit, source_digest
from benchmarks.helpers.record import CHECKS, TIME_BUDGET, Row
from benchmarks.helpers.resume import RefusedError

ROOT = MEASURED.parents[1]
SOURCES, SHOWN_RIGHT = "SOURCES", "SHOWN_RIGHT"
SHORT = 12  # characters of a commit
SOURCE_FIELDS = ("device", "driver", "torch", "triton", "commit")
AGAIN = "run the same gpu_check command again, which goes on where it ended"


class Result:
    """A folder's environment and rows; RefusedError where they cannot be applied."""

    def __init__(self, folder: Path, expected: Iterable[tuple[str, str, str]]) -> None:
        try:
            content = json.loads((folder / "gpu_check.json").read_text())
        except OSError as error:
            raise RefusedError(f"--apply: {folder} has no gpu_check.json to read ({error.strerror})") from None
        self.rows = [Row(**row) for row in content.pop("rows")]
        self.environment: dict[str, str] = content
        cut = sum(row.reason == TIME_BUDGET for row in self.rows if row.section in CHECKS)
        missing = cut + len({*expected} - {row.key for row in self.rows})
        if content["commit"] == UNKNOWN and content.get("source") == source_digest():
            # measured on a copy without its Git history, of these very files
            content |= commit()
        reason = ""
        if content["device"].startswith("cpu") or content.get("sizes", "full") != "full":
            reason = f"are of {content['device']} at small sizes: run on a GPU"
        elif content["commit"] == UNKNOWN:
            reason = "are of other sources than those here, without a commit: run gpu_check on these"
        elif content["dirty"] != "false":
            reason = "are of uncommitted changes: commit, then run gpu_check"
        elif not _is_ancestor(content["commit"]):
            reason = f"are of commit {content['commit']}, which is not in HEAD: run gpu_check on this commit"
        elif missing or not {*CHECKS} <= {row.section for row in self.rows}:
            reason = f"lack {missing or 'sections of'} checks: {AGAIN}"
        if reason:
            raise RefusedError(f"--apply: the results in {folder} {reason}")

    @property
    def pair(self) -> tuple[str, str]:
        return self.environment["device"], self.environment["triton"]

    @property
    def source(self) -> tuple[str, ...]:
        return tuple(self.environment[name][: SHORT if name == "commit" else None] for name in SOURCE_FIELDS)


def apply(folders: list[Path], expected: Iterable[tuple[str, str, str]], target: Path = MEASURED) -> str:
    """Write the tables, and say what was written. `expected` has the keys of the checks that every run must have."""
    expected = list(expected)
    results = [Result(folder, expected) for folder in folders]
    tables = {name: held()[name].copy() for name in WHAT}
    said = []
    for (table, key), (trial, faster) in sorted(chosen(_pooled(results)).items()):
        if faster and table in tables:
            tables[table][key] = trial.value
            said.append(f"{table}[{key}] = {trial.value}: {1 - trial.ratio:.0%} faster in {len(trial.ratios)} cases")
    right = set(held()[SHOWN_RIGHT])
    right |= {result.pair for result in results}
    for result in results:
        for row in filter(lambda row: row.bad, result.rows):
            right -= {result.pair}
            said.append(f"not shown right: {' '.join(result.pair)}: {row.section}, {row.case}, {row.contender}")
    said += [f"shown right: {device}, Triton {triton}" for device, triton in sorted(right)]
    sources = {*held()[SOURCES], *(result.source for result in results)}
    target.write_text(rendered(target.read_text(), tables | {SOURCES: tuple(sorted(sources)), SHOWN_RIGHT: right}))
    return "\n".join([*said, f"written: {target}; look at the change and commit it"])


def rendered(text: str, values: dict[str, Any]) -> str:
    """The source with other values in the assignments of these names; comments and types stay."""
    lines = text.splitlines()
    # an assignment begins at a name in capitals and ends at an empty line
    blocks = [list(block) for _, block in groupby(lines, lambda line: not line.strip())]
    found = []
    for block in blocks:
        start = next((i for i, line in enumerate(block) if line.split(":")[0] in values), None)
        if start is not None:
            left = block[start].split(" = ")[0]
            block[start:] = _assigned(left, values[left.split(":")[0]])
        found += block
    return "\n".join(found) + "\n"


def _assigned(left: str, value: Any) -> list[str]:
    """`left = value` in lines, as ruff formats it."""
    if isinstance(value, set):
        inner = _listed(sorted(value))
        if not value:
            return [f"{left} = frozenset()"]
        return [f"{left} = frozenset(", "    {", *_deeper(inner), "    }", ")"]
    items = _listed(value)
    opening, closing = "{}" if isinstance(value, dict) else "()"
    return [f"{left} = {opening}", *items, closing] if items else [f"{left} = {opening}{closing}"]


def _listed(value: Any) -> list[str]:
    pairs = (
        [f"{_text(k)}: {_text(v)}" for k, v in sorted(value.items())] if isinstance(value, dict) else map(_text, value)
    )
    return [f"    {pair}," for pair in pairs]


def _text(value: Any) -> str:
    return repr(value).replace("'", '"')


def _deeper(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _pooled(results: list[Result]) -> list[Trial]:
    """The trials of all results; one value on two devices of a target is one trial over the cases of both."""
    found: dict[Tried, list[tuple[float, float]]] = {}
    for result in results:
        for trial in trials(result.environment, result.rows):
            found.setdefault((trial.table, trial.key, trial.value), []).extend(trial.ratios)
    return [Trial(*tried, tuple(ratios)) for tried, ratios in found.items()]


def _is_ancestor(of_results: str) -> bool:
    command = ("git", "-C", str(ROOT), "merge-base", "--is-ancestor", of_results, "HEAD")
    return subprocess.run(command, capture_output=True).returncode == 0
