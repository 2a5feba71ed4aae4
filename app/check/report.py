"""What `videoanchor check` says of what it found: tables, and a line of verdict."""

from typing import Any

from ..text import printable

Row = dict[str, Any]
"""A check: `name`, `status` ("right", "wrong", "failed", "not compiled"), and by what it is `error` and `allowed`,
`reason`, `milliseconds`, `seconds` ..."""


def failures(report: dict[str, Any]) -> list[Row]:
    """The checks that are not right, but for those of kernels that are off."""
    return [row for row in _rows(report) if row["status"] != "right" and row["name"] not in report["unused"]]


def _rows(report: dict[str, Any]) -> list[Row]:
    return [*report["forms"], *report["times"], report["scores"]]


def verdict(report: dict[str, Any]) -> str:
    """One line."""
    device = "{device} ({name})".format(**report["devices"][0])
    total = len(_rows(report)) - len(report["unused"])
    if bad := failures(report):
        named = "; ".join(f"{row['name']}: {row['status']}" for row in bad)
        return f"NOT right on {device}, {len(bad)} of {total} checks: {named}. Please report it with all of this"
    how = {
        "compiled": "attention runs by the Triton kernels",
        "interpreted": "the kernels ran in Triton's interpreter, which says nothing of a GPU",
        "none": "attention runs by torch's scaled_dot_product_attention",
    }[report["kernels"]]
    return f"Right on {device}, all {total} checks: {how}"


def lines(report: dict[str, Any]) -> list[str]:
    """The checks and the verdict, for people."""
    width = max(len(row["name"]) for row in report["forms"]) + 2
    found = ["attention, beside the dense form in fp64"]
    for row in report["forms"]:
        found.append(f"  {row['name']:{width}s}{row['status']:14s}{_how(row, report['unused'])}")
    found += ["", "times, median in milliseconds"]
    found += [line for row in report["times"] for line in _time_lines(row)]
    found += ["", _score_line(report["scores"]), "", verdict(report)]
    return [printable(line) for line in found]


def _how(row: Row, unused: list[str]) -> str:
    said = row.get("reason") or _error(row)
    if row["status"] == "right":
        return said
    return f"{said}; {'this kernel is off' if row['name'] in unused else instead(row['name'])}"


def instead(name: str) -> str:
    """What to use where a form is not right."""
    if name.startswith("sdpa"):
        return "nothing else stands in for it"
    return f"use backend='{'triton' if name.startswith('hopper') else 'sdpa'}' instead"


def _error(row: Row) -> str:
    return f"{row['what']} off by {row['error']:.1e}, allowed {row['allowed']:.1e}"


def _time_lines(row: Row) -> list[str]:
    if "milliseconds" not in row:
        return [f"  {row['name']:10s}{row['status']}: {row['reason']}"]
    times = ", ".join(f"{name} {value:.3g}" for name, value in row["milliseconds"].items())
    wrong = f"; wrong and not timed: {_error(row)}" if row["status"] != "right" else ""
    return [f"  {row['name']:10s}{times}{wrong}", f"  {'':10s}{row['shape']}"]


def _score_line(row: Row) -> str:
    if "reason" in row:
        return f"{row['name']}: {row['status']}: {row['reason']}"
    certified = "every token certified" if row["certified"] else "NOT every token certified"
    subspaces = "known subspaces found" if row["subspaces_found"] else "known subspaces NOT found"
    gap = f"largest gap {row['largest_gap']:.1e} of {row['tolerance']:g}"
    return f"{row['name']}: {row['seconds']:.2f} s, {certified} ({gap}), {subspaces}"
