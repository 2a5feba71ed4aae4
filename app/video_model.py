"""A loaded checkpoint that is asked about one video after another: whole, or the part of one process."""

import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..anchor.config import VideoAnchorConfig
from ..anchor.timing import Progress
from . import pipeline
from .answer import Answer
from .batch.shared_prefill import SharedPrefill
from .libraries import prepare_libraries
from .prompt import Messages
from .score_cache import ScoreCache
from .token_sampling import TokenSampling
from .video.reader import Clips


class Answered(NamedTuple):
    """What `VideoModel.answer` returns.

    Args:
        result: see `pipeline.answer`; the scores are on the CPU.
        scores_cached: they were found on disk.
        peak_host_memory_bytes: what the process that holds the model has held at most.
    """

    result: Answer
    scores_cached: bool
    peak_host_memory_bytes: int


class VideoModel:
    """Answers questions about one video after another.

    Args:
        progress: see `pipeline.answer`.
        tensor_parallel, model, device, dtype: see `pipeline.load`.
        config, max_new_tokens, drawn: see `pipeline.answer`.
        scores: the folder and the bytes of a `ScoreCache`; None computes scores anew.
        gate_effect: see `pipeline.answer`; questions about one video then share nothing but scores.

    Raises:
        InputError: the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        progress: Progress | None = None,
        tensor_parallel: int = 1,
        *,
        model: str,
        device: str,
        dtype: str,
        config: VideoAnchorConfig,
        max_new_tokens: int,
        scores: tuple[Path, int] | None = None,
        gate_effect: bool = False,
        drawn: TokenSampling | None = None,
    ) -> None:
        prepare_libraries()
        self._model, self._processor = pipeline.load(model, device, dtype, tensor_parallel)
        self._scores = None if scores is None else ScoreCache(*scores)
        self._options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "scores": self._scores,
            "drawn": drawn,
            "progress": progress,
        }
        self._config, self._gate_effect = config, gate_effect
        self._clips: Clips | None = None
        self._shared: SharedPrefill | None = None

    def __str__(self) -> str:
        model = self._model
        return f"{type(model).__name__} on {model.device}, {str(model.dtype).removeprefix('torch.')}"

    def open(self, clips: Clips, share: bool = False) -> None:
        """Has the next questions be about `clips`, as long as it is the same object.

        Args:
            share: several questions will come, see `SharedPrefill`; False, and tokens that are merged, which only
                `generate()` does, compute every prompt whole.
        """
        if clips is not self._clips:
            arguments = self._model, self._processor, clips, self._config
            alone = self._gate_effect or self._config.merges
            self._shared = SharedPrefill(*arguments, **self._options) if share and not alone else None
            self._clips = clips

    def answer(self, question: Messages) -> Answered:
        """Asks one question.

        Raises:
            InputError: see `pipeline.answer`.
        """
        assert self._clips is not None
        hits = 0 if self._scores is None else self._scores.hits
        if self._shared is not None:
            result = self._shared.answer(question)
        else:
            arguments = self._model, self._processor, self._clips, question, self._config
            result = pipeline.answer(*arguments, gate_effect=self._gate_effect, **self._options)
        anchor = result.anchor
        found = {name: getattr(anchor, name) for name in ("scores", "labels", "duality_gap")}
        on_host = {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}
        result = replace(result, anchor=replace(anchor, **on_host))  # for another process
        cached = self._scores is not None and self._scores.hits > hits
        unit = 1 if sys.platform == "darwin" else 1024
        return Answered(result, cached, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def close(self) -> None:
        """As of `SplitModel`; there is nothing to end."""
