"""Several questions about the same video or videos: the prompt up to the end of the last is prefilled once, and its
cache, which carries the scores, is continued by each question."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...anchor.config import VideoAnchorConfig
from ...anchor.timing import Progress
from ...integrations.transformers.backbones import visual_token_ids
from ...integrations.transformers.visual_tokens import find_multimodal_model
from ..answer import Answer
from ..budget import check_fits
from ..pipeline import Prefix, gated, generate, prepare, scored
from ..prompt import Messages
from ..score_cache import ScoreCache
from ..stage_times import stage_times
from ..token_sampling import TokenSampling
from ..video.reader import Clips


class SharedPrefill:
    """Answers questions about one video as `pipeline.answer` does.

    Vision tower, scores and the prompt up to the end of the video are computed for the first question, and their times
    count there. A prompt that begins otherwise (a chat template that puts the question before the
    video) is computed whole; it still finds its scores in `scores`. A shared beginning is computed in one pass and the
    question in another, which rounds differently than one pass, as with any cache of prefixes.

    Args:
        model, processor: from `pipeline.load`.
        config, max_new_tokens, drawn, progress: see `pipeline.answer`.
        scores: where scores are kept; None computes them anew.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        clips: Clips,
        config: VideoAnchorConfig,
        *,
        max_new_tokens: int = 128,
        scores: ScoreCache | None = None,
        drawn: TokenSampling | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._processor, self._clips = model, processor, clips
        self._config, self._scores = config, scores
        self._max_new_tokens, self._drawn, self._progress = max_new_tokens, drawn, progress
        self._beginning: Tensor | None = None
        self._prefix: Prefix | Exception | None = None

    def answer(self, question: Messages) -> Answer:
        """Asks one question.

        Raises:
            InputError: see `pipeline.answer`; where the shared beginning fails, the same for every question.
        """
        inputs, grids = prepare(self._model, self._processor, self._clips, question)
        n_prompt = inputs["input_ids"].shape[1]
        check_fits(self._model, n_prompt, self._max_new_tokens, self._clips, grids, self._config)
        options: dict[str, Any] = {
            "max_new_tokens": self._max_new_tokens,
            "scores": self._scores,
            "drawn": self._drawn,
            "progress": self._progress,
        }
        arguments = self._model, self._processor, inputs, grids, self._config
        first = self._prefix is None
        if first:
            self._prefill(inputs)
        prefix = self._prefix
        if isinstance(prefix, Exception):
            raise prefix
        assert prefix is not None
        assert self._beginning is not None
        n_shared = self._beginning.shape[1]
        # decode="prefill" takes a step of one token for decoding
        if n_prompt < n_shared + 2 or not torch.equal(inputs["input_ids"][:, :n_shared], self._beginning):
            return generate(*arguments, **options)
        for name in [name for name in inputs if name.startswith("pixel")]:
            del inputs[name]
        with torch.inference_mode():
            result = generate(*arguments, prefix=replace(prefix, cache=copy.deepcopy(prefix.cache)), **options)
        if not first:
            return result
        return replace(
            result, seconds={stage: value + prefix.seconds.get(stage, 0.0) for stage, value in result.seconds.items()}
        )

    def _prefill(self, inputs: dict[str, Any]) -> None:
        ids: Tensor = inputs["input_ids"]
        tokens = list(visual_token_ids(find_multimodal_model(self._model).config).values())
        n_shared = int(torch.isin(ids[0], torch.tensor(tokens, device=ids.device)).nonzero()[-1]) + 1
        beginning = {name: value[:, :n_shared] if value.shape == ids.shape else value for name, value in inputs.items()}
        try:
            with (
                gated(self._model, self._config, self._scores, self._progress) as handle,
                stage_times(self._model, self._progress) as times,
            ):
                output = self._model(**beginning, use_cache=True, logits_to_keep=1)
                anchor = scored(handle)
            seconds = times.summary(sum(anchor.seconds.values()))
            self._prefix = Prefix(output.past_key_values, anchor, seconds)
            self._beginning = beginning["input_ids"]
        except Exception as error:
            self._prefix = error
