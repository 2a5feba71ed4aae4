"""SIGTERM, with which schedulers and containers end a job, taken as Ctrl-C is."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..integrations.errors import Terminated


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """Within it the first SIGTERM raises `Terminated`. Those after it do nothing, to the end of the process: no second
    one cuts the tidying up short or changes the exit code. Where a program has its own handler, or outside the main
    thread, nothing changes."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Terminated

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if asked else signal.SIG_DFL)


@contextmanager
def keeping_handler() -> Iterator[None]:
    """Within it others may set a handler of SIGTERM, as Ray does; afterwards it is the one that it was."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
