"""What each process does among which a model is split: the first one leads, the others follow.

The leader reads, plans, decides and writes. It sends the others every clip and every question that it asks its part of
the model, so that all of them do the same and the model's collectives meet. Whatever fails while the model is asked
ends the process, and with it the group: nobody knows in which collective the others are.
"""

import json
import os
import select
import sys
import threading
import time
import zlib
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from ...integrations.errors import InputError
from .worker import BatchJob, BatchWorker, load_rows

if TYPE_CHECKING:  # these import transformers, which has to be prepared
    from transformers import PreTrainedModel

    from ...anchor.config import VideoAnchorConfig
    from ..pipeline import Answer
    from ..video.reader import VideoClip
    from .shared_prefill import SharedPrefill

_COLLECTIVES = timedelta(hours=2)
"""For those of the model; others may wait for the leader to solve for the scores."""
_MESSAGES = timedelta(days=365)
"""Followers wait for the next question."""
_LEADER_WAITS, _FOLLOWER_WAITS = 2.0, 5.0
"""Seconds before a failure is told: the leader may have failed because a follower has died, which torchrun then tells;
a follower fails where the leader does, which knows the cause."""


class Channel:
    """Messages from the leader to all others, apart from the collectives of the model."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_COLLECTIVES)
        self.size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_MESSAGES)

    def send(self, message: dict[str, Any]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), 0, group=self._group)
        dist.broadcast(data, 0, group=self._group)

    def receive(self) -> dict[str, Any]:
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0, group=self._group)
        data = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return json.loads(data.numpy().tobytes())

    def send_clip(self, clip: "VideoClip") -> None:
        about = {name: value for name, value in vars(clip).items() if name != "frames"}
        about |= {"timestamps": clip.timestamps.tolist(), "indices": clip.indices.tolist()}
        self.send({"shape": clip.frames.shape, "about": about})
        for frame in clip.frames:
            dist.broadcast(torch.from_numpy(frame.copy()), 0, group=self._group)

    def receive_clip(self) -> "VideoClip":
        from ..video.reader import VideoClip

        message = self.receive()
        about: dict[str, Any] = message["about"]
        about |= {"timestamps": np.array(about["timestamps"]), "indices": np.array(about["indices"])}
        about |= {"notes": tuple(about["notes"]), "names": tuple(about["names"])}
        frames = np.empty(message["shape"], dtype=np.uint8)
        for frame in frames:
            dist.broadcast(torch.from_numpy(frame), 0, group=self._group)
        return VideoClip(frames, **about)

    def agreed(self, result: "Answer") -> "Answer":
        """`result` with the memory of all processes.

        Raises:
            RuntimeError: they have not generated the same.
        """
        mine = [zlib.crc32(result.text.encode()), result.n_generated_tokens, result.peak_memory_bytes or 0]
        all_of_them = [torch.zeros(len(mine), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(all_of_them, torch.tensor(mine), group=self._group)
        if len({tuple(one.tolist()[:2]) for one in all_of_them}) > 1:
            raise RuntimeError("the processes that share the model have generated different answers")
        if result.peak_memory_bytes is None:
            return result
        return replace(result, peak_memory_bytes=sum(int(one[2]) for one in all_of_them))


class Leader:
    """The first process. Its methods stand for `pipeline.load`, `SharedPrefill` and `pipeline.answer`, in all
    processes.

    Attributes:
        size: processes.
        broken: a question has failed; the group cannot be asked anything more.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel, self.size, self.broken = channel, channel.size, False

    def load(self, name_or_path: str, device: str, dtype: str) -> "tuple[PreTrainedModel, Any]":
        from .. import pipeline

        self._channel.send({"load": [str(name_or_path), device, dtype]})
        return pipeline.load(name_or_path, device, dtype, self.size)

    def video(
        self,
        model: "PreTrainedModel",
        processor: Any,
        clip: "VideoClip",
        config: "VideoAnchorConfig",
        *,
        share: bool,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> "_LedVideo":
        from .shared_prefill import SharedPrefill

        shared = {"share": share, "max_new_tokens": max_new_tokens}
        self._channel.send({"config": config.to_dict(), "options": shared})
        self._channel.send_clip(clip)
        video = SharedPrefill(model, processor, clip, config, **shared, **options)
        return _LedVideo(self, video, self._channel)

    def answer(
        self,
        model: "PreTrainedModel",
        processor: Any,
        clip: "VideoClip",
        question: str,
        config: "VideoAnchorConfig",
        **options: Any,
    ) -> "Answer":
        return self.video(model, processor, clip, config, share=False, **options).answer(question)

    def end(self) -> None:
        """The others end."""
        self._channel.send({"end": True})


class _LedVideo:
    """A `SharedPrefill` of all processes."""

    def __init__(self, leader: Leader, video: "SharedPrefill", channel: Channel) -> None:
        self._leader, self._video, self._channel = leader, video, channel

    def answer(self, question: str) -> "Answer":
        try:
            self._channel.send({"question": question})
            return self._channel.agreed(self._video.answer(question))
        except Exception as error:
            self._leader.broken = True
            if not isinstance(error, InputError):
                time.sleep(_LEADER_WAITS)
            raise


def _follow(channel: Channel) -> None:
    """Does what the leader does, until it ends."""
    from ..commands.shared import prepare_libraries

    prepare_libraries()
    from ...anchor.config import VideoAnchorConfig
    from .. import pipeline
    from .shared_prefill import SharedPrefill

    model: Any = None
    processor: Any = None
    video: Any = None
    while "end" not in (message := channel.receive()):
        if "load" in message:
            model, processor = pipeline.load(*message["load"], tensor_parallel=channel.size)
        elif "config" in message:
            clip, config = channel.receive_clip(), VideoAnchorConfig(**message["config"])
            video = SharedPrefill(model, processor, clip, config, **message["options"])
        else:
            channel.agreed(video.answer(message["question"]))


def _answer_rows(leader: Leader, out: Any) -> int:
    """Answers what standard input asks for: a line with the job, then a line for the rows of each video."""

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    job = BatchJob.from_json(sys.stdin.readline())
    try:
        worker = BatchWorker(job, lambda *progress: say(progress=progress), leader)
    except InputError as error:
        say(refused=str(error))
        return 2
    say(ready=True)
    for line in sys.stdin:
        for answer in worker.answer(load_rows(line)):
            say(record=answer, broken=leader.broken)
            if leader.broken:
                return 1
    return 0


def _end_with_parent() -> None:
    """Standard input is a pipe from the process that asked for all of this: its end is the end of this one."""
    poll = select.poll()
    poll.register(0, 0)  # only that the other side is gone
    poll.poll()
    os._exit(1)


@record
def main() -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    command = sys.argv[1:]
    if os.environ["RANK"] != "0":
        for stream in (1, 2):  # the leader speaks
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            _follow(Channel())
        except Exception:
            time.sleep(_FOLLOWER_WAITS)
            raise
        return 0
    if not command:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever prints, `out` has only messages
        return _answer_rows(Leader(Channel()), out)
    from ..cli import main as run_command

    leader = Leader(Channel())
    code = run_command(command, leader)
    if code == 0:
        leader.end()
    return code


if __name__ == "__main__":
    exit_code = int(main() or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread of gloo that lets go of a tensor while the interpreter ends aborts the process.
    os._exit(exit_code)
