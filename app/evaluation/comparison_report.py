"""A comparison of two results, for people: on a terminal and as Markdown."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..text import shown
from .page import short_names
from .paired import interval_text
from .report import beginning, markdown_line, markdown_text

COLUMNS = ("questions", "n", "videos", "A", "B", "B - A", "95% interval", "could show", "McNemar p", "")
_FLIPS_IN_MARKDOWN, _FLIPS_ON_TERMINAL = 200, 5


def cells(record: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, as text under `COLUMNS`; scores in percent where they are shares."""
    scale, digits = (100, 1) if record["percent"] else (1, 4)

    def number(value: float | None, sign: str = "") -> str:
        return "?" if value is None else f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"

    return [
        [
            *(row["type"], str(row["n"]), str(row["n_videos"]), number(row["a"]), number(row["b"])),
            number(row["difference"], "+"),
            interval_text(number(row["low"], "+"), number(row["high"], "+"), row["n_videos"]),
            number(row["detectable"]),
            "" if row["mcnemar"] is None else f"{row['mcnemar']['p']:.2g}",
            row["verdict"],
        ]
        for row in record["table"]
    ]


def side_line(side: dict[str, Any]) -> str:
    """Where a side is from: harness, setting, model."""
    card = side["card"]
    setting = "" if side["setting"] is None else f", setting {side['setting']}"
    model = f", {card['model']}" if card.get("model") else ""
    return f"{side['source']} ({side['harness']}{setting}{model})"


def counts_lines(record: dict[str, Any]) -> list[str]:
    """What was left out, and what could not be read."""
    lines = []
    if left := record["n_questions"] - record["n_compared"]:
        failed = " and ".join(f"{record[side]['n_failed']} in {side.upper()}" for side in "ab")
        lines.append(f"{left} of {record['n_questions']} questions are left out: without a score are {failed}")
    if record["unreadable"]:
        read = " and ".join(f"{record[side]['n_unreadable']} of {side.upper()}" for side in "ab")
        lines.append(f"replies from which no answer could be read, which count as wrong: {read}")
    first = record["table"][0]["mcnemar"]
    if first is not None:
        lines.append(f"questions that are right in A only: {first['only_first']}, in B only: {first['only_second']}")
    return lines


def differing(entries: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each entry of "flags" or "others"."""
    return [f"{one['what']}: {shown(one['a'])} in A, {shown(one['b'])} in B" for one in entries]


def comparison_text(record: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"A  {side_line(record['a'])}", f"B  {side_line(record['b'])}", ""]
    lines += _aligned([list(COLUMNS), *cells(record)])
    lines += ["", *counts_lines(record)]
    for title, entries in (
        ("THE PROTOCOLS DIFFER, and the difference may be due to it:", differing(record["flags"])),
        ("warnings:", record["warnings"]),
        ("also different:", differing(record["others"])),
        ("not checked:", record["unchecked"]),
    ):
        lines += ["", title, *(f"  {entry}" for entry in entries)] if entries else []
    if flips := record["flipped"]:
        lines += ["", f"questions with another score: {len(flips)}"]
        names = short_names([flip["video"] for flip in flips])
        for flip in flips[:_FLIPS_ON_TERMINAL]:
            a, b = ((flip[side]["score"], beginning(flip[side]["reply"] or "(no text)", 40)) for side in "ab")
            lines.append(f"  {flip['id']}  {names[flip['video']]}: A {a[0]:g} {a[1]} | B {b[0]:g} {b[1]}")
        if more := len(flips) - _FLIPS_ON_TERMINAL:
            lines += [f"  and {more} more: see --out"] if more > 0 else []
    return "\n".join(re.sub(r"[\r\n\t]", " ", line) for line in [*lines, "", record["conclusion"]])


def comparison_markdown(record: dict[str, Any]) -> str:
    """For a file: the same with the note, both cards and the first of the questions that flipped."""
    lines = [f"**{markdown_text(record['conclusion'])}**", "", "| | |", "|:--|:--|"]
    lines += [markdown_line([side.upper(), side_line(record[side])]) for side in "ab"]
    lines += ["", *_table(COLUMNS, ":--", cells(record)), ""]
    lines += [f"- {markdown_text(line)}" for line in counts_lines(record)]
    for title, entries in (
        ("The protocols differ, and the difference may be due to it", differing(record["flags"])),
        ("Warnings", record["warnings"]),
        ("Also different", differing(record["others"])),
        ("Not checked", record["unchecked"]),
    ):
        lines += ["", f"**{title}**", "", *(f"- {markdown_text(entry)}" for entry in entries)] if entries else []
    if flips := record["flipped"]:
        some, names = flips[:_FLIPS_IN_MARKDOWN], short_names([flip["video"] for flip in flips])
        said = "" if len(some) == len(flips) else f", the first {len(some)} of them here and all in compare.json"
        lines += ["", f"**Questions with another score: {len(flips)}{said}**", ""]
        header = ("id", "video", "question", "answer", "A", "reply of A", "B", "reply of B")
        rows = [
            [
                *(flip["id"], names[flip["video"]], shown(flip["question"]), shown(flip["answer"])),
                *(part for side in "ab" for part in (f"{flip[side]['score']:g}", shown(flip[side]["reply"]))),
            ]
            for flip in some
        ]
        lines += _table(header, ":--", rows)
    for side in "ab":
        card = record[side]["card"]
        lines += ["", f"**Card of {side.upper()}**", ""]
        lines += _table(("", ""), ":--", card_rows(card)) if card else ["None: nothing says how it was made."]
    return "\n".join([*lines, "", record["note"], ""])


def card_rows(card: dict[str, Any]) -> list[list[str]]:
    """A card as rows of a table, a row an entry."""
    return [[name, shown(value)] for name, value in card.items()]


def _table(header: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    return [markdown_line(header), f"|{'|'.join(alignment for _ in header)}|", *map(markdown_line, rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    lines = []
    for row in rows:
        padded = [
            cell.ljust(width) if n in (0, last) else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
