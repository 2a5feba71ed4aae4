"""The process that opens a file which nobody has looked at.

It reads one line of JSON, the request, from its standard input, and answers on the pipe whose number is its argument (a
library may print to standard output) with lines of JSON:
{"progress": [stage, done, total]}, {"frame": [H, W, count], "seconds": its time} followed by H * W * 3 bytes of RGB,
and at last {"clip": {...}} or {"error": reason}. It ends when its input does, so that it never outlives its parent.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...integrations.errors import InputError
from . import limits
from .sampling import Choice

REPORT_SECONDS = 0.1


class _Answers:
    """Writes answers; frames of a size unlike the first's are scaled into it with black bars."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._last_report = 0.0
        self._size: tuple[int, int] | None = None
        self.n_scaled = 0

    def line(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer).encode() + b"\n")
        self._out.flush()

    def report(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._last_report >= REPORT_SECONDS:
            self._last_report = time.monotonic()
            self.line(progress=[stage, done, total])

    def frame(self, pixels: np.ndarray, seconds: float, count: int) -> None:
        from .views import letterbox

        if self._size is None:
            self._size = pixels.shape[0], pixels.shape[1]
        self.n_scaled += pixels.shape[:2] != self._size
        pixels = np.ascontiguousarray(letterbox(pixels, *self._size))
        self.line(frame=[*self._size, count], seconds=seconds)
        self._out.write(pixels.data)
        self._out.flush()


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where a scheduler ends all of a job, the parent ends this process
    limits.limit_process()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = _Answers(os.fdopen(int(sys.argv[1]), "wb"))
    try:
        answers.line(clip=_read(answers, Path(request["path"]), request["max_pixels"], Choice(**request["choice"])))
    except InputError as error:
        answers.line(error=str(error))
    except MemoryError:
        most = resource.getrlimit(resource.RLIMIT_DATA)[0] / 2**30
        answers.line(error=f"{request['path']}: reading it takes more than the {most:.1f} GiB that it may: convert it")
    return 0


def _read(answers: _Answers, path: Path, max_pixels: int, choice: Choice) -> dict[str, Any]:
    from . import views

    if views.is_views(path):
        return views.read_views(path, choice, max_pixels, answers.report, answers.frame)
    from .damage import Messages
    from .decoding import decode_video

    messages = Messages.of_this_process()
    clip = decode_video(path, choice, max_pixels, answers.report, answers.frame, messages)
    if answers.n_scaled:
        clip["notes"].append(f"{answers.n_scaled} frames of another size scaled into the first's with black bars")
    return clip


def _end_with_parent() -> None:
    os.read(0, 1)  # returns at the end of the input
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
