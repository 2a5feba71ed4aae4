"""Tasks in processes of their own: one that hangs or dies is a failure with its reason, and costs the others nothing.

A child is a fresh interpreter with a pipe to this process (`child.py`). A kernel that fails may leave its process
without a usable device, so a child ends with the first task that fails, and another one goes on.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Self

COMMAND = [sys.executable, "-P", "-c", "from videoanchor_triton.app.check.child import main; main()"]
START_SECONDS = 60.0
TASK_SECONDS = 60.0
"""A form that is compiled for the first time, beside others, on few cores, takes some of it."""
TOTAL_SECONDS = 180.0

Answer = dict[str, Any]
"""What a task found, or `reason`: why it found nothing."""


class Child:
    """A process, and the task that it has."""

    def __init__(self, device: str) -> None:
        self.pipe, theirs = Pipe()
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self.task = ""
        self.deadline = time.monotonic() + START_SECONDS
        # the forms themselves are looked at, not what would answer for them
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "VIDEOANCHOR_SELF_CHECK": "off"}
        with theirs:
            self.process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno()), device],
                stdin=subprocess.DEVNULL,
                stdout=self.said,
                stderr=self.said,
                env=os.environ | variables,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches this process alone
            )

    def give(self, task: str, started: bool) -> None:
        self.task = task
        if started:
            self.deadline = time.monotonic() + TASK_SECONDS
        with suppress(OSError):  # it died already: reading its answer says how
            self.pipe.send(task)

    def answer(self) -> Answer | None:
        """What it says, which is there to be read; None: it has started."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return {"reason": f"the process died: {self._last_words()}"}
        if said is None:
            self.deadline = time.monotonic() + TASK_SECONDS
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.said.close()

    def _last_words(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        self.said.seek(0)
        *_, last = self.said.read().decode(errors="replace").strip().split("\n")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}, {last[:200]}" if last else how


class Children:
    """Children for a device, gone when the block is left."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._idle: list[Child] = []
        self._busy: list[Child] = []
        self._until = time.monotonic() + TOTAL_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in (*self._idle, *self._busy):
            child.end()

    def answers(self, tasks: Iterable[str], jobs: int = 1) -> Generator[tuple[str, Answer]]:
        """(task, what it found), as they finish, `jobs` at a time."""
        waiting = deque(tasks)
        while waiting or self._busy:
            while waiting and len(self._busy) < jobs:
                if time.monotonic() > self._until:
                    yield waiting.popleft(), {"reason": f"not run: the check had taken {TOTAL_SECONDS:g} s"}
                else:
                    self._start(waiting.popleft())
            for child, answer in self._finished():
                self._busy.remove(child)
                if "reason" in answer:
                    child.end()
                else:
                    self._idle.append(child)
                yield child.task, answer

    def _start(self, task: str) -> None:
        started = bool(self._idle)
        child = self._idle.pop() if started else Child(self._device)
        self._busy.append(child)
        child.give(task, started)

    def _finished(self) -> list[tuple[Child, Answer]]:
        """Those that have answered, died, or had their time."""
        if not self._busy:
            return []
        left = min(child.deadline for child in self._busy) - time.monotonic()
        speaking: list[Connection] = wait([child.pipe for child in self._busy], max(left, 0.0))  # pyright: ignore
        found = []
        for child in self._busy:
            if child.pipe in speaking:
                if (answer := child.answer()) is not None:
                    found.append((child, answer))
            elif time.monotonic() >= child.deadline:
                found.append((child, {"reason": "it hung: no answer in time, so its process was ended"}))
        return found
