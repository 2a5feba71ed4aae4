"""compare.html: two results of the same questions on one page."""

from collections.abc import Mapping
from typing import Any

from ..pages.html import bullets, escape, folded, number_cell, page, paragraph, section, table, text_cell, warning
from .comparison_report import COLUMNS, cells, counts_lines, differing, side_line
from .page import flips, interval_cell, listed, reach_of, videos_table
from .protocol import SECTIONS
from .thumbnails import OnPage


def comparison_page(record: dict[str, Any]) -> str:
    """
    Args:
        record: of `head_to_head`, with "date" and "version".

    Returns:
        HTML.
    """
    scale = 100 if record["percent"] else 1
    failures = [(one["id"], one["side"], one["error"]) for one in record["failures"]]
    unreadable = [(one["id"], one["side"], one["reply"]) for one in record["unreadable"]]
    note, header = paragraph(record["note"], "quiet"), ("id", "result", "why")
    return page(
        f"{record['a']['source']} and {record['b']['source']}",
        [
            "<header><h1>Two results of the same questions</h1>",
            f"<p>A: {_side(record['a'])}<br>B: {_side(record['b'])}</p>",
            paragraph(record["conclusion"], "conclusion") + "</header>",
            warning("The protocols differ, and the difference may be due to it", differing(record["flags"])),
            warning("Take care", record["warnings"]),
            section("table", "Scores", _table(record), bullets(counts_lines(record)), note),
            section("flipped", "Questions with another score", flips(record["flipped"], "A", "B", OnPage())),
            section("videos", "By video", videos_table(record["videos"], "A", "B", scale)),
            section("failures", "Without a score", listed(failures, header, "Scores that are missing")),
            section("unreadable", "Unreadable", listed(unreadable, ("id", "result", "reply"), "Replies")),
            section("cards", "Protocol", _cards(record), _unchecked(record)),
            paragraph(f"videoanchor-triton {record['version']}, {record['date']}", "quiet"),
        ],
    )


def _side(side: dict[str, Any]) -> str:
    return escape(side_line(side))


def _table(record: dict[str, Any]) -> str:
    reach = reach_of(record["table"])
    rows = []
    for row, (first, *others) in zip(record["table"], cells(record), strict=True):
        numbers = [number_cell(text) for text in others[:-1]]
        picture = interval_cell(row, reach, row["verdict"] in ("A higher", "B higher"))
        rows.append([first, *numbers[:5], picture, *numbers[5:], text_cell(others[-1], "short")])
    header = (*COLUMNS[:6], "", *COLUMNS[6:])
    unit = "scores in percent" if record["percent"] else "scores as they are"
    return table(f"All questions and each type; {unit}", header, rows)


def _cards(record: dict[str, Any]) -> str:
    """Both cards, entry by entry; what differs is set off."""
    a, b = (dict(_entries(record[side]["card"])) for side in "ab")
    names = [*dict.fromkeys([*a, *b])]
    if not names:
        return paragraph("Neither result carries a card: nothing says how it was made.")
    rows = [[name, text_cell(a.get(name, "not said")), text_cell(b.get(name, "not said"))] for name in names]
    differs = [n for n, name in enumerate(names) if a.get(name) != b.get(name)]
    return table("Both cards; entries that differ are set off", ("", "A", "B"), rows, differs)


def _entries(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Sections that are compared first."""
    ordered = [*(name for name in SECTIONS if name in card), *(name for name in card if name not in SECTIONS)]
    found: list[tuple[str, Any]] = []
    for name in ordered:
        value = card[name]
        found += (
            [(f"{name}.{key}", one) for key, one in value.items()] if isinstance(value, Mapping) else [(name, value)]
        )
    return found


def _unchecked(record: dict[str, Any]) -> str:
    if not record["unchecked"]:
        return ""
    return folded(f"Could not be compared: {len(record['unchecked'])}", bullets(record["unchecked"]), True)
