"""eval.html: an evaluation on one page."""

from collections.abc import Mapping
from typing import Any

from ...integrations.errors import InputError
from ..pages.html import folded, number_cell, page, paragraph, section, table, text_cell, warning
from .head_to_head import changes
from .page import flips, interval_cell, listed, reach_of, videos_table
from .paired import interval_text
from .readers.own import result_of
from .report import warnings_of
from .thumbnails import OnPage

_HEADER = (
    *("questions", "n", "videos", "without", "with gate", "difference", "", "95% interval", "videos changed", "failed"),
    "",
)
_NOTHING = "Nothing could be judged: no question has a reply with the gate and without."


def eval_page(record: dict[str, Any], source: str) -> str:
    """
    Args:
        record: what eval.json holds.
        source: its path, beside which frames are kept.

    Returns:
        HTML.
    """
    pairs = list(dict.fromkeys((row["setting"], row["baseline_setting"]) for row in record["results"]))
    left_out = [
        f"{record[name]} replies {what}"
        for name, what in (("n_failed", "failed and are left out"), ("n_unasked", "were not asked for"))
        if record[name]
    ]
    stopped = [] if record["stopped"] is None else [record["stopped"]]
    unreadable = [
        (question["id"], name, reply["reply"])
        for question in record["answered"]
        for name, reply in question["replies"].items()
        if reply.get("read") == ""
    ]
    on_page = OnPage()
    failures = [(one["id"], one["setting"], one["error"]) for one in record["failures"]]
    return page(
        f"Evaluation of {record['card']['model']}",
        [
            f"<header><h1>Evaluation</h1>{paragraph(_about(record))}</header>",
            warning("Not all was answered", left_out + stopped),
            warning("Most replies are no answers", warnings_of(record["results"])),
            "" if pairs else paragraph(_NOTHING, "conclusion"),
            section("table", "Scores", *(_table(record, *pair) for pair in pairs), paragraph(record["note"], "quiet")),
            *(_details(record, source, n, *pair, on_page) for n, pair in enumerate(pairs)),
            section("failures", "Failures", listed(failures, ("id", "setting", "why"), "Replies that failed")),
            section("unreadable", "Unreadable", listed(unreadable, ("id", "setting", "reply"), "Replies")),
            section("card", "Protocol card", _card(record["card"])),
        ],
    )


def _about(record: Mapping[str, Any]) -> str:
    card = record["card"]
    revision = f", revision {card['revision']}" if card["revision"] else ""
    about = card["questions"]
    return (
        f"{card['model']}{revision}, on {about['n']} questions about {about['n_videos']} videos; "
        f"{card['device']}, {card['dtype']}; {card['date']}; tag {record['tag']}"
    )


def _table(record: Mapping[str, Any], setting: str, baseline: str) -> str:
    mine = [row for row in record["results"] if row["setting"] == setting]
    reach = reach_of(record["results"])
    rows = []
    for row in mine:
        numbers = [f"{row['n']}", f"{row['n_videos']}", f"{100 * row['baseline']:.1f}", f"{100 * row['mean']:.1f}"]
        interval = interval_text(f"{100 * row['low']:+.1f}", f"{100 * row['high']:+.1f}", row["n_videos"])
        after = (interval, str(row["n_videos_changed"]), str(row["n_failed"]))
        rows.append(
            [
                row["type"],
                *(number_cell(text) for text in (*numbers, f"{100 * row['difference']:+.1f}")),
                interval_cell(row, reach, row["verdict"] in ("gain", "loss")),
                *(number_cell(text) for text in after),
                text_cell(row["verdict"], "short"),
            ]
        )
    return table(f"{setting}, against {baseline}; scores in percent", _HEADER, rows)


def _details(record: dict[str, Any], source: str, number: int, setting: str, baseline: str, on_page: OnPage) -> str:
    """Of one setting: questions that flipped, and means by video."""
    try:
        flipped, videos = changes(result_of(record, baseline, source), result_of(record, setting, source))
    except InputError:  # no question has two replies
        return ""
    return section(
        f"setting-{number}",
        f"{setting}, against {baseline}",
        flips(flipped, "without", "with gate", on_page) or paragraph("No question has another score."),
        videos_table(videos, "without", "with gate", 100),
    )


def _card(card: Mapping[str, Any]) -> str:
    rows = []
    for name, value in card.items():
        if name == "settings":
            continue
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{name}.{key}" if key else name, text_cell("none" if one is None else one)] for key, one in entries]
    settings = ""
    for name, about in card["settings"].items():
        entries = table(f"Setting {name}", ("", ""), [[key, text_cell(one)] for key, one in about.items()])
        settings += folded(f"setting {name}", entries, False)
    return table("What the numbers depend on", ("", ""), rows) + settings
