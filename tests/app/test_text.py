"""Text from outside on the terminal and in JSON."""

import json

import pytest

from videoanchor_triton.app.text import check_question, json_text, printable
from videoanchor_triton.integrations.errors import InputError

HOSTILE = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x061C, *range(0x200E, 0x2010))]
HOSTILE += [chr(code) for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDCFF)]


def test_what_steers_a_terminal_is_escaped() -> None:
    for character in HOSTILE:
        shown = printable(f"a{character}b")
        assert shown.isprintable(), hex(ord(character))
        assert shown.startswith("a\\")
    assert printable("a\x1b[31m\n\u202eb") == r"a\x1b[31m\n\u202eb"
    assert printable(b"caf\xe9.mp4".decode(errors="surrogateescape")) == r"caf\xe9.mp4"
    assert printable("会议 é 🎥 $x_{") == "会议 é 🎥 $x_{"
    assert printable("two\n\tlines\x1b", lines=True) == "two\n\tlines\\x1b"


def test_json_is_safe_to_print_and_to_encode_and_reads_back() -> None:
    value = {"name": "x".join(HOSTILE) + "会议", "list": [1, None, 0.5]}
    for indent in (None, 2):
        text = json_text(value, indent)
        assert json.loads(text.encode().decode()) == value
        assert all(line.isprintable() for line in text.split("\n"))
    assert "会议" in json_text(value)


@pytest.mark.parametrize("question", ["", "  ", "\n\t"])
def test_nothing_to_ask(question: str) -> None:
    with pytest.raises(InputError, match="question is empty"):
        check_question(question)
    check_question(" ? ")
