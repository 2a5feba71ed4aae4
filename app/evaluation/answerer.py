"""A checkpoint that answers the questions of an evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...anchor.timing import Progress
from .. import pipeline
from ..score_cache import ScoreCache
from ..video.reader import VideoClip
from .evaluate import Setting
from .questions import Question

SCORES_BYTES = 2**30
"""The most that scores may take on disk."""


class Asker:
    """Asks a checkpoint; a video that is asked about again is not decoded again, its tokens are not scored again.

    Args:
        model, processor: of `pipeline.load`.
        read: the clip of a file, with at most so many frames.
        scores: folder where scores are kept; alphas do not change them.
        max_new_tokens: the longest reply.
        progress: see `pipeline.answer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        read: Callable[[Path, int], VideoClip],
        scores: Path,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self._read, self._max_new_tokens, self._progress = read, max_new_tokens, progress
        self.scores = ScoreCache(scores, SCORES_BYTES)
        self._clip: tuple[tuple[Path, int], VideoClip] | None = None

    def __call__(self, question: Question, setting: Setting) -> str:
        """The reply.

        Raises:
            InputError: see `read_video` and `pipeline.answer`.
        """
        return pipeline.answer(
            self.model,
            self.processor,
            self.clip(question.video, setting.max_frames),
            question.prompt(),
            setting.config,
            max_new_tokens=self._max_new_tokens,
            scores=None if setting.config.scorer == "uniform" else self.scores,  # nothing to keep
            progress=self._progress,
        ).text

    def clip(self, video: Path, max_frames: int) -> VideoClip:
        """The frames of a video; the last ones are kept."""
        if self._clip is None or self._clip[0] != (video, max_frames):
            self._clip = (video, max_frames), self._read(video, max_frames)
        return self._clip[1]
