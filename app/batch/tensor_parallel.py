"""A model split among processes (tensor parallel), from outside: they are started, asked, and ended.

Each process has a GPU of its own, or on a CPU a part of the work. The first of them reads what this one writes to the
standard input of all, and answers. They end when this process does, however it ends.
"""

import json
import os
import select
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..threads import usable_cpus
from .results import Record
from .rows import BatchRow
from .worker import BatchJob, dump_rows, failed

if TYPE_CHECKING:  # it imports torch
    from ...anchor.timing import Progress
    from .job import Groups

_LAUNCH = f"{__package__}.tensor_parallel_launch"
_SILENCE = 3600.0
"""Seconds without a token, an iteration or a stage, after which the processes are taken to hang: loading is silent."""
_PATIENCE = 60.0
"""Seconds for them to end; torchrun kills those that it cannot stop in 30."""


class ProcessGroup:
    """The processes of a split model.

    Args:
        size: how many.
        device: "cpu" hides the GPUs from them.
        arguments: see tensor_parallel_process.py.
        stdout: as of `subprocess.Popen`.
    """

    def __init__(self, size: int, device: str, *arguments: str, stdout: int | None = None) -> None:
        environment = {
            "OMP_NUM_THREADS": str(max(usable_cpus() // size, 1)),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._reasons, reasons = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _LAUNCH, str(size), str(reasons), *arguments],
                stdin=subprocess.PIPE,
                stdout=stdout,
                bufsize=0,
                env=environment,
                pass_fds=(reasons,),
                start_new_session=True,  # Ctrl-C reaches this process alone
            )
        finally:
            os.close(reasons)
        self._read = b""
        self._ended: tuple[int, str] | None = None

    def running(self) -> bool:
        return self._process.poll() is None

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `message` says why
            self._process.stdin.write(line.encode() + b"\n")

    def message(self) -> dict[str, Any]:
        """What the first process writes next.

        Raises:
            ChildProcessError: the processes have ended, or hang.
        """
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._read:
            if not select.select([pipe], [], [], _SILENCE)[0]:
                self.end()
                raise ChildProcessError(f"the processes that share the model did nothing for {_SILENCE:g} s")
            chunk = os.read(pipe, 2**16)
            if not chunk:
                _, reason = self.end()
                raise ChildProcessError(f"the processes that share the model ended: {reason or 'no reason given'}")
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def wait(self) -> None:
        self._process.wait()

    def end(self) -> tuple[int, str]:
        """Ends all of them.

        Returns:
            the exit code, and why a process had ended before, "" where none had.
        """
        if self._ended is None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                code = self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
            with open(self._reasons) as reasons:
                self._ended = code, reasons.read()
        return self._ended


class TensorParallelWorker:
    """Answers rows as `BatchWorker` does, by a model split among processes.

    A row at which they end or hang fails, and others are started for the rows after it. A row that fails while the
    model is asked ends them as well.

    Args:
        job: see `BatchJob`.
        size: processes.
        progress: see `BatchWorker`.

    Raises:
        InputError: the checkpoint cannot be loaded or split.
        ChildProcessError: the processes ended while they loaded it; also from `answer`, when others are started.
    """

    def __init__(self, job: BatchJob, size: int, progress: "Progress | None" = None) -> None:
        self._job, self._size, self._progress = job, size, progress
        self._settings_hash = job.settings_hash()
        self._group: ProcessGroup | None = None
        self._running()

    def close(self) -> None:
        """Ends the processes."""
        if self._group is not None:
            self._group.end()
            self._group = None

    def answer(self, rows: Sequence[BatchRow]) -> Iterator[Record]:
        """See `BatchWorker.answer`."""
        waiting = deque(rows)
        try:
            while waiting:
                group = self._running()
                group.write(dump_rows(waiting))
                while waiting and self._group is group:
                    yield self._record(group, waiting.popleft())
        finally:
            if waiting:  # nobody will read their answers
                self.close()

    def _record(self, group: ProcessGroup, row: BatchRow) -> Record:
        try:
            message = self._next(group)
        except ChildProcessError as error:
            self.close()
            return failed(row, self._settings_hash, str(error))
        record: Record = message["record"]
        if message["broken"]:
            self.close()
            if record.get("failure") == "accelerator":
                record["failure"] = "other"  # the processes that are started next can use it
        return record

    def _running(self) -> ProcessGroup:
        """The group, a new one if there is none or it has ended."""
        if self._group is None or not self._group.running():
            self.close()
            self._group = ProcessGroup(self._size, self._job.device, stdout=subprocess.PIPE)
            try:
                self._group.write(self._job.to_json())
                message = self._next(self._group)
                if "refused" in message:
                    raise InputError(message["refused"])
            except BaseException:
                self.close()
                raise
        return self._group

    def _next(self, group: ProcessGroup) -> dict[str, Any]:
        """The next message that is not of progress."""
        while "progress" in (message := group.message()):
            if self._progress is not None:
                self._progress(*message["progress"])
        return message


def tensor_parallel_engine(
    job: BatchJob, groups: "Groups", *, size: int, progress: "Progress | None" = None
) -> Iterator[Record]:
    """One model, split among `size` processes of this machine."""
    with closing(TensorParallelWorker(job, size, progress)) as worker:
        for rows in groups:
            yield from worker.answer(rows)


def run_split(arguments: Sequence[str], size: int, device: str) -> int:
    """Runs a command of `videoanchor` in processes that split its model; the first of them prints and writes.

    Returns:
        the exit code.

    Raises:
        ChildProcessError: a process failed that could not say so itself.
    """
    group = ProcessGroup(size, device, *arguments)
    try:
        group.wait()
    finally:
        code, reason = group.end()
    if reason:
        raise ChildProcessError(reason)
    return code
