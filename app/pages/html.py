"""Pages that are one file: HTML that asks for nothing from anywhere, every text escaped."""

import hashlib
import html
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from ..text import json_text, printable, shown

_TEMPLATE = Path(__file__).with_name("page.html")


def page(title: str, body: Iterable[str], *, style: str = "", script: str = "", data: Any = None) -> str:
    """A whole page. Its policy lets run nothing but `script`, by its hash, and load nothing but what is in the page.

    Args:
        title: text.
        body: HTML.
        style, script: CSS and JavaScript of the page's own.
        data: for the script, as JSON under the id "data".
    """
    pieces = [piece for piece in body if piece]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if script:
        digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        inert = json_text(data, None).replace("<", r"\u003c")  # no end of the block, and no comment, begins in it
        pieces += [f'<script type="application/json" id="data">{inert}</script>', f"<script>{script}</script>"]
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), policy=policy, style=style, body="\n".join(pieces))


def escape(value: Any) -> str:
    """`value` as HTML: text between tags, or in quotes. What could steer or turn the text shows as an escape."""
    return html.escape(printable(shown(value), lines=True), quote=True)


def section(name: str, title: str, *content: str) -> str:
    """HTML under a heading that `#name` leads to; nothing where there is no content."""
    inner = "\n".join(piece for piece in content if piece)
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>\n{inner}</section>' if inner else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def warning(title: str, lines: Sequence[str]) -> str:
    """A box; nothing where there are no lines."""
    return f'<div class="warn" role="note"><strong>{escape(title)}</strong>{bullets(lines)}</div>' if lines else ""


def bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[int] = ()) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        caption, header: text.
        rows: cells as `text_cell`, `number_cell` or other HTML make them; the first of a row is its heading, as text.
        marked: rows to be set off.
    """
    set_off, lines, titles = {*marked}, [], "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    for n, (first, *cells) in enumerate(rows):
        if not lines:  # headings of numbers stand above them
            kinds = ["", *(' class="number"' if cell.startswith('<td class="number') else "" for cell in cells)]
            named = zip(kinds, header, strict=True)
            titles = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in named)
        kind = ' class="differs"' if n in set_off else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{titles}</tr></thead>\n<tbody>" + "\n".join(lines) + "</tbody>"
        "</table></div>"
    )


def number_cell(text: str, kind: str = "") -> str:
    return f'<td class="number {escape(kind)}">{escape(text)}</td>'


def text_cell(value: Any, kind: str = "text") -> str:
    return f'<td class="{escape(kind)}">{escape(value)}</td>'


def folded(title: str, content: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"
