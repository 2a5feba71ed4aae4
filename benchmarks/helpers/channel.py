"""What a task of gpu_check.py's worker says to the process that watches it: lines of JSON on the first stdout."""

import json
import os
import sys
from typing import Any, TextIO

_channel: TextIO | None = None


def open_channel() -> None:
    """Keep stdout for messages; what anything else prints goes to stderr from here on."""
    global _channel
    _channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr


def say(message: dict[str, Any]) -> None:
    """Send a message. Without a channel (a task run by itself) nothing happens."""
    if _channel is not None:
        print(json.dumps(message), file=_channel, flush=True)


def alive(what: str, seconds: float | None = None) -> None:
    """Say that a long task is at work on `what`, so that it is not taken for hung.

    The next message may then take `seconds`, as long as any message by default.
    """
    say({"alive": what, "seconds": seconds})
