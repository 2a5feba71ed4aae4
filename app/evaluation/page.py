"""Pieces of the pages of `eval` and `compare`: tables of videos and questions, pictures of intervals."""

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from ..pages.html import escape, folded, number_cell, paragraph, table, text_cell
from ..text import shown
from ..video.names import names_in
from .report import beginning
from .thumbnails import OnPage

MOST_ENTRIES = 1000
"""Questions listed in one section: more make a page that no browser scrolls well."""


def interval_cell(row: Mapping[str, Any], reach: float, is_shown: bool) -> str:
    """A picture of a difference with its interval, on a scale from -`reach` to `reach`."""
    width, height = 140, 18

    def x(value: float) -> str:
        return f"{width / 2 * (1 + value / reach * 0.95):.1f}"

    low, middle, high = (x(row[name]) for name in ("low", "difference", "high"))
    label = f"difference {row['difference']:+.4g}, from {row['low']:+.4g} to {row['high']:+.4g}"
    kind = "shown" if is_shown else "notshown"
    return (
        f'<td><svg width="{width}" height="{height}" role="img" aria-label="{escape(label)}">'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
        f'<line class="interval" x1="{low}" x2="{high}" y1="{height / 2}" y2="{height / 2}"/>'
        f'<circle class="{kind}" cx="{middle}" cy="{height / 2}" r="4"/></svg></td>'
    )


def reach_of(rows: Iterable[Mapping[str, Any]]) -> float:
    """How far the scale of `interval_cell` goes; no less than 5 points, so that nothing looks large."""
    return max([0.05, *(abs(row[name]) for row in rows for name in ("low", "high", "difference"))])


def videos_table(videos: Sequence[Mapping[str, Any]], first: str, second: str, scale: float) -> str:
    """Mean scores by video, behind a line to open; those that changed most first."""
    names = short_names([video["video"] for video in videos])
    rows = []
    for video in videos[:MOST_ENTRIES]:
        kind = "up" if video["difference"] > 0 else "down" if video["difference"] < 0 else ""
        means = (f"{scale * video[side]:.3g}" for side in "ab")
        difference = number_cell(f"{scale * video['difference']:+.3g}", kind)
        rows.append([names[video["video"]], *(number_cell(text) for text in (str(video["n"]), *means)), difference])
    title = f"Videos: {len(videos)}, those that changed most first{_cut(len(videos))}"
    header = ("video", "questions", first, second, "difference")
    return folded(title, table("Mean scores by video", header, rows), len(videos) <= 20)


def flips(entries: Sequence[Mapping[str, Any]], first: str, second: str, on_page: OnPage) -> str:
    """Questions whose score differs: question, frames, right answer, both replies, and what was read from them."""
    names = short_names([entry["video"] for entry in entries])
    pieces, n_left_out = [], on_page.n_left_out
    for entry in entries[:MOST_ENTRIES]:
        up = entry["b"]["score"] > entry["a"]["score"]
        scores = f"{entry['a']['score']:g} → {entry['b']['score']:g}"
        options = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, entry["options"], strict=False)]
        question = "\n".join([shown(entry["question"] or "(its text is not known)"), *options])
        where = f"{names[entry['video']]}, {entry['type']}"
        right = "not known" if entry["answer"] is None else entry["answer"]
        start = beginning(entry["question"], 100)
        pieces.append(
            f'<details><summary><span class="{"up" if up else "down"}">{escape(scores)}</span> {escape(entry["id"])} '
            f'<span class="quiet">{escape(where)}</span> {escape(start)}</summary>'
            f'<p class="question">{escape(question)}</p>{on_page.image(entry["frames"])}'
            f"<p>Right answer: {escape(right)}</p>"
            f'<div class="replies">{_reply(first, entry["a"])}{_reply(second, entry["b"])}</div></details>'
        )
    if not pieces:
        return ""
    n_up = sum(entry["b"]["score"] > entry["a"]["score"] for entry in entries)
    said = f"{second} higher in {n_up}, {first} in {len(entries) - n_up}{_cut(len(entries))}"
    if n := on_page.n_left_out - n_left_out:
        said += f"; the frames of {n} are left out, for the size of the page"
    return paragraph(said, "quiet") + "\n".join(pieces)


def _reply(name: str, side: Mapping[str, Any]) -> str:
    read = side["read"]
    why = "" if read is None else "no answer could be read from it" if read == "" else f"read as {read}"
    score = f"score {side['score']:g}" + (f", {why}" if why else "")
    text = "(its text is not known)" if side["reply"] is None else side["reply"] or "(empty)"
    return f'<div class="reply"><strong>{escape(name)}</strong>: {escape(score)}<pre>{escape(text)}</pre></div>'


def listed(entries: Sequence[Sequence[Any]], header: Sequence[str], what: str) -> str:
    """Questions by id with texts beside them, behind a line to open."""
    if not entries:
        return ""
    rows = [[str(entry[0]), *(text_cell("" if cell is None else cell) for cell in entry[1:])] for entry in entries]
    title = f"{what}: {len(entries)}{_cut(len(entries))}"
    return folded(title, table("By question", header, rows[:MOST_ENTRIES]), len(entries) <= 20)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Paths without the folders that all of them share; of several in one name each, with + between."""
    names = [*dict.fromkeys(names)]
    unique = [*dict.fromkeys(path for name in names for path in names_in(name))]
    parts = [path.split("/") for path in unique]
    shared = 0
    while len(unique) > 1 and all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    if len(unique) == 1:
        shared = len(parts[0]) - 1
    short = {path: "/".join(one[shared:]) for path, one in zip(unique, parts, strict=True)}
    found = {name: [short[path] for path in names_in(name)] for name in names}
    return {
        name: " + ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
        for name, some in found.items()
    }


def _cut(n: int) -> str:
    return f"; the first {MOST_ENTRIES} are here, all in the JSON" if n > MOST_ENTRIES else ""
