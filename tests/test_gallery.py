"""docs/gallery: what the pages link to is there, small, and opens; `benchmarks/pages/gallery.py` makes it."""

import html
import re
from pathlib import Path

import pytest
from browser import chromium, needs_browser

from benchmarks.pages import gallery

ROOT = Path(__file__).parents[1]
PAGES = sorted(gallery.FOLDER.glob("*.html"))
TRUTHS = {"room": gallery.room, "cuts": gallery.cuts, "two": gallery.two}


def test_the_gallery_is_what_its_pages_show() -> None:
    pages = [ROOT / "docs" / "gallery.md", ROOT / "docs" / "index.md", ROOT / "README.md"]
    shown = {name for page in pages for name in re.findall(r"\]\((?:docs/)?gallery/([^)]+)\)", page.read_text())}
    made = {name for kept in gallery.KEPT.values() for name in kept.values()} | {"page.webp"}
    there = {path.name for path in gallery.FOLDER.iterdir()}
    assert shown == made == there
    assert sum(path.stat().st_size for path in gallery.FOLDER.iterdir()) < 6e6


@pytest.mark.parametrize("name", TRUTHS)
def test_the_trained_model_is_right_on_its_clips(name: str) -> None:
    _, question, truth = TRUTHS[name]()
    text = html.unescape((gallery.FOLDER / f"{name}.html").read_text(encoding="utf-8"))
    assert f"<h1>{question}</h1>" in text
    assert f"<strong>with the gate</strong><pre>{truth}</pre>" in text


@needs_browser
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_open(page: Path, tmp_path: Path) -> None:
    (tmp_path / page.name).write_bytes(page.read_bytes())
    done = chromium(tmp_path / page.name, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert re.search(r'<output id="when"[^>]*>(1: )?[\d.]+ s, frame 1 of \d+<', done.stdout)
    assert "/tmp/" not in page.read_text(encoding="utf-8")
