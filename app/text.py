"""Text that comes from outside, such as file names, questions and answers: on a terminal, and as JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..integrations.errors import InputError

_C0 = "\x00-\x08\x0b-\x1f\x7f"
_BEYOND = "\x80-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""C1 controls, what changes the direction of text, line separators, and bytes of file names that are no UTF-8."""
_IN_LINES = re.compile(f"[{_C0}{_BEYOND}]")
_IN_A_LINE = re.compile(f"[\t\n{_C0}{_BEYOND}]")


def printable(text: object, *, lines: bool = False) -> str:
    r"""`text` with what could steer a terminal, or fake a line of ours, written as an escape such as \x1b.

    Args:
        lines: newlines and tabs stay, as in an answer of several lines.
    """
    return (_IN_LINES if lines else _IN_A_LINE).sub(_escaped, str(text))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()


def shown(value: Any) -> str:
    """A value for people: entries of a mapping after one another."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {shown(one)}" for name, one in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON for files and terminals: Unicode as it is, but for what `printable` escapes, which JSON escapes too."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _IN_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def check_question(question: str) -> None:
    """
    Raises:
        InputError: there is nothing to ask.
    """
    if not question.strip():
        raise InputError("the question is empty: ask something about the video")


ALL_MEDIA = {"type": "all media"}
"""Of a message: in its place go entries of all media, see `prompt.place`."""


def asked(question: str, system: str | None) -> str | list[dict[str, Any]]:
    """What `pipeline.answer` takes for a question about all media, after a system prompt if there is one.

    Raises:
        InputError: there is nothing to ask, or the system prompt is empty.
    """
    if system is None:
        return question
    check_question(question)
    if not system.strip():
        raise InputError("the system prompt is empty: leave it out, the chat template then decides")
    user = [ALL_MEDIA, {"type": "text", "text": question}]
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": user}]
