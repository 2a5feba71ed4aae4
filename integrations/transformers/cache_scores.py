"""The scores of a prompt, kept on its cache by position, so that whatever happens to the cache happens to them.

Every cache that an enabled model fills carries a mark. A cache with scores refuses to grow where the gate is off.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from ...anchor.compress import group_factors
from ...anchor.config import VideoAnchorConfig
from ...kernels.gates import POST_EXP_LIMIT
from .attention import LayerGate

AUTHORS_EPS = 1e-6
_SCORES, _SWITCH = "videoanchor_scores", "videoanchor_switch"


class GateSwitch:
    """Whether the gate of an enabled model is on. Caches share it; a cache that was stored and loaded has one that is
    off, until an enabled model continues it."""

    def __init__(self, on: bool = False) -> None:
        self.on = on

    def __deepcopy__(self, memo: dict[int, Any]) -> "GateSwitch":
        return self

    def __reduce__(self) -> tuple[type["GateSwitch"], tuple[()]]:
        return GateSwitch, ()


@dataclass(frozen=True, eq=False)
class Merged:
    """What cache positions stand for where tokens were merged (`VideoAnchorConfig.keep`).

    Attributes:
        counts: (B, T) fp32 tokens at each position, 1 for text.
        squares: (B, T) fp32 the mean of their squared scores; `CacheScores.scores` is their mean.
        places: (B, T) int64 the position in the prompt as it was given; -1 for padding that it does not have.
        removed: how many positions longer the prompt as it was given is.
        most: no count is larger.
    """

    counts: Tensor
    squares: Tensor
    places: Tensor
    removed: int
    most: int


class CacheScores:
    """The scores of a prompt, (B, T) fp32 by cache position; positions from T on are text and score 0.

    Args:
        scores: (B, T), T at least 1.
        given: the tensor of `use_scores` that they were taken from.
        merged: where tokens were merged, else None.
    """

    def __init__(self, scores: Tensor, given: Tensor | None = None, merged: Merged | None = None) -> None:
        self.scores, self.given, self.merged = scores, given, merged
        self._gate: tuple[VideoAnchorConfig, tuple[int, bool], LayerGate] | None = None

    def __reduce__(self) -> tuple[type["CacheScores"], tuple[Any, ...]]:
        return CacheScores, (self.scores, None, self.merged)

    def each(self, change: Callable[[Tensor], Tensor]) -> "CacheScores":
        """With every (B, T) tensor changed alike."""
        merged = self.merged
        if merged is not None:
            parts = {name: change(getattr(merged, name)) for name in ("counts", "squares", "places")}
            merged = replace(merged, **parts)
        return CacheScores(change(self.scores), self.given, merged)

    def first(self, positions: int) -> "CacheScores | None":
        """The scores of the first cache positions: less of them where a cache was cropped, None where it is empty.

        Raises:
            RuntimeError: some of the merged tokens were cut off.
        """
        if self.scores.shape[1] <= positions:
            return self
        if positions and self.merged is not None:
            raise RuntimeError(
                f"the cache was cropped to {positions} positions, inside a prompt of {self.scores.shape[1]} with "
                "merged tokens (keep), of which nobody knows the rest any more: start from a new cache"
            )
        return CacheScores(self.scores[:, :positions]) if positions else None

    def followed_by(self, new: "CacheScores", past: int) -> "CacheScores":
        """These, text up to cache position `past`, and then `new`."""
        scores = torch.cat([F.pad(self.scores, (0, past - self.scores.shape[1])), new.scores], 1)
        if self.merged is None and new.merged is None:
            return CacheScores(scores)
        before = self.merged or not_merged(self.scores, 0, 0)
        text = not_merged(scores[:, self.scores.shape[1] : past], self.scores.shape[1], before.removed)
        later = new.merged or not_merged(new.scores, past, before.removed)
        parts = {
            name: torch.cat([getattr(part, name) for part in (before, text, later)], 1)
            for name in ("counts", "squares", "places")
        }
        return CacheScores(scores, None, Merged(**parts, removed=later.removed, most=max(before.most, later.most)))

    def gate(self, config: VideoAnchorConfig, room: int = 0, counts_only: bool = False) -> LayerGate:
        """The factors 1 + alpha * score (arXiv 2509.25151) of at least `room` positions, computed once for each config;
        of those of keys the logarithm, once for all layers and steps.

        A static cache asks for as many positions as it has room for, so that decoding, which is compiled there, is not
        compiled again for a prompt of another length.

        Args:
            counts_only: as if all scores were 0; merged tokens stand for several all the same.
        """
        if self._gate is not None and self._gate[0] is config and self._gate[1] == (room, counts_only):
            return self._gate[2]
        scores = F.pad(self.scores, (0, max(room - self.scores.shape[1], 0)))
        if counts_only:
            gate = LayerGate()
        else:
            gate = (_authors_gate if config.arithmetic == "authors" else _exact_gate)(scores, config)
        if self.merged is not None:
            gate = _merged_gate(gate, scores, self.merged, config)
        # what a compiled step makes, a CUDA graph overwrites in the next one
        if not torch.compiler.is_compiling():
            self._gate = config, (room, counts_only), gate
        return gate


def not_merged(scores: Tensor, first: int, removed: int) -> Merged:
    """What `Merged` is of single tokens with these scores (B, T), from cache position `first` on, where a prompt was
    shortened by `removed` before."""
    places = torch.arange(first, first + scores.shape[1], device=scores.device) + removed
    return Merged(torch.ones_like(scores), scores.square(), places.expand_as(scores), removed, 1)


def _exact_gate(scores: Tensor, config: VideoAnchorConfig) -> LayerGate:
    return LayerGate(
        log_gamma_k=torch.log1p(config.alpha_k * scores) if config.alpha_k else None,
        gamma_v=1.0 + config.alpha_v * scores if config.alpha_v else None,
        # scores are within [0, 1], so that the bounds are known without a look at them
        gate_form="post-exp" if 1.0 + config.alpha_k <= POST_EXP_LIMIT else "log-bias",
        gamma_q=1.0 + config.alpha_q * scores if config.alpha_q else None,
    )


def _merged_gate(gate: LayerGate, scores: Tensor, merged: Merged, config: VideoAnchorConfig) -> LayerGate:
    """The factors of groups in place of those of their mean scores, `gate`: both only where there is such a factor."""
    room = (0, scores.shape[1] - merged.counts.shape[1])
    counts, squares = F.pad(merged.counts, room, value=1.0), F.pad(merged.squares, room)
    log_gamma_k, gamma_v = group_factors(counts, scores, squares, config)
    return replace(
        gate,
        log_gamma_k=counts.log() if gate.log_gamma_k is None else log_gamma_k,
        gamma_v=None if gate.gamma_v is None else gamma_v,
        gate_form="post-exp" if merged.most * (1.0 + config.alpha_k) <= POST_EXP_LIMIT else "log-bias",
    )


def _authors_gate(scores: Tensor, config: VideoAnchorConfig) -> LayerGate:
    """Factors, and the logarithm of the keys' plus 1e-6, rounded to bf16 at each step. The queries' acts on sinks
    only, which their models do not have."""
    scores = scores.bfloat16()
    bias = torch.log((1.0 + config.alpha_k * scores) + AUTHORS_EPS)
    gamma_v, gamma_q = ((1.0 + alpha * scores).float() for alpha in (config.alpha_v, config.alpha_q))
    return LayerGate(log_gamma_k=bias.float(), gamma_v=gamma_v, gamma_q=gamma_q)


def cached_scores(cache: Any) -> CacheScores | None:
    """The scores that a cache carries, or None."""
    return getattr(cache, _SCORES, None)


def cached_positions(cache: Cache | None, n_queries: int, *, asked: bool, given: bool) -> int | None:
    """Positions that a cache holds; None while decoding with a marked static cache whose length only the device knows,
    unless it is `asked`.

    Raises:
        RuntimeError: an enabled model has not filled all of them, and the scores are not `given`.
    """
    if cache is None:
        return 0
    marked = is_marked(cache)
    if asked or not marked or n_queries > 1 or not getattr(cache, "is_compileable", False):
        past = int(cache.get_seq_length())
        if past and not marked and not given:
            raise RuntimeError(
                f"the cache holds {past} positions that were not filled with VideoAnchor enabled, or was rebuilt from "
                "its tensors without their scores: start from a new cache, copy caches by copy.deepcopy, or give the "
                "scores of all positions with handle.use_scores(scores)"
            )
        return past
    layers: list[Any] = cache.layers
    sliding = next((layer for layer in layers if getattr(layer, "is_sliding", False)), None)  # counts on the host
    return None if sliding is None else int(sliding.get_seq_length())


def room_of(cache: Cache | None) -> int:
    """The positions for which a static cache has memory; 0 for a cache that grows."""
    if not getattr(cache, "is_compileable", False):
        return 0
    layers: list[Any] = cache.layers  # pyright: ignore[reportOptionalMemberAccess]
    return max(getattr(layer, "max_cache_len", 0) for layer in layers)


def for_rows(scores: CacheScores, batch: int, embeds: Tensor | None) -> CacheScores:
    """Scores of prompts for a batch in which each may stand several times, side by side (beams)."""
    n_rows = len(scores.scores)
    if batch % n_rows:
        raise ValueError(f"got scores of {n_rows} rows for a batch of {batch}")
    device = scores.scores.device if embeds is None else embeds.device
    return scores.each(lambda x: x.repeat_interleave(batch // n_rows, 0).to(device))


def is_marked(cache: Cache | None) -> bool:
    """Whether an enabled model has filled the cache from its start; none is empty."""
    return cache is None or hasattr(cache, _SCORES)


def keep_scores(cache: Cache, held: CacheScores | None, switch: GateSwitch) -> None:
    """Marks a cache, and makes it carry scores, which follow what happens to it, as long as the switch is on."""
    if is_marked(cache) and cached_scores(cache) is held and getattr(cache, _SWITCH) is switch:
        return
    setattr(cache, _SCORES, held)
    setattr(cache, _SWITCH, switch)
    if not isinstance(cache, _ScoredCache):
        cache.__class__ = _scored(type(cache))


class _ScoredCache:
    """What a marked cache does when it is cropped or emptied, and when its rows are reordered, chosen or repeated: the
    same to the scores. It grows with scores only where the gate is on, and loses its mark where it grows without."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, _SWITCH).on:
            if cached_scores(self) is not None:
                raise RuntimeError(
                    "this cache was filled with VideoAnchor's gate, and the model that continues it has none: continue "
                    "it within videoanchor_triton.enable(model, config), or start from a new cache"
                )
            vars(self).pop(_SCORES, None)  # what comes now is not known to be text
        return super().update(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        setattr(self, _SCORES, None)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        held = cached_scores(self)
        if held is not None:
            setattr(self, _SCORES, held.first(int(self.get_seq_length())))  # pyright: ignore[reportAttributeAccessIssue]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        held = cached_scores(self)
        if held is not None:
            setattr(self, _SCORES, held.each(lambda x: x.repeat_interleave(repeats, 0)))

    def _choose(self, rows: Tensor) -> None:
        held = cached_scores(self)
        if held is not None:
            setattr(self, _SCORES, held.each(lambda x: x[rows.to(x.device)]))

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _empty_scored, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _scored(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (_ScoredCache, kind), {"__module__": kind.__module__})


def _empty_scored(kind: type[Any]) -> Any:
    return object.__new__(_scored(kind))
