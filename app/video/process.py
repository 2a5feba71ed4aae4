"""The parent's side of child.py: starts it, reads its answers against a time limit, and ends it."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np

from ...integrations.errors import InputError

_MODULE = f"{__package__}.child"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "AV_LOG_FORCE_NOCOLOR": "1"}
"""NumPy multiplies no matrices there: threads for that would only take memory. FFmpeg's messages are read."""


class Answers:
    """What the child writes. Nothing for `timeout` seconds is taken for a decoder that hangs."""

    def __init__(
        self, process: subprocess.Popen[bytes], pipe: int, errors: BinaryIO, name: str, timeout: float
    ) -> None:
        self._process, self._pipe, self._errors, self._name, self._timeout = process, pipe, errors, name, timeout

    def line(self) -> dict[str, Any]:
        """The next line of JSON.

        Raises:
            InputError: the child refused the file, hangs or died.
        """
        text = bytearray()
        while not text.endswith(b"\n"):
            text += self._some(1)
        answer = json.loads(text)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer

    def fill(self, array: np.ndarray) -> None:
        """Fills a contiguous uint8 array with the bytes that come next."""
        view, done = array.data.cast("B"), 0
        while done < len(view):
            self._wait()
            n = os.readv(self._pipe, [view[done:]])
            done += n or self._died()

    def _some(self, n: int) -> bytes:
        self._wait()
        return os.read(self._pipe, n) or bytes(self._died())

    def _wait(self) -> None:
        if not select.select([self._pipe], [], [], self._timeout)[0]:
            raise InputError(
                f"{self._name}: reading it made no progress for {self._timeout:g} s and was ended: the file may be "
                "broken; if it is only slow to read, allow more seconds (--timeout)"
            )

    def _died(self) -> int:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise InputError(
            f"{self._name}: the process that reads it died ({reason}{f', {last}' if last else ''}): the file may be "
            "broken, or the memory is full"
        )


@contextmanager
def child(request: dict[str, Any], timeout: float) -> Iterator[Answers]:
    """The answers of a child that works on `request`; it is gone when the block ends, however it ends.

    The child is a fresh interpreter: nothing of this process, such as a CUDA context, is in it. It has a session of
    its own, so that Ctrl-C reaches this process alone.
    """
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as errors, ExitStack() as pipes:  # the file has no name: nothing stays on the disk
        ours, theirs = os.pipe()
        pipes.callback(os.close, ours)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                bufsize=0,
                env=environment,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        try:
            assert process.stdin is not None
            pipes.enter_context(process.stdin)
            with suppress(BrokenPipeError):  # it died already: the first answer says how
                process.stdin.write(json.dumps(request).encode() + b"\n")
            yield Answers(process, ours, errors, request["path"], timeout)
        finally:
            process.kill()
            process.wait()
