"""Reads a file in a process of its own, since nobody has looked at it: nothing in it can hang or end the caller.

The process is a fresh interpreter with a socket as its standard input. It gets one pickle, what to read, and answers
with others: ("progress", stage, done, total), ("frame", pixels, seconds, count), and at last ("clip", its other fields)
or ("error", sentence). A video is put together with its sound there, too. multiprocessing would import the caller's
main module into it (docs/design/video.md).
"""

import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any, BinaryIO

from ...integrations.errors import InputError
from . import limits, views
from .sampling import Progress, Request, SoundRequest

_MODULE = __name__
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "AV_LOG_FORCE_NOCOLOR": "1"}
"""NumPy multiplies no matrices there: threads for that would only take memory. FFmpeg's messages are read."""
_REPORT_SECONDS = 0.1


def answers(request: Request | SoundRequest, timeout: float, progress: Progress) -> Generator[tuple[Any, ...]]:
    """What a child answers that works on `request`; it is gone when the generator ends or is closed.

    Nothing of this process, such as a CUDA context, is in the child. It has a session of its own, so that Ctrl-C
    reaches this process alone.

    Raises:
        InputError: the child refused the file, died, or gave no byte for `timeout` seconds.
    """
    command = [sys.executable, "-P", "-c", f"from {_MODULE} import main; main()"]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ours, theirs = socket.socketpair()
    ours.settimeout(timeout)
    with ours, ours.makefile("rb") as pickles, tempfile.TemporaryFile() as said:  # a file without a name
        with theirs:
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=said, stderr=said, env=environment, start_new_session=True
            )
        try:
            with suppress(OSError):  # it died already: reading its answer says how
                ours.sendall(pickle.dumps(request))
            kind = ""
            while kind != "clip":
                try:
                    kind, *content = pickle.load(pickles)
                except TimeoutError as error:
                    raise InputError(
                        f"{request.name}: reading it made no progress for {timeout:g} s and was ended: the file may be "
                        "broken; if it is only slow to read, allow more seconds (--timeout)"
                    ) from error
                except (EOFError, OSError, pickle.UnpicklingError) as error:  # nothing, or no more of an answer
                    raise InputError(
                        f"{request.name}: the process that reads it died ({_last_words(process, said)}): the file may "
                        "be broken, or the memory is full"
                    ) from error
                if kind == "error":
                    raise InputError(*content)
                if kind == "progress":
                    progress(*content)
                else:
                    yield kind, *content
        finally:
            process.kill()
            process.wait()


def _last_words(process: subprocess.Popen[bytes], said: BinaryIO) -> str:
    code = process.wait()
    said.seek(0)
    *_, last = said.read().decode(errors="replace").strip().split("\n")
    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{reason}, {last}" if last else reason


def main() -> None:
    """The child. It ends when its socket does, so that it never outlives its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where a scheduler ends all of a job, the parent ends this process
    limits.limit_process()
    channel = socket.socket(fileno=0)
    request: Request | SoundRequest = pickle.load(channel.makefile("rb"))
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    pickles, last_report = channel.makefile("wb"), 0.0

    def send(*answer: Any) -> None:
        pickle.dump(answer, pickles, protocol=5)  # which writes the pixels from where they are
        pickles.flush()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_report
        if time.monotonic() - last_report >= _REPORT_SECONDS:
            last_report = time.monotonic()
            send("progress", stage, done, total)

    try:
        if isinstance(request, SoundRequest):
            from .sound import put_together

            clip = put_together(request, report)
        elif views.is_views(request.source):
            clip = views.read_views(request, report, send)
        else:
            from .decoding import decode_video

            clip = decode_video(request, report, send)
        send("clip", clip)
    except InputError as error:
        send("error", str(error))
    except MemoryError:
        most = resource.getrlimit(resource.RLIMIT_DATA)[0] / 2**30
        send("error", f"{request.name}: reading it takes more than the {most:.1f} GiB that it may: convert it")


def _end_with(channel: socket.socket) -> None:
    channel.recv(1)  # returns at its end
    os._exit(1)
