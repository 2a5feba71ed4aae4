"""Prompts whose visual tokens are merged (`VideoAnchorConfig.keep`), inside an unchanged `generate()`.

There is one seam. `generate()` calls `_expand_inputs_for_generation` once: positions are known and pixels encoded by
then, but neither lengths nor caches nor beams. There a prompt becomes a short one, and all that follows is ordinary.
Around it, positions of a second turn are counted as the caller counts, so are lengths the caller gives, and what is
returned begins with the prompt as it was given.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ...anchor.compress import check_steps, group_moments, numbers_kept
from ...anchor.config import VideoAnchorConfig
from ...anchor.grouping import Groups, group_tokens
from ...anchor.scores import AnchorResult
from ..errors import InputError
from .backbones import VIDEO_AT_IMAGE_TOKENS, model_type_of, visual_token_ids
from .cache_scores import CacheScores, Merged, cached_scores, not_merged
from .call_state import CallStates, GivenScores, Prompt
from .places import frames_of_features, grid_of, rotary_features, rows_of_positions
from .short_prompt import LongPrompt, features_of_groups, is_short, repeated
from .undoable import replace_method
from .visual_tokens import VisualTokens, feature_rows

_REFUSED = ("token_healing", "assistant_early_exit", "use_mtp")
"""Options of generate() that look at the ids of the prompt, or run a part of the model on its cache."""


@dataclass(frozen=True, eq=False)
class Merging:
    """What merges the visual tokens of prompts of an enabled model.

    Args:
        base: the multimodal model.
        tokens: knows where they are.
        config: how many are left, and how they are grouped.
        calls, given: of the handle.
        score: scores the rows of a prompt, see `Handle._score`.
        last: returns the results of `score`, in which groups are noted.
        group: the processes among which the model is split.
    """

    base: PreTrainedModel
    tokens: VisualTokens
    config: VideoAnchorConfig
    calls: CallStates
    given: GivenScores
    score: Callable[..., Tensor]
    last: Callable[[], list[AnchorResult | None]]
    group: dist.ProcessGroup | None

    def install(self, generating: list[PreTrainedModel], undo: ExitStack) -> None:
        """
        Raises:
            ValueError: nothing that is enabled generates.
        """
        if not generating:
            raise ValueError(
                f"keep={self.config.keep} merges visual tokens within generate(), which {type(self.base).__name__} has "
                "not: enable the model whose generate() is called, or leave keep out"
            )
        text: Any = self.base.language_model
        kinds = {*(getattr(text.config, "layer_types", None) or ())} - {"full_attention"}
        if kinds:
            warnings.warn(
                f"keep: layers of {' and '.join(sorted(kinds))} take a merged token for one: a sliding window counts "
                "the keys that are left, and layers without softmax know no counts",
                stacklevel=4,
            )
        for model in generating:
            replace_method(model, "_prepare_position_ids_for_generation", self._around_positions, undo)
            replace_method(model, "_prepare_generated_length", self._around_length, undo)
            replace_method(model, "_expand_inputs_for_generation", self._around_expand, undo)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """
        Raises:
            NotImplementedError: generate() would do what cannot be done with merged tokens.
        """
        refused = next((name for name in _REFUSED if options.get(name)), None)
        if refused is not None:
            raise NotImplementedError(f"keep merges no tokens of a prompt under {refused}: leave one of the two out")

    def check_forward(self, inputs: Mapping[str, Any], has_features: bool) -> None:
        """
        Raises:
            NotImplementedError: this pass of the multimodal model would not be what was asked for.
        """
        prompt = self.calls.own.prompt
        if prompt is None and has_features:
            raise NotImplementedError(
                f"keep={self.config.keep} merges visual tokens within generate(), and the model was called by itself: "
                "call generate(), or enable it with keep=1"
            )
        held = cached_scores(inputs.get("past_key_values"))
        shortened = (prompt is not None and prompt.merged) or (held is not None and held.merged is not None)
        if shortened and inputs.get("position_ids") is None:
            raise NotImplementedError(
                f"keep: {type(self.base).__name__} was given no position_ids, and would count positions by the cache, "
                "which merged tokens shorten: use keep=1 with this model, or give the positions in a loop of your own"
            )

    def _around_positions(self, prepare: Callable[..., Tensor], inputs_tensor: Tensor, model_kwargs: Any) -> Tensor:
        """A cache with merged tokens is shown at the length that the caller's prompt has."""
        cache = model_kwargs.get("past_key_values")
        past, held = _held(cache)
        if held is not None and held.merged is not None:
            length = past + held.merged.removed
            model_kwargs = {**model_kwargs, "past_key_values": SimpleNamespace(get_seq_length=lambda *_: length)}
        return prepare(inputs_tensor, model_kwargs)

    def _around_length(self, prepare: Callable[..., Any], generation_config: Any, **kwargs: Any) -> Any:
        prompt = self.calls.own.prompt
        if prompt is not None and prompt.given_ids is not None:
            removed = prompt.given_ids.shape[1] - prompt.n_short
            if not kwargs["has_default_max_length"] and generation_config.max_new_tokens is None:
                generation_config.max_length -= removed
            if not kwargs["has_default_min_length"] and generation_config.min_new_tokens is None:
                generation_config.min_length = max(generation_config.min_length - removed, 0)
        return prepare(generation_config=generation_config, **kwargs)

    def _around_expand(
        self, expand: Callable[..., Any], *args: Any, input_ids: Tensor, expand_size: int = 1, **kwargs: Any
    ) -> Any:
        long = self._long_prompt(input_ids, kwargs)
        merged = None if long is None else self._merge(long)
        prompt = self.calls.own.prompt
        if long is None or merged is None or prompt is None:
            return expand(*args, input_ids=input_ids, expand_size=expand_size, **kwargs)
        scores, stay, encoded = merged
        ids, short_kwargs, places = long.shortened(stay, kwargs)
        removed = long.length - short_kwargs["attention_mask"].shape[1]
        _plan(prompt, input_ids, ids, long.past, _at_places(scores, places, long.start, removed))
        # transformers tells the features of a row by its placeholders, one item for each image: they are repeated here
        others = {name: one for name, one in (kwargs.get("mm_encoder_outputs") or {}).items() if name not in encoded}
        short_kwargs["mm_encoder_outputs"] = others or None
        ids, short_kwargs = expand(*args, input_ids=ids, expand_size=expand_size, **short_kwargs)
        features = {name: repeated(rows, expand_size) for name, rows in encoded.items()}
        short_kwargs["mm_encoder_outputs"] = {**(short_kwargs.get("mm_encoder_outputs") or {}), **features}
        return ids, short_kwargs

    def _long_prompt(self, ids: Tensor, kwargs: Mapping[str, Any]) -> LongPrompt | None:
        """The prompt as it was given; None where it has nothing to merge and continues nothing that was merged.

        Raises:
            NotImplementedError: it comes in a form in which its tokens cannot be merged.
        """
        encoded = {name: one for name, one in (kwargs.get("mm_encoder_outputs") or {}).items() if one is not None}
        if any(map(is_short, encoded.values())):
            return None  # an assistant's, to which its main model gives its own
        past, held = _held(kwargs.get("past_key_values"))
        merged = None if held is None else held.merged
        what = None
        if any(value is not None and name.startswith("pixel_values") for name, value in kwargs.items()):
            what = "of pixels that this model, or this transformers, encodes within its forward"
        elif kwargs.get("inputs_embeds") is not None:
            what = "of a prompt of inputs_embeds"
        elif self.given.of_thread(self.calls.own.thread) is not None and (encoded or merged is not None):
            what = "whose scores are given by use_scores"
        if what is not None:
            raise NotImplementedError(f"keep={self.config.keep} merges no tokens {what}: enable the model with keep=1")
        if not encoded and merged is None:
            return None
        if kwargs.get("position_ids") is None:
            raise NotImplementedError(f"keep: {type(self.base).__name__} takes no position_ids: use keep=1 with it")
        pad = self.base.config.get_text_config().pad_token_id
        return LongPrompt(ids, kwargs["position_ids"], kwargs.get("attention_mask"), past, merged, pad or 0, encoded)

    def _merge(self, long: LongPrompt) -> tuple[CacheScores, Tensor, dict[str, Any]] | None:
        """Of the new positions of a prompt, (B, M): what each stands for, which of them stay, and the features of
        groups, row by row, in the form of `features_of_groups`. None where all is as it was."""
        encoded = {name: long.encoded[name] for name in ("image", "video") if name in long.encoded}
        new_ids = long.new_ids
        stay = long.new_mask
        if not encoded:
            zeros = torch.zeros(new_ids.shape, device=new_ids.device)
            return CacheScores(zeros, None, not_merged(zeros, 0, 0)), stay, {}
        tokens = self._tokens_of(encoded, new_ids)
        rows, visual, columns = self.tokens.merged(new_ids, encoded)
        if bool((visual & ~stay).any()):
            raise ValueError("keep: the attention_mask hides visual tokens: leave them out of the prompt, or see them")
        counts = {name: (new_ids == token).sum(1).tolist() for name, token in tokens.items()}
        wanted = [
            dict(zip(tokens, numbers_kept(self.config.keep, [counts[name][row] for name in tokens]), strict=True))
            for row in range(len(rows))
        ]
        if long.merged is None and all(
            wanted[row][name] == counts[name][row] for name in tokens for row in range(len(rows))
        ):
            return None
        scores = self.score(rows, visual, columns, self.tokens.of_videos(new_ids, None))
        steps = {"image": None, "video": self.calls.own.steps}
        frames = {name: frames_of_features(one, steps[name]).split(counts[name]) for name, one in encoded.items()}
        counted = not_merged(scores, 0, 0)
        means, stay = scores.clone(), stay.clone()
        moments = counted.counts, means, counted.squares
        found: dict[str, list[Groups]] = {name: [] for name in tokens}
        for row, places in enumerate(columns):
            result = self.last()[row]
            labels = None if result is None else result.labels.to(places.device)
            position = rows_of_positions(long.position_ids, row, long.start + places)
            noted = torch.arange(len(places), device=places.device)
            for name, token in tokens.items():
                mine = (new_ids[row, places] == token).nonzero()[:, 0]
                own = None if labels is None else labels[mine]
                groups = self._group(rows[row][mine], wanted[row][name], frames[name][row], position[:, mine], own)
                found[name].append(groups)
                at = places[mine]
                kept = at[groups.kept]
                of = groups.of(self.config.merge)
                noted[mine] = mine[groups.kept][of].where(of >= 0, -1)
                stay[row, at] = False
                stay[row, kept] = True
                for whole, part in zip(moments, group_moments(scores[row, at], groups, self.config.merge), strict=True):
                    whole[row, kept] = part
            if result is not None:
                names = noted.unique(return_inverse=True)[1]
                self.last()[row] = replace(result, groups=names - (noted.amin() < 0).long())
        counted = replace(counted, most=int(counted.counts.amax()))
        features = {
            name: features_of_groups(encoded[name], groups, self.config.merge) for name, groups in found.items()
        }
        return CacheScores(means, None, counted), stay, features

    def _tokens_of(self, encoded: Mapping[str, Any], ids: Tensor) -> dict[str, int]:
        """The token of each modality that has features."""
        kind = model_type_of(self.base.config)
        if len(encoded) > 1 and kind in VIDEO_AT_IMAGE_TOKENS:
            raise NotImplementedError(
                f"keep: {kind} puts images and videos at one token, which tells them not apart: give one of the two"
            )
        all_tokens = visual_token_ids(self.base.config)
        for name, output in encoded.items():
            n, expected = int((ids == all_tokens[name]).sum()), len(feature_rows(output))
            if n != expected:
                raise ValueError(f"the prompt has {n} {name} tokens, and {expected} features were made for them")
        return {name: all_tokens[name] for name in encoded}

    def _group(self, tokens: Tensor, k: int, frames: Tensor, positions: Tensor, labels: Tensor | None) -> Groups:
        """Groups of the tokens (n, D) of one modality of a row, on one process of several."""
        n = len(tokens)
        if k == n:
            everyone = torch.arange(n, device=tokens.device)
            return Groups(everyone, everyone)
        grid = grid_of(frames, positions)
        try:
            check_steps(self.config.keep, k, n, int(grid[-1, 0]) + 1)
            groups = group_tokens(
                tokens,
                k,
                self.config.group,
                grid=grid,
                positions=positions.T,
                rotary=rotary_features(self.base.language_model, positions),
                labels=labels,
                seed=self.config.random_state,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        if self.group is not None and dist.get_world_size(self.group) > 1:
            for part in groups:
                dist.broadcast(part, dist.get_global_rank(self.group, 0), group=self.group)
        return groups


def _held(cache: Any) -> tuple[int, CacheScores | None]:
    """The positions of a cache, and what it holds for them: nothing where it was emptied."""
    past = 0 if cache is None else int(cache.get_seq_length())
    held = cached_scores(cache) if past else None
    return past, None if held is None else held.first(past)


def _at_places(scores: CacheScores, places: Tensor, start: int, removed: int) -> CacheScores:
    """What the positions (B, W) of the short prompt stand for, which stand at `places` of the new part of the long one,
    from its position `start` on; -1 for padding."""
    assert scores.merged is not None
    at = places.clamp(min=0)
    new = scores.each(lambda x: x.gather(1, at))
    assert new.merged is not None
    counts, squares = new.merged.counts.where(places >= 0, 1.0), new.merged.squares.where(places >= 0, 0.0)
    merged = Merged(counts, squares, torch.where(places >= 0, places + start, -1), removed, scores.merged.most)
    return CacheScores(new.scores.where(places >= 0, 0.0), None, merged)


def _plan(prompt: Prompt, given_ids: Tensor, ids: Tensor, past: int, scores: CacheScores) -> None:
    n_new = scores.scores.shape[1]
    prompt.given_ids, prompt.n_short = given_ids, ids.shape[1]
    prompt.new_ids, prompt.start, prompt.encoded, prompt.scores = None, past, {}, scores
    if prompt.chunk_size:
        prompt.passes = -(-n_new // prompt.chunk_size)
