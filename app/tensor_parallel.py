"""A model split among processes (tensor parallel), each with a GPU of its own, or on a CPU a part of the work.

All of them get every call, so that they do the same and the model's collectives meet. Nobody knows in which collective
they are once one has failed: all are ended then, and they end with the process that has started them, however it ends.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from ..integrations.errors import InputError
from .threads import usable_cpus

if TYPE_CHECKING:  # these import torch
    from ..anchor.timing import Progress
    from .prompt import Messages
    from .video.reader import Clips
    from .video_model import Answered, VideoModel

_SILENCE = 3600.0
"""Seconds without an answer, a token, an iteration or a stage, after which processes are taken to hang: loading is
silent."""
_DEATH = 2.0
"""Seconds until a death is seen: it is the cause of what the others fail of."""
_COLLECTIVES = timedelta(hours=2)
"""They may wait for the first process to solve for the scores."""
_ENDED = "the processes that share the model ended"


class SplitModel:
    """A `VideoModel` of several processes.

    Args:
        make: makes the part of one of them, there, from what takes its progress and `size`.
        size: processes.
        device: "cpu" hides the GPUs from them.
        progress: of the first of them.

    Raises:
        InputError: the checkpoint cannot be loaded or split.
        ChildProcessError: a process has failed, died or hung, the message names it, and all are ended. From `answer` as
            well: the next `open` starts others.
    """

    def __init__(
        self, make: "Callable[[Progress, int], VideoModel]", size: int, device: str, progress: "Progress | None" = None
    ) -> None:
        self._make, self._size, self._device, self._progress = make, size, device, progress
        self._parts: dict[Connection, BaseProcess] = {}
        self._store: Any = None
        self._clips: tuple[Clips, bool] | None = None
        self._sent: Clips | None = None
        self._start()

    def __str__(self) -> str:
        return self._call("__str__")[0]

    def open(self, clips: "Clips", share: bool = False) -> None:
        """See `VideoModel.open`."""
        if not self._parts:
            self._start()
        self._clips = clips, share

    def answer(self, question: "Messages") -> "Answered":
        """See `VideoModel.answer`; the memory is that of all processes."""
        assert self._clips is not None
        if self._clips[0] is not self._sent:
            self._call("open", *self._clips)
            self._sent = self._clips[0]
        answers: list[Answered] = self._call("answer", question)
        results = [answered.result for answered in answers]
        if len({(result.text, result.n_generated_tokens) for result in results}) > 1:
            self.close()
            raise ChildProcessError("the processes that share the model have generated different answers")
        memory = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
        return answers[0]._replace(result=replace(results[0], peak_memory_bytes=sum(memory) if memory else None))

    def close(self) -> None:
        """Ends the processes. Nothing is lost: what they keep on disk are whole files."""
        for process in self._parts.values():
            process.kill()
        for connection, process in self._parts.items():
            process.join()
            connection.close()
        self._parts, self._store, self._sent = {}, None, None

    def _start(self) -> None:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        context = get_context("spawn")
        resource_tracker.ensure_running()  # it would unblock signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for this process
        try:
            for rank in range(self._size):
                ours, theirs = context.Pipe()
                arguments = (rank, self._size, self._device, self._store.port, theirs)
                process = context.Process(target=_run_part, args=arguments, daemon=True)
                process.start()
                self._parts[ours] = process
                theirs.close()  # the process has the only one left, so that its end shows
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._call(self._make)

    def _call(self, what: Any, *arguments: Any) -> list[Any]:
        """What each process returns."""
        try:
            for connection in self._parts:
                with suppress(ConnectionError):  # what is received, or not, says why
                    connection.send((what, arguments))
            answers: dict[Connection, Any] = {}
            while len(answers) < self._size:
                for connection, (kind, value) in self._received(self._parts.keys() - answers.keys()):
                    if kind == "answer":
                        answers[connection] = value
                    elif kind == "error":
                        raise value if isinstance(value, InputError) else self._death() or value
                    elif self._progress is not None:
                        self._progress(*value)
            return [answers[connection] for connection in self._parts]
        except BaseException:
            self.close()
            raise

    def _received(self, missing: set[Connection]) -> Iterator[tuple[Connection, tuple[str, Any]]]:
        """The next messages of the processes that have not answered yet."""
        ready = wait(missing, _SILENCE)
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionError) as error:
                raise self._death() or error from None
            yield connection, pickle.loads(message)
        if not ready:
            numbers = [str(n) for n, connection in enumerate(self._parts, 1) if connection in missing]
            raise ChildProcessError(
                f"{_ENDED}: process {', '.join(numbers)} of {self._size} did nothing for {_SILENCE:g} s"
            )

    def _death(self) -> ChildProcessError | None:
        ending = wait([process.sentinel for process in self._parts.values()], _DEATH)
        for number, process in enumerate(self._parts.values(), 1):
            if process.sentinel in ending:
                process.join()
                code = process.exitcode or 0
                how = f"Signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
                return ChildProcessError(f"{_ENDED}: process {number} of {self._size}: {how}")
        return None


def _run_part(rank: int, size: int, device: str, port: int, connection: Connection) -> None:
    """What each process does: as it is told, until it is killed. It never ends as Python does: a thread of gloo that
    lets go of a tensor meanwhile would abort it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what prints is no output of the command
    if rank:
        for stream in (1, 2):  # the first one speaks
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cpus() // size, 1)))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))  # whole: `send` would share the memory of tensors

    def progress(*of: Any) -> None:
        if rank == 0:
            send("progress", of)

    part: Any = None
    while True:
        what, arguments = connection.recv()
        try:
            if part is None:
                _join_group(rank, size, port)
                part, answer = what(progress, size), None
            else:
                answer = getattr(part, what)(*arguments)
        except InputError as error:
            send("error", InputError(str(error)))
        except Exception as error:
            text = f"process {rank + 1} of {size}: {type(error).__name__}: {error}"
            send("error", ChildProcessError(text))
        else:
            send("answer", answer)


def _join_group(rank: int, size: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    store = dist.TCPStore("localhost", port)  # pyright: ignore[reportPrivateImportUsage]
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": size, "timeout": _COLLECTIVES}
    dist.init_process_group("nccl" if cuda else "gloo", **options)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
