"""A measured row, and the files that the rows are written to. Imports neither torch nor triton."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.helpers.decisions import CANDIDATE, decision_table

OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "skipped"
TIME_BUDGET = "time budget"
CHECKS = ("sanity", "model", "correctness")  # sections whose every row is a check of ours
COMPILE = "compile"  # the section of rows that hold how long a step of compilation took
WRITTEN = "ours, written"  # mixed batches with gates in the cache that it reads
ENGINES = ("flash-attn", "vLLM", "FlexAttention", "SDPA")
SILENT, ENDED = "no answer within", "the process ended"  # how a reason begins where a task took its process with it


@dataclass(frozen=True)
class Row:
    """One measurement of one contender.

    Times are milliseconds; `rate` is TFLOP/s or TB/s as `unit` says, of the work an ideal kernel does; `share` is rate
    over the ceiling measured in the same run. A row that is not "ok" has a reason and no time.
    """

    section: str
    case: str
    contender: str
    batch: int | None = None
    query_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool | None = None
    queries: int | None = None
    keys: int | None = None
    status: str = SKIPPED
    error: float | None = None
    allowed: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    peak_extra_mib: float | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.section, self.case, self.contender

    @property
    def died(self) -> bool:
        """Whether the task hung or took its process with it."""
        return self.status == FAILED and self.reason.startswith((SILENT, ENDED))

    @property
    def ours(self) -> bool:
        return self.section in CHECKS or self.contender.startswith("ours")

    @property
    def bad(self) -> bool:
        """Whether the row makes the run fail: ours and not right, or a correctness check that the budget cut off."""
        cut = self.section in CHECKS and self.reason == TIME_BUDGET
        return self.ours and (self.status in (WRONG, FAILED) or cut)

    def line(self) -> str:
        """The row for a terminal."""
        parts = [f"{self.status:7} {self.section:11} {self.case} | {self.contender}"]
        if self.ms is not None:
            parts.append(f"{self.ms:.3f} ms")
        if self.rate is not None:
            parts.append(f"{self.rate:.2f} {self.unit}")
        if self.share is not None:
            parts.append(f"{self.share:.0%}")
        return "  ".join([*parts, self.reason])


@dataclass(frozen=True)
class Headline:
    """An aim, and the case that is furthest from it."""

    name: str
    aim: str
    value: float
    case: str
    met: bool


def headlines(rows: Iterable[Row]) -> list[Headline]:
    """The worst case of each aim over the timed rows. Ours is the fastest of our kernels in the case."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.ms is not None and row.section in ("prefill", "mixed", "decode", "scores"):
            cases.setdefault((row.section, row.case), []).append(row)
    found: list[Headline] = []

    def aim(name: str, text: str, limit: float, at_most: bool, value: Callable[[list[Row]], float | None]) -> None:
        values = [(x, " ".join(key)) for key, group in cases.items() if (x := value(group)) is not None]
        if values:
            worst, case = max(values) if at_most else min(values)
            found.append(Headline(name, text, worst, case, worst <= limit if at_most else worst >= limit))

    def fastest(group: list[Row], start: str, gated: bool | None = None) -> float | None:
        chosen = [row for row in group if row.contender.startswith(start)]
        if gated is not None:
            chosen = [row for row in chosen if row.contender.endswith("ungated") != gated]
        return min((row.ms for row in chosen if row.ms is not None), default=None)

    def ratio(section: str, start: str, gated: bool, least: int = 0) -> Callable[[list[Row]], float | None]:
        def value(group: list[Row]) -> float | None:
            if group[0].section != section or (group[0].keys or 0) < least:
                return None
            theirs, mine = fastest(group, start, gated), fastest(group, "ours", True)
            return None if theirs is None or mine is None else theirs / mine

        return value

    def gate_cost(group: list[Row]) -> float | None:
        speed_up = ratio("prefill", "ours", False, 8192)(group)
        return None if speed_up is None else 1 / speed_up

    def best_of_ours(group: list[Row], pick: Callable[[Row], float | None]) -> float | None:
        values = [pick(row) for row in group if row.contender.startswith("ours") and "ungated" not in row.contender]
        return max((x for x in values if x is not None), default=None)

    def rate(group: list[Row]) -> float | None:
        row = group[0]
        wanted = row.section == "prefill" and not row.causal and row.head_dim == 128 and (row.keys or 0) >= 8192
        return best_of_ours(group, lambda row: row.rate) if wanted else None

    def extra_memory(group: list[Row]) -> float | None:
        row = group[0]
        heads = (row.query_heads or 0) + 2 * (row.kv_heads or 0)
        inputs = 2 * heads * (row.head_dim or 0) * (row.keys or 0) / 2**20
        if row.section != "prefill" or not inputs:
            return None
        extra = best_of_ours(group, lambda row: row.peak_extra_mib)
        return None if extra is None else extra / inputs

    def share(group: list[Row]) -> float | None:
        wanted = group[0].section == "decode" and (group[0].keys or 0) >= 32768
        return best_of_ours(group, lambda row: row.share) if wanted else None

    def written(group: list[Row], others: tuple[str, ...]) -> float | None:
        """The fastest of others in a mixed batch over ours with written gates."""
        mine = fastest([row for row in group if row.contender == WRITTEN], "ours")
        theirs = [x for name in others if (x := fastest(group, name)) is not None]
        return min(theirs) / mine if group[0].section == "mixed" and mine is not None and theirs else None

    def slot_gate_cost(group: list[Row]) -> float | None:
        ungated = written(group, ("ours, ungated",))
        return None if ungated is None else 1 / ungated

    def scored(tokens: int, pick: Callable[[Row], float | None]) -> Callable[[list[Row]], float | None]:
        return lambda group: next(
            (pick(r) for r in group if (r.section, r.keys, r.contender) == ("scores", tokens, "ours, total")), None
        )

    aim("prefill N >= 8k, gated / ungated time", "<= 1.02", 1.02, True, gate_cost)
    aim(
        "prefill N >= 8k, cuDNN ungated time / ours gated",
        ">= 1",
        1,
        False,
        ratio("prefill", "SDPA cuDNN", False, 8192),
    )
    aim("prefill N >= 8k, D=128, not causal, TFLOP/s gated", ">= 600", 600, False, rate)
    aim("prefill, FlexAttention gated time / ours gated", ">= 1.3", 1.3, False, ratio("prefill", "FlexAttention", True))
    aim("prefill, SDPA dense mask time / ours gated", ">= 5", 5, False, ratio("prefill", "SDPA dense", True))
    aim("prefill, peak extra memory of ours gated / bytes of q, k, v", "<= 1", 1, True, extra_memory)
    aim("mixed batches, gated / ungated time", "<= 1.05", 1.05, True, slot_gate_cost)
    aim("mixed batches, fastest of theirs ungated / ours gated", ">= 1", 1, False, lambda g: written(g, ENGINES))
    aim("decode keys >= 32k, share of the copy bandwidth", ">= 0.85", 0.85, False, share)
    for tokens, limit in ((2048, 25), (16384, 250), (65536, 2500)):
        aim(f"scores of {tokens} tokens, ms", f"<= {limit}", limit, True, scored(tokens, lambda row: row.ms))
    aim("scores of 65536 tokens, peak MiB", "<= 16384", 16384, True, scored(65536, lambda row: row.peak_extra_mib))
    return found


