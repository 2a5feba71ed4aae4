"""How far a command is, on standard error."""

import os
import sys
import threading
import time

from ..text import printable

LOG_SECONDS = 30.0


class ProgressLine:
    """On a terminal one line that is written over, with the stage and how far it is. In a log a line for each new
    stage, and every `LOG_SECONDS` where it is, also while nothing is reported."""

    def __init__(self, enabled: bool) -> None:
        self._terminal = enabled and sys.stderr.isatty()
        self._log = enabled and not self._terminal
        self._last, self._start = 0.0, time.monotonic()
        self._text = ""
        self._told: set[str] = set()
        self._ended: threading.Event | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` 0: the stage begins; `total` 0: how much there is to do is not known."""
        share = "" if not done else f" {done}/{total} ({100 * done // total}%)" if total else f" {done}"
        self._text = f"  {printable(stage)}{share}"
        now = time.monotonic()
        if self._terminal and now - self._last > 0.1:
            self._last = now
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\033[K{self._text[: width - 1]}", end="", file=sys.stderr, flush=True)
        elif self._log and stage not in self._told:
            self._told.add(stage)
            print(self._text, file=sys.stderr, flush=True)
            if self._ended is None:
                self._ended = threading.Event()
                threading.Thread(target=self._repeat, args=(self._ended,), daemon=True).start()

    def _repeat(self, ended: threading.Event) -> None:
        while not ended.wait(LOG_SECONDS):
            print(f"{self._text}, {time.monotonic() - self._start:.0f} s", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A message that stays."""
        self._clear()
        print(printable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is going on any more."""
        self._clear()
        if self._ended is not None:
            self._ended.set()
            self._ended = None

    def _clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
