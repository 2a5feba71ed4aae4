"""The prompt of a finished run through its model once more, with the scores it had, for what a run does not keep."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...anchor.config import VideoAnchorConfig
from ...anchor.problem import as_tokens, token_features
from ...anchor.scores import shared_expression_score, token_expression
from ...anchor.solver import SelfExpression
from ...anchor.timing import Progress
from ...integrations.errors import InputError
from ...integrations.transformers.backbones import visual_token_ids
from ...integrations.transformers.enable import enable
from ...integrations.transformers.visual_tokens import find_multimodal_model
from .. import pipeline
from ..text import asked
from ..video.reader import Clips
from .attention_share import SharesRecord, record_visual_share
from .finished_run import FinishedRun


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What `prefill` found.

    Args:
        tokens: (N, D) visual tokens as they stand in the decoder's input, on the model's device.
        config: the run's settings, with the recorded scores in place of a scorer that is a function.
        shares: of attention, if asked for.
    """

    tokens: Tensor
    config: VideoAnchorConfig
    shares: SharesRecord | None


def prefill(model: PreTrainedModel, processor: Any, clips: Clips, run: FinishedRun, *, with_shares: bool) -> Prefilled:
    """One prefill of the run's prompt, gated by the run's scores; nothing is scored again.

    Args:
        model, processor: of `pipeline.load`.
        clips: the run's frames.
        with_shares: record the share of attention on the visual tokens.

    Raises:
        InputError: when the settings of the run cannot be read, the model makes other visual tokens than the run had,
            or its attention cannot be measured.
    """
    tokens: list[Tensor] = []

    def recorded(found: Tensor) -> Tensor:
        if len(found) != len(run.scores):
            raise InputError(
                f"the model makes {len(found)} visual tokens of this video, the run had {len(run.scores)}: give the "
                f"model and the video of the run"
            )
        tokens.append(found)
        return torch.from_numpy(run.scores)

    try:
        settings = {**run.record["config"], "scorer": recorded, "keep": 1}  # of every token, merged or not
        settings.pop("score", None)  # of scorer ssc or knn
        config = VideoAnchorConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{run.folder / 'result.json'}: config cannot be read ({error}): run `videoanchor run` again"
        ) from error
    inputs, _ = pipeline.prepare(model, processor, clips, asked(run.record["question"], run.record.get("system")))
    base = find_multimodal_model(model)
    ids = torch.tensor(list(visual_token_ids(base.config).values()), device=inputs["input_ids"].device)
    visual = torch.isin(inputs["input_ids"][0], ids)
    if with_shares and bool(visual[-1]):
        raise InputError("the prompt of this model has no text after the video, whose attention could be measured")
    measure = record_visual_share(visual) if with_shares else nullcontext()
    try:
        with enable(model, config), torch.inference_mode(), measure as shares:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)  # pyright: ignore
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(f"not enough memory for {len(run.scores)} visual tokens: use another --device") from error
    if shares is not None and not shares.layers:
        raise InputError(
            f"{type(model).__name__} takes its mask as a matrix, for which the attention is not measured: leave "
            f"'attention' out of --what"
        )
    return Prefilled(tokens[0], config, shares)


def coefficients(prefilled: Prefilled, run: FinishedRun, progress: Progress | None = None) -> SelfExpression:
    """The self-expression W of the tokens by the run's settings; of a run without one, that of scorer "ssc".

    Raises:
        InputError: when the memory does not hold what the solver needs.
    """
    tokens, config = as_tokens(prefilled.tokens), prefilled.config
    try:
        features = token_features(tokens, config.pca_rank)
        scorer = "knn" if run.record["config"].get("scorer") == "knn" else "ssc"
        return token_expression(features, config, scorer, progress)
    except MemoryError as error:
        raise InputError(f"the self-expression does not fit: {error}") from error


def difference_to_recorded(solution: SelfExpression, run: FinishedRun) -> float | None:
    """The largest |published score computed from W again - recorded score|: 0 but for rounding where model, video and
    dtype are the run's. None where the run had other scores."""
    config = {"score": "published", **run.record["config"]}
    kind = config.get("scorer") in ("ssc", "knn"), config.get("arithmetic"), config["score"]
    if kind != (True, "exact", "published"):
        return None
    labels = torch.from_numpy(run.labels)
    scores = shared_expression_score(solution.row_sums().cpu(), labels, int(labels.amax()) + 1)
    return float((scores - torch.from_numpy(run.scores)).abs().amax())