def headline_table(rows: Iterable[Row]) -> str:
    """The headlines as a Markdown table, or a sentence where nothing was timed."""
    found = headlines(rows)
    if not found:
        return "Nothing was timed."
    lines = ["| furthest from the aim | aim | value | case | met |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {x.name} | {x.aim} | {x.value:.3g} | {x.case} | {'yes' if x.met else 'no'} |" for x in found]
    return "\n".join(lines)


def write(out: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """Write gpu_check.json, gpu_check.csv and summary.md with all rows so far."""
    out.mkdir(parents=True, exist_ok=True)
    content = environment | {"rows": [asdict(row) for row in rows]}
    table = io.StringIO()
    writer = csv.DictWriter(table, [*environment, *(field.name for field in fields(Row))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(environment | asdict(row) for row in rows)
    texts = {"gpu_check.json": json.dumps(content, indent=1) + "\n", "gpu_check.csv": table.getvalue()}
    for name, text in (texts | {"summary.md": summary(environment, rows)}).items():
        # whole or not at all, whenever the run is interrupted
        new = out / f"{name}.new"
        try:
            new.write_text(text)
            new.replace(out / name)
        finally:
            new.unlink(missing_ok=True)


def summary(environment: dict[str, str], rows: list[Row]) -> str:
    """Markdown: the headlines, a table of rates for each section, what was not right, and what was not run."""
    parts = ["# GPU check", ", ".join(f"{name} {value}" for name, value in environment.items()), headline_table(rows)]
    for section in CHECKS:
        if checks := [row for row in rows if row.section == section]:
            passed = sum(row.status == OK for row in checks)
            parts.append(f"{section.capitalize()}: {passed} of {len(checks)} checks passed.")
    for row in rows:
        if row.section == "ceiling" and row.rate is not None:
            parts.append(f"Ceiling, {row.case}: {row.rate:.2f} {row.unit}.")
    for section in ("mixed", "prefill", "decode", "backward", "scores"):
        timed = [row for row in rows if row.section == section and row.ms is not None]
        timed = [row for row in timed if not row.contender.startswith(CANDIDATE)]
        if timed:
            in_ms = section in ("mixed", "scores")
            unit = "ms" if section == "scores" else f"{'ms' if in_ms else timed[0].unit} (share of the ceiling)"
            parts.append(f"## {section}\n\n{unit}\n\n{_pivot(timed, in_ms)}")
    if settled := decision_table(environment, rows):
        parts.append(f"## What this decides\n\n{settled}")
    for status in (WRONG, FAILED, SKIPPED):
        lines = [f"- {row.section}, {row.case}, {row.contender}: {row.reason}" for row in rows if row.status == status]
        if lines:
            parts.append(f"## {status}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _pivot(rows: list[Row], in_ms: bool) -> str:
    contenders = list(dict.fromkeys(row.contender for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        share = "" if row.share is None else f" ({row.share:.0%})"
        cells.setdefault(row.case, {})[row.contender] = (
            f"{row.ms if in_ms or row.rate is None else row.rate:.3g}{share}"
        )
    lines = [f"| case | {' | '.join(contenders)} |", "| --- " * (len(contenders) + 1) + "|"]
    for case, found in cells.items():
        lines.append(f"| {case} | {' | '.join(found.get(name, '') for name in contenders)} |")
    return "\n".join(lines)
