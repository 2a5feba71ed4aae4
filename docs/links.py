"""What mkdocs does not do by itself (hooks, see mkdocs.yml): links from docs/ to other files of the repository, and the
source of a package whose folders have no `__init__.py`."""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "out" / "docs-source"
SHOWN = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "benchmarks/results/**/*.*")
"""Files outside docs/ that the site holds, at their own paths."""
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_startup(**_: Any) -> None:
    """A copy of the package in which each folder has an `__init__.py`: griffe reads no other folders of a package."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    package = SOURCE / "videoanchor_triton"
    shutil.copytree(ROOT / "src" / "videoanchor_triton", package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in package.rglob("*/"):
        (folder / "__init__.py").touch()


def on_files(files: Files, config: MkDocsConfig) -> None:
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links are written for the repository. On the site, docs/ is the root, and what is shown from outside is in it."""
    source = page.file.src_uri
    outside = page.file.generated_by is not None
    folder = posixpath.dirname(source if outside else f"docs/{source}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1])).removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(source) or ".")

    return _LINK.sub(on_site, markdown)
