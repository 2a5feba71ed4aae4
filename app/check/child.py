"""The process that touches the device: a task comes through the pipe, and its answer goes back."""

import os
import sys
import threading
import time
from multiprocessing.connection import Connection

_UNCOMPILED = ("CompilationError", "CompileTimeAssertionFailure", "OutOfResources", "PTXASError")


def main() -> None:
    """Ends with its parent, or after a failure, since the device may be of no more use to it then."""
    handle, device = sys.argv[-2:]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    pipe = Connection(int(handle))
    from .tasks import answer

    pipe.send(None)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(answer(task, device))
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            compiled = type(error).__name__ not in _UNCOMPILED and "PassManager::run failed" not in str(error)
            status = "failed" if compiled else "not compiled"
            pipe.send({"status": status, "reason": f"{type(error).__name__}: {line}"[:300]})
            os._exit(1)  # nothing of a lost device is tidied up


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
