"""The scores of a prompt, kept on its cache by position, so that whatever happens to the cache happens to them."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..anchor.config import VideoAnchorConfig
from ..kernels.gates import POST_EXP_LIMIT
from .attention import LayerGate

AUTHORS_EPS = 1e-6
_ATTRIBUTE = "videoanchor_scores"


class CacheScores:
    """The scores of a prompt, (B, T) fp32 by cache position; positions from T on are text and score 0."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self._gate: tuple[VideoAnchorConfig, LayerGate] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheScores":
        return CacheScores(self.scores.clone())

    def gate(self, config: VideoAnchorConfig) -> LayerGate:
        """The factors 1 + alpha * score (arXiv 2509.25151), computed once for each config."""
        if self._gate is None or self._gate[0] is not config:
            self._gate = (
                config,
                _authors_gate(self.scores, config)
                if config.arithmetic == "authors"
                else _exact_gate(self.scores, config),
            )
        return self._gate[1]


def _exact_gate(scores: Tensor, config: VideoAnchorConfig) -> LayerGate:
    return LayerGate(
        gamma_k=1.0 + config.alpha_k * scores if config.alpha_k else None,
        gamma_v=1.0 + config.alpha_v * scores if config.alpha_v else None,
        gate_form="post-exp" if 1.0 + config.alpha_k <= POST_EXP_LIMIT else "log-bias",
    )


def _authors_gate(scores: Tensor, config: VideoAnchorConfig) -> LayerGate:
    """Factors, and the logarithm of the keys' plus 1e-6, rounded to bf16 at each step. The queries' cancels."""
    scores = scores.bfloat16()
    bias = torch.log((1.0 + config.alpha_k * scores) + AUTHORS_EPS)
    return LayerGate(gamma_k=bias.float().exp(), gamma_v=(1.0 + config.alpha_v * scores).float())


def cached_scores(cache: Cache | None) -> CacheScores | None:
    """The scores that a cache carries, or None."""
    return getattr(cache, _ATTRIBUTE, None)


def keep_scores(cache: Cache, held: CacheScores | None) -> None:
    """Makes a cache carry scores, and reorder them when its rows are."""
    setattr(cache, _ATTRIBUTE, held)
    if held is not None and not isinstance(cache, _ScoredRows):
        cache.__class__ = _with_scored_rows(type(cache))


class _ScoredRows:
    """What a scored cache does when rows are reordered, chosen or repeated: the same to the scores."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        held: CacheScores | None = getattr(self, _ATTRIBUTE)
        if held is not None:
            setattr(self, _ATTRIBUTE, CacheScores(held.scores.repeat_interleave(repeats, 0)))

    def _choose(self, rows: Tensor) -> None:
        held: CacheScores | None = getattr(self, _ATTRIBUTE)
        if held is not None:
            setattr(self, _ATTRIBUTE, CacheScores(held.scores[rows.to(held.scores.device)]))


@functools.cache
def _with_scored_rows(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (_ScoredRows, kind), {"__module__": kind.__module__})
