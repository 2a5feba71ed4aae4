"""How far a command is, on a terminal and in a log."""

import io
import os
import time

import pytest

from videoanchor_triton.app.commands import progress_line
from videoanchor_triton.app.commands.progress_line import ProgressLine


def test_a_log_gets_a_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine(True)
    progress("load", 0, 0)
    for n in range(1000):
        progress("solve", n, 1000)
        progress("tokens", n + 1, 0)
    progress.say("a\x1b[2Jb\nc")
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["  load", "  solve", "  tokens 1", r"a\x1b[2Jb\nc"]


def test_a_log_is_told_where_a_long_stage_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while nothing is reported, and not once it is over."""
    monkeypatch.setattr(progress_line, "LOG_SECONDS", 0.01)
    progress = ProgressLine(True)
    progress("solve", 1, 4)
    progress("solve", 2, 4)
    shown = ""
    while shown.count("\n") < 3:
        time.sleep(0.01)
        shown += capsys.readouterr().err
    progress.close()
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
    assert shown.startswith("  solve 1/4 (25%)\n")
    assert shown.splitlines()[2].startswith("  solve 2/4 (50%), ")


def test_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine(False)
    progress("solve", 1, 4)
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_line_of_the_terminal_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((20, 5)))
    ProgressLine(True)("a stage with a long name", 5, 10)
    assert terminal.getvalue() == "\r\033[K  a stage with a lo"
