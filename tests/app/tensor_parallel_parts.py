"""What the processes of a split model hold in tests, in place of a `VideoModel`: without torch, as it takes long."""

import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from videoanchor_triton.app import tensor_parallel
from videoanchor_triton.app.batch.worker import BatchJob, BatchWorker
from videoanchor_triton.integrations.errors import InputError


def run_fake_part(*arguments: Any) -> None:
    """In place of `_run_part`: the same, without a group of torch."""
    tensor_parallel._join_group = lambda *_: None
    tensor_parallel._run_part(*arguments)


class Settings:
    """In place of a `VideoAnchorConfig`."""

    def to_dict(self) -> dict[str, Any]:
        return {}


@dataclass
class Result:
    """In place of a `Answer`."""

    text: str
    n_generated_tokens: int
    peak_memory_bytes: int
    n_prompt_tokens: int = 9
    n_visual_tokens: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "GPU"
    gate_effect: None = None
    anchor: Any = field(
        default_factory=lambda: SimpleNamespace(eigengap=None, in_gap=None, n_iter=0, residual=0.0, converged=True)
    )


class Answered(NamedTuple):
    """As that of `VideoModel`."""

    result: Result
    scores_cached: bool = False
    peak_host_memory_bytes: int = 1


class OutOfMemoryError(RuntimeError):
    """As that of torch."""


class FakePart:
    """No model, but a question may ask for a mishap. Leaves a line in the file `begun` of the folder of the scores for
    itself and for each question."""

    def __init__(self, progress: Any, size: int, *, model: str, scores: tuple[Path, int], **_: Any) -> None:
        self._begun, self._progress = scores[0] / "begun", progress
        self._first = os.environ["RANK"] == "0"
        (scores[0] / f"pid-{os.getpid()}").touch()
        if self._first:
            self._leave(f"{size} processes")
        if model == "missing":
            raise RefusalError("model missing cannot be loaded")
        again = model == "once" and len(list(scores[0].glob("pid-*"))) > 2
        if not self._first and (model == "too-large" or again):
            raise OutOfMemoryError("CUDA out of memory")
        if model == "loads for ever":
            time.sleep(1e6)
        progress("load", 0, 0)
        self._clips = 0

    def __str__(self) -> str:
        return "a part"

    def open(self, clip: Any, share: bool) -> None:
        assert clip == [("a clip",)]
        assert share
        self._clips += 1

    def answer(self, question: str) -> Answered:
        if self._first:
            self._leave(question)
        while question not in self._begun.read_text().splitlines():  # a mishap may end the first before it has begun
            time.sleep(0.01)
        self._progress("tokens", 1, 0)
        assert self._clips >= 1
        if question in MISHAPS:
            MISHAPS[question](self._first)
        text = question if self._first or question != "differs" else "another"
        n_tokens = 5 if not self._first and question == "differs in tokens" else 4
        return Answered(Result(text, n_tokens, 1000 if self._first else 234))

    def _leave(self, text: str) -> None:
        with self._begun.open("a") as file:
            file.write(f"{text}\n")


class RefusalError(InputError):
    """Cannot be made again from its text alone."""

    def __init__(self, *text: str) -> None:
        super().__init__(*text)
        self.made_by = lambda: text


def _dies(first: bool) -> None:
    if first:
        raise RuntimeError("closed by peer")  # gloo sees it sooner than anyone else
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _exits(first: bool) -> None:
    if first:
        time.sleep(1e6)
    os._exit(3)


def _hangs(first: bool) -> None:
    if not first:
        time.sleep(1e6)


def _fails(first: bool) -> None:
    if not first:
        raise KeyError("weights")
    time.sleep(1e6)


def _loses_the_device(first: bool) -> None:
    if first:
        raise RuntimeError("CUDA error: an illegal memory access")


def _needs_too_much(first: bool) -> None:
    if first:
        raise OutOfMemoryError("CUDA out of memory")
    time.sleep(1e6)


def _refuses(first: bool) -> None:
    del first
    raise RefusalError("not enough memory")


MISHAPS = {
    "dies": _dies,
    "exits": _exits,
    "hangs": _hangs,
    "fails": _fails,
    "loses the device": _loses_the_device,
    "needs too much": _needs_too_much,
    "refuses": _refuses,
}


class FakePlanner:
    """In place of a `Planner`: anything fits."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.problem = None

    def budget(self, *_: Any) -> "FakePlanner":
        return self


def use_fakes(setattr: Any) -> None:
    """Workers have fake parts, and read no video."""
    from videoanchor_triton.app import budget, video_model

    setattr(tensor_parallel, "_run_part", run_fake_part)
    setattr(video_model, "VideoModel", FakePart)
    setattr(budget, "Planner", FakePlanner)
    setattr(BatchWorker, "_read", lambda *_: ([FakeClip(("a clip",))], {}))


def fake_worker(job: BatchJob) -> BatchWorker:
    use_fakes(setattr)
    return BatchWorker(replace(job, config=Settings()))  # pyright: ignore[reportArgumentType]


class FakeClip(tuple[str, ...]):
    """In place of a `VideoClip`."""

    frames, notes = (1, 2), ("odd",)
