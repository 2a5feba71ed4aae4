"""Pages in a headless Chromium, where there is one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page; what its console says is in stderr, in lines with CONSOLE."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    return subprocess.run([*command, profile, f"file://{page}"], capture_output=True, text=True, timeout=120)


def keep_screenshot(page: Path, name: str, size: str = "1280,1600") -> Path:
    """Into the folder that VIDEOANCHOR_TEST_ARTEFACTS names, or beside the page."""
    folder = Path(os.environ.get("VIDEOANCHOR_TEST_ARTEFACTS", page.parent))
    folder.mkdir(parents=True, exist_ok=True)
    chromium(page, f"--screenshot={folder / name}", f"--window-size={size}", "--hide-scrollbars")
    return folder / name
