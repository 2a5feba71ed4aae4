"""Seconds that the vision tower and each pass of the language model take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anchor.timing import Progress
from ..integrations.transformers.visual_tokens import find_multimodal_model


def gpus_of(model: PreTrainedModel) -> list[torch.device]:
    """The GPUs that hold a model."""
    return sorted({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}, key=str)


@dataclass
class _StageTimes:
    gpus: list[torch.device]
    vision: float = 0.0
    steps: list[float] = field(default_factory=list)
    _start: float = 0.0
    total: float = 0.0

    def now(self) -> float:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()

    def summary(self, ssc: float) -> dict[str, float]:
        """Seconds by stage. A step is one pass of the language model, without the scoring before the first."""
        first, decode = self.steps[0], sum(self.steps[1:])
        return {
            "vision": self.vision,
            "ssc": ssc,
            "prefill": first,
            "decode": decode,
            "decode_per_token": decode / max(len(self.steps) - 1, 1),
            "generate": self.total,
        }


@contextmanager
def stage_times(model: PreTrainedModel, progress: Progress | None) -> Iterator[_StageTimes]:
    """Times the vision tower and each pass of the language model (its layers only: the scores come before them)."""
    base = find_multimodal_model(model)
    tower: nn.Module = getattr(base, "visual", None) or base.vision_tower  # pyright: ignore[reportAssignmentType]
    times = _StageTimes(gpus_of(model))

    def start(*_: Any) -> None:
        times._start = times.now()

    def start_vision(*_: Any) -> None:
        if progress is not None:
            progress("vision", 0, 0)
        start()

    def end_vision(*_: Any) -> None:
        times.vision += times.now() - times._start

    def start_step(*_: Any) -> None:
        if progress is not None and not times.steps:
            progress("prefill", 0, 0)
        start()

    def end_step(*_: Any) -> None:
        times.steps.append(times.now() - times._start)
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
    begin = times.now()
    try:
        yield times
    finally:
        times.total = times.now() - begin
        for hook in hooks:
            hook.remove()
