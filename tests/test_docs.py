"""The pages of docs/: messages that they quote occur in the code, public names are on one, docstrings show as meant."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import videoanchor_triton as va

ROOT = Path(__file__).parents[1]
HOLE = "…"


def _text(node: ast.expr) -> str:
    """A string of the code, its values as holes."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else HOLE


def _strings() -> list[str]:
    nodes = (
        node
        for area in ("kernels", "anchor", "integrations", "app")
        for path in (ROOT / area).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    return [_text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]


def _quoted() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def _occurs(message: str, strings: list[str]) -> bool:
    """Holes of the page are holes of the code, so that text between them is text of the code."""
    pieces = message.strip(f"{HOLE} ").split(HOLE)
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
    return any(pattern.search(string) for string in strings)


def test_messages_of_the_page_occur_in_the_code() -> None:
    strings, quoted = _strings(), _quoted()
    assert len(quoted) > 50
    assert not [message for message in quoted if not _occurs(message, strings)]
    assert not _occurs("no video file at …: check the address", strings), "the check can fail"


def test_paths_of_the_pages_exist() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    path = re.compile(r"`(?:python )?((?:kernels|anchor|integrations|app|benchmarks|tests|docs|src)/[\w./-]*)")
    named = {found for page in pages for found in path.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 20
    assert not [one for one in named if not (ROOT / one).exists() and "NAME" not in one]


def test_each_public_name_is_on_one_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: videoanchor_triton\.(\w+)$", pages, re.MULTILINE)) == sorted(va.__all__)


def test_the_version_is_one() -> None:
    citation, changes = ((ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md"))
    assert f"\nversion: {va.__version__}\n" in citation
    assert re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)[0] == va.__version__


@pytest.mark.parametrize("name", va.__all__)
def test_docstrings_show_as_meant(name: str) -> None:
    """The site takes docstrings for Markdown and for Google's sections."""
    text = inspect.getdoc(getattr(va, name)) or ""
    plain = re.sub(r"`[^`]*`", "", text)
    assert not re.search(r"^ *>(?!>> )", plain, re.MULTILINE), "a quotation"
    assert not re.search(r"\d\*\*", plain), "emphasis"
    assert not re.search(r"^ *Example:$", plain, re.MULTILINE), "the section is Examples:"
