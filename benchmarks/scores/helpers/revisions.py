"""Other revisions of the package, each in a process of its own, so that one run compares them."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("revision_worker.py")


class FailedError(Exception):
    """A revision could not do what was asked; the text says why."""


def checkout(revision: str, folder: Path) -> Path:
    """The `src` of a commit, unpacked into a folder; of a path to another working tree, or of ".", that tree's."""
    if Path(revision).is_dir():
        return Path(revision).resolve() / "src"
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=False)
    if archive.returncode:
        raise FailedError(f"{revision} is neither a folder nor a commit here: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="tar")
    return folder / "src"


class Revision:
    """A process that scores tokens with the package of one `src`, on so many threads; see revision_worker.py."""

    def __init__(self, src: Path, threads: int = 1) -> None:
        settings = {"PYTHONPATH": str(src), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=os.environ | settings, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """What the worker answers.

        Raises:
            FailedError: the process ended, or what was asked raised.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # there is no answer then either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines() or [""]
            raise FailedError(f"the process ended with {self._process.returncode}: {said[-1]}")
        found = json.loads(answer)
        if "error" in found:
            raise FailedError(found["error"])
        return found

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # it ended before it was asked
                if stream is not None:
                    stream.close()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> "Revision":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
