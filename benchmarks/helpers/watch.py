"""A worker process, listened to until it ends or is silent for too long. Imports neither torch nor triton."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.helpers.record import ENDED, SILENT, TIME_BUDGET

START_SECONDS = 180.0
SILENCE_SECONDS = 90.0
GRACE_SECONDS = 15.0


def messages(
    command: list[str], environment: dict[str, str], order: dict[str, Any], log: Path, deadline: float
) -> Iterator[dict[str, Any]]:
    """What a worker says, until it ends; a last message with "died" if it did not end by itself and well.

    It gets `order` as JSON on its stdin. It is ended when silent for SILENCE_SECONDS (START_SECONDS before its first
    word, as long as it said when it last was "alive"), or GRACE_SECONDS past the deadline.
    """
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def talk() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError), process.stdin as stdin:
            stdin.write(json.dumps(order))
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=talk, daemon=True).start()
    patience = START_SECONDS
    try:
        while True:
            left = max(deadline + GRACE_SECONDS - time.time(), 0)
            try:
                line = lines.get(timeout=min(patience, left))
            except queue.Empty:
                yield {"died": TIME_BUDGET if left < patience else f"{SILENT} {patience:g} s"}
                return
            if line is None:
                if process.wait() != 0:
                    yield {"died": f"{ENDED} with status {process.returncode}: {_last_line(log)}"}
                return
            message = json.loads(line)
            patience = message.get("seconds") or SILENCE_SECONDS
            yield message
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1][:200]
