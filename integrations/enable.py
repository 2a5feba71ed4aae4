"""`enable(model, config)`: scores the visual tokens of each prompt and hands the gate to every decoder layer.

Two hooks serve every backbone. One on the multimodal model sees which positions of this call receive visual features;
one on its language model sees the merged embeddings there, scores them, and passes the gate on as one keyword. The
scores are kept on the cache object by position, so that whatever happens to a cache (copies, crops, a second turn)
happens to them.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.generation import utils as generation

from ..anchor.config import VideoAnchorConfig
from ..anchor.scores import AnchorResult, anchor_scores
from ..anchor.timing import Progress
from .attention import GATE_ARGUMENT, IMPLEMENTATION, LayerGate
from .backbones import visual_token_ids
from .cache_scores import CacheScores, cached_scores, keep_scores
from .frames import frames_of_rows
from .scoring import AnchorScores, Known, score_rows, tensor_parallel_group

_HANDLE_ATTRIBUTE = "_videoanchor_handle"


def find_multimodal_model(model: nn.Module) -> PreTrainedModel:
    """The module that merges visual features into the embeddings and owns `language_model`.

    Raises:
        ValueError: when the model has no such module, or no image or video token.
    """
    for module in model.modules():
        if not (isinstance(module, PreTrainedModel) and hasattr(module, "get_placeholder_mask")):
            continue
        if "language_model" in module._modules and visual_token_ids(module.config):
            return module
    raise ValueError(
        f"{type(model).__name__} has no visual tokens that VideoAnchor could score: expected a transformers model with "
        "get_placeholder_mask, a language_model and an image or video token, such as "
        "Qwen2_5_VLForConditionalGeneration, InternVLForConditionalGeneration or LlavaOnevisionForConditionalGeneration"
    )


def enable(model: nn.Module, config: VideoAnchorConfig) -> "Handle":
    """Gates every decoder self-attention of `model` by the scores of its visual tokens.

    Args:
        model: a transformers video language model, also within a wrapper (PEFT, `torch.compile`) or split by `tp_plan`.
            Its language model's attention is set to `videoanchor_triton` until the handle is disabled; the vision
            tower keeps its own.
        config: scores and gate.

    Returns:
        A handle with `disable()` and `last`; as a context manager it disables at the end.

    Raises:
        ValueError: when the model has no visual tokens or is enabled already.
        TypeError: when `config` is not a `VideoAnchorConfig`.
    """
    if not isinstance(config, VideoAnchorConfig):
        raise TypeError(f"config: expected a VideoAnchorConfig, got {type(config).__name__}")
    base = find_multimodal_model(model)
    if hasattr(base, _HANDLE_ATTRIBUTE):
        raise ValueError(f"{type(model).__name__} is enabled already: call disable() on its handle first")
    outermost = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return Handle(outermost, base, config)


class _CallState(threading.local):
    """What the hooks of one call tell each other, for each thread.

    Attributes:
        visual: (B, M) positions of this call that receive visual features.
        video: (B, M) those of videos, where the score looks at frames.
        steps: the frames of each video that was encoded last, where the score looks at frames.
        planned: the first cache position and the (B, M) scores of a prompt that is prefilled in chunks.
        given: (B, T) scores by cache position, from the caller.
        known: while generate() runs, rows that have been scored.
        without_cache: the scores of this call where it has no cache.
    """

    visual: Tensor | None = None
    video: Tensor | None = None
    steps: list[int] | None = None
    planned: tuple[int, Tensor] | None = None
    given: Tensor | None = None
    known: Known | None = None
    without_cache: CacheScores | None = None


class Handle:
    """What `enable` returns.

    Attributes:
        last: the result of the last prompt with visual tokens, one entry a batch row, None for a row without any. Rows
            with the same visual tokens (beams) share one result.
        config: the config it was made with.
        progress: None, or a function that is called with (stage, done, total) while tokens are scored.
        anchor_scores: what scores a row of tokens; the `anchor_scores` of a `ScoreCache` keeps results on disk.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, config: VideoAnchorConfig) -> None:
        self.config = config
        self.last: list[AnchorResult | None] = []
        self.progress: Progress | None = None
        self.anchor_scores: AnchorScores = anchor_scores
        self._base, self._model = base, model
        self._call = _CallState()
        self._group = tensor_parallel_group(model)
        text: PreTrainedModel = base.language_model  # pyright: ignore[reportAssignmentType]
        self._previous_implementation: dict[str, str | None] | None = None
        if text.config._attn_implementation != IMPLEMENTATION:
            key = next((key for key in model.config.sub_configs if getattr(model.config, key) is text.config), None)
            if key is None:
                raise ValueError(
                    f"cannot find the language model's config in {type(model.config).__name__}: load the model with "
                    f"attn_implementation={IMPLEMENTATION!r}"
                )
            previous = {key: text.config._attn_implementation}
            model.set_attn_implementation({key: IMPLEMENTATION})
            if text.config._attn_implementation != IMPLEMENTATION:
                raise ValueError(
                    f"{type(text).__name__} did not take the attention {IMPLEMENTATION!r}: load the model with "
                    f"attn_implementation={{{key!r}: {IMPLEMENTATION!r}}}"
                )
            self._previous_implementation = previous
        self._hooks = [
            base.register_forward_pre_hook(self._before_merge, with_kwargs=True),
            base.register_forward_hook(self._after_merge, always_call=True),
            text.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            text.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        self._restore = [
            _wrap(model, "generate", self._around_generate),
            _wrap(model, "generate_batch", _refuse_continuous_batching),
            _wrap(model, "_prefill", self._around_prefill),
        ]
        if config.score == "cross_frame":
            self._restore.append(_wrap(base, "get_video_features", self._around_video_features))
        setattr(base, _HANDLE_ATTRIBUTE, self)

    def disable(self) -> None:
        """Removes the gate and restores the attention that the model had. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for restore in self._restore:
            restore()
        self._restore = []
        if self._previous_implementation is not None:
            self._model.set_attn_implementation(self._previous_implementation)  # pyright: ignore[reportArgumentType]
            self._previous_implementation = None
        if getattr(self._base, _HANDLE_ATTRIBUTE, None) is self:
            delattr(self._base, _HANDLE_ATTRIBUTE)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @contextmanager
    def use_scores(self, scores: Tensor) -> Iterator[None]:
        """Within the block, prompts of this thread get these scores and nothing is scored: for prompts that come as
        `inputs_embeds`, and for scores of your own.

        Args:
            scores: (B, T) floating-point, in [0, 1], by position in the cache (the prompt with its padding, when it
                starts from an empty cache); positions from T on are text and score 0. Beams and several return
                sequences share their prompt's row.

        Raises:
            ValueError: the scores are not as described.
        """
        if scores.ndim != 2 or not scores.is_floating_point():
            raise ValueError(
                f"scores: expected a (batch, positions) floating-point tensor, got {scores.dtype} of shape "
                f"{tuple(scores.shape)}"
            )
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("scores: expected finite values in [0, 1]; give text and padding 0")
        self._call.given = scores.detach().float()
        try:
            yield
        finally:
            self._call.given = None

    def _around_generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = (
            kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self._model.generation_config
        )

        def option(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        if option("prefill_chunk_size") and not hasattr(generation, "_slice_mm_encoder_output"):
            raise NotImplementedError(
                "chunked prefill (prefill_chunk_size) of a video needs a newer transformers, which hands its features "
                "out by chunk: upgrade it, or leave prefill_chunk_size out"
            )
        if self.config.decode == "prefill" and (option("prompt_lookup_num_tokens") or option("assistant_model")):
            raise NotImplementedError(
                'decode="prefill" takes a step of several tokens for a prompt, and assisted decoding takes such steps: '
                'use decode="persist", or decode without assistance'
            )
        self._call.known = []
        try:
            return generate(*args, **kwargs)
        finally:
            self._call.known = self._call.steps = None

    def _around_prefill(
        self,
        prefill: Callable[..., Any],
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: Mapping[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        if generation_config.prefill_chunk_size is not None and is_first_iteration and self._call.given is None:
            self._call.planned = self._plan(input_ids, generation_config, model_kwargs)
        try:
            return prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        finally:
            self._call.planned = None

    def _plan(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: Mapping[str, Any]
    ) -> tuple[int, Tensor] | None:
        """The scores of a whole prompt, before its first chunk, from the features that generate() has encoded."""
        encoded = {name: output for name, output in (model_kwargs.get("mm_encoder_outputs") or {}).items() if output}
        if not encoded:
            return None
        past = int(model_kwargs["past_key_values"].get_seq_length())
        mask = model_kwargs.get("attention_mask")
        n_positions = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        ids = input_ids[:, past:] if n_positions == input_ids.shape[1] else input_ids  # else only new ones were given
        visual = self._visual_positions(self._tokens_of(encoded), ids, None)
        merged: Tensor = self._base.get_input_embeddings()(ids[visual]).detach().clone()
        for modality, output in encoded.items():
            features = torch.cat([part.flatten(0, -2) for part in output["pooler_output"]])
            merged[ids[visual] == visual_token_ids(self._base.config)[modality]] = features.to(merged)
        rows = merged.split(visual.sum(1).tolist())
        return past, self._score(rows, visual, self._of_videos(ids, None))

    def _around_video_features(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        grid: Tensor | None = given.get("video_grid_thw")
        pixels = next(iter(given.values()))
        if grid is not None:
            self._call.steps = grid[:, 0].tolist()
        elif pixels.ndim == 5:  # (videos, frames, channels, height, width)
            self._call.steps = [pixels.shape[1]] * pixels.shape[0]
        return encode(*args, **kwargs)

    def _of_videos(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
        """(B, M) True at the tokens of videos, where the score looks at frames."""
        if self.config.score != "cross_frame":
            return None
        tokens = [token for name, token in visual_token_ids(self._base.config).items() if name != "image"]
        return self._visual_positions(tokens, input_ids, embeds)

    def _tokens_of(self, modalities: Collection[str]) -> list[int]:
        """The tokens that are scored where features of these modalities are given."""
        scored = {*modalities}
        if "video" in scored:
            scored.add("newline")
            if self.config.arithmetic == "authors":
                scored.discard("image")  # their code scores the video only where a prompt has both
        return [token for name, token in visual_token_ids(self._base.config).items() if name in scored]

    def _visual_positions(self, tokens: list[int], input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """(B, M) True at placeholders, known by id or by embedding."""
        if embeds is None:
            if input_ids is None:
                raise ValueError("expected input_ids or inputs_embeds beside the pixels, got neither")
            return torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
        placeholders = self._base.get_input_embeddings()(torch.tensor(tokens, device=embeds.device))
        return (embeds[:, :, None] == placeholders).all(-1).any(-1)

    def _before_merge(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self._call.visual = self._call.without_cache = None
        if self._call.given is not None:
            return
        input_ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        encoded = kwargs.get("mm_encoder_outputs") or {}
        pixels = {
            "image": kwargs.get("pixel_values", kwargs.get("pixel_values_images")),
            "video": kwargs.get("pixel_values_videos"),
        }
        modalities = [name for name in pixels if pixels[name] is not None or encoded.get(name) is not None]
        if modalities:
            visual = self._visual_positions(self._tokens_of(modalities), input_ids, embeds)
            if not visual.any():
                raise ValueError(
                    f"got features of {' and '.join(modalities)}, and no token of theirs in the prompt: expected one "
                    f"of {self._tokens_of(modalities)}, by which VideoAnchor knows what is visual"
                )
            self._call.visual, self._call.video = visual, self._of_videos(input_ids, embeds)
        elif input_ids is None and cached_scores(kwargs.get("past_key_values")) is None:
            raise ValueError(
                "inputs_embeds without pixels: VideoAnchor cannot know which positions are visual. Give the scores: "
                "with handle.use_scores(scores): ..., (batch, positions), 0 for text"
            )

    def _after_merge(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        self._call.visual = self._call.without_cache = None  # nothing stale, also when the forward raised

    def _before_decoder(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache: Cache | None = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        batch, n_queries = (kwargs["input_ids"] if embeds is None else embeds).shape[:2]
        visual, self._call.visual = self._call.visual, None
        given = self._call.given
        held = cached_scores(cache)
        past = _cached_positions(cache, n_queries)

        if held is not None and past is not None and held.scores.shape[1] > past:  # cropped or reset
            held = CacheScores(held.scores[:, :past]) if past else None
        if given is not None and past is not None and past < given.shape[1]:
            if batch % given.shape[0]:
                raise ValueError(f"use_scores: got scores of {given.shape[0]} rows for a batch of {batch}")
            rows = given[:, : past + n_queries].repeat_interleave(batch // given.shape[0], 0)
            held = CacheScores(rows if embeds is None else rows.to(embeds.device))
        elif visual is not None and past is not None and embeds is not None:
            visual = visual.to(embeds.device)
            if self._call.planned is None:
                new = self._score([embeds[row, visual[row]] for row in range(batch)], visual, self._call.video)
            else:
                first, planned = self._call.planned
                new = planned[:, past - first : past - first + n_queries].to(embeds.device)
            scores = torch.zeros(batch, past, dtype=torch.float32, device=embeds.device)
            if held is not None:
                scores[:, : held.scores.shape[1]] = held.scores
            held = CacheScores(torch.cat([scores, new], 1))
        if cache is None:
            self._call.without_cache = held
        elif held is not cached_scores(cache):
            keep_scores(cache, held)

        if held is None or (self.config.decode == "prefill" and n_queries == 1):
            gate = LayerGate()
        else:
            gate = held.gate(self.config)
            gate = replace(gate, n_positions=None if past is None else past + n_queries)
        return args, {**kwargs, GATE_ARGUMENT: gate}

    def _after_decoder(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """A cache that the language model made itself, because the caller passed none, takes the scores too."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and kwargs.get("past_key_values") is None:
            keep_scores(cache, self._call.without_cache)

    def _score(self, rows: Sequence[Tensor], visual: Tensor, video: Tensor | None) -> Tensor:
        """(B, M) scores of the visual tokens of each row, 0 where `visual` (B, M) is False."""
        known: Known = [] if self._call.known is None else self._call.known
        frames = None if video is None else frames_of_rows(visual, video, self._call.steps)
        results = score_rows(
            rows, self.config, known, frames=frames, score=self.anchor_scores, progress=self.progress, group=self._group
        )
        scores = torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
        for row, result in enumerate(results):
            if result is not None:
                scores[row, visual[row]] = result.scores
        self.last = results
        return scores


def _cached_positions(cache: Cache | None, n_queries: int) -> int | None:
    """Positions that a cache holds; None while decoding with a static cache whose length only the device knows."""
    if cache is None:
        return 0
    if n_queries > 1 or not getattr(cache, "is_compileable", False):
        return int(cache.get_seq_length())
    layers: list[Any] = cache.layers
    sliding = next((layer for layer in layers if getattr(layer, "is_sliding", False)), None)  # counts on the host
    return None if sliding is None else int(sliding.get_seq_length())


def _refuse_continuous_batching(generate_batch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "generate_batch (continuous batching) runs its own attention and takes no gate: use generate(), or disable()"
    )


def _wrap(model: PreTrainedModel, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replaces a method of this one model by `around(method, ...)`. Returns the undo."""
    original = getattr(model, name, None)
    if original is None:
        return lambda: None
    own = name in vars(model)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    def restore() -> None:
        if own:
            setattr(model, name, original)
        else:
            delattr(model, name)

    setattr(model, name, wrapped)
    return restore
