"""Seconds that the vision tower and each pass of the language model take."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anchor.timing import Mark, Progress, mark_time, seconds_between
from ..integrations.transformers.visual_tokens import find_multimodal_model
from .shared_vision import tower_of


def gpus_of(model: PreTrainedModel) -> list[torch.device]:
    """The GPUs that hold a model."""
    return sorted({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}, key=str)


@dataclass
class _StageTimes:
    """Begin and end of each stage, noted while the model runs and read in `summary`: no pass waits for a GPU."""

    begin: Mark
    end: Mark
    vision: list[tuple[Mark, Mark]] = field(default_factory=list)
    steps: list[tuple[Mark, Mark]] = field(default_factory=list)

    def summary(self, ssc: float) -> dict[str, float]:
        """Seconds by stage. A step is one pass of the language model, without the scoring before the first."""
        first, *steps = (seconds_between(*step) for step in self.steps)
        return {
            "vision": sum(seconds_between(*call) for call in self.vision),
            "ssc": ssc,
            "prefill": first,
            "decode": sum(steps),
            "decode_per_token": sum(steps) / max(len(steps), 1),
            "generate": seconds_between(self.begin, self.end),
        }


@contextmanager
def stage_times(model: PreTrainedModel, progress: Progress | None) -> Iterator[_StageTimes]:
    """Times the vision tower and each pass of the language model (its layers only: the scores come before them)."""
    base = find_multimodal_model(model)
    tower = tower_of(model)
    gpus = gpus_of(model)
    begin = last = _now(gpus)
    times = _StageTimes(begin, begin)

    def start(*_: Any) -> None:
        nonlocal last
        last = _now(gpus)

    def start_vision(*_: Any) -> None:
        if progress is not None:
            progress("vision", 0, 0)
        start()

    def end_vision(*_: Any) -> None:
        times.vision.append((last, _now(gpus)))

    def start_step(*_: Any) -> None:
        if progress is not None and not times.steps:
            progress("prefill", 0, 0)
        start()

    def end_step(*_: Any) -> None:
        times.steps.append((last, _now(gpus)))
        if progress is not None:
            progress("tokens", len(times.steps), 0)

    text: nn.Module = base.language_model  # pyright: ignore[reportAssignmentType]
    hooks = [
        tower.register_forward_pre_hook(start_vision),
        tower.register_forward_hook(end_vision),
        # registered after the gate's hook, so it runs when the scores are there
        text.register_forward_pre_hook(start_step),
        text.register_forward_hook(end_step),
    ]
    try:
        yield times
    finally:
        times.end = _now(gpus)
        for hook in hooks:
            hook.remove()


def _now(gpus: list[torch.device]) -> Mark:
    """When all that is queued on these GPUs is done, on the first one's clock: it waits for the others, the host for
    none of them. Two events can be compared on one GPU only."""
    if not gpus:
        return mark_time(torch.device("cpu"))
    first, *others = gpus
    for gpu in others:
        torch.cuda.current_stream(first).wait_event(mark_time(gpu))  # pyright: ignore[reportArgumentType]
    return mark_time(first)
