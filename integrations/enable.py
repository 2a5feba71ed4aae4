"""`enable(model, config)`: scores the visual tokens of each prompt and hands the gate to every decoder layer.

Two hooks serve every backbone. One on the multimodal model sees which positions of this call receive visual features;
one on its language model sees the merged embeddings there, scores them, and passes the gate on as one keyword. The
scores are kept on the cache object by position, so that whatever happens to a cache (copies, crops, a second turn)
happens to them.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anchor.config import VideoAnchorConfig
from ..anchor.scores import AnchorResult, anchor_scores
from ..anchor.timing import Progress
from ..kernels.gates import POST_EXP_LIMIT
from .attention import GATE_ARGUMENT, IMPLEMENTATION, LayerGate

_CACHE_ATTRIBUTE = "videoanchor_scores"
_HANDLE_ATTRIBUTE = "_videoanchor_handle"


class CacheScores:
    """The scores of a prompt, (B, T) fp32 by cache position; positions from T on are text and score 0."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self._gate: tuple[VideoAnchorConfig, LayerGate] | None = None

    def gate(self, config: VideoAnchorConfig) -> LayerGate:
        """The factors 1 + alpha * score (arXiv 2509.25151), computed once for each config."""
        if self._gate is None or self._gate[0] is not config:
            bounded = 1.0 + config.alpha_k <= POST_EXP_LIMIT
            gate = LayerGate(
                gamma_k=1.0 + config.alpha_k * self.scores if config.alpha_k else None,
                gamma_v=1.0 + config.alpha_v * self.scores if config.alpha_v else None,
                gate_form="post-exp" if bounded else "log-bias",
            )
            self._gate = (config, gate)
        return self._gate[1]


def find_multimodal_model(model: nn.Module) -> PreTrainedModel:
    """The module that merges visual features into the embeddings and owns `language_model`.

    Raises:
        ValueError: when the model has no such module, or no image or video token.
    """
    for module in model.modules():
        if not (isinstance(module, PreTrainedModel) and hasattr(module, "get_placeholder_mask")):
            continue
        if "language_model" in module._modules and visual_token_ids(module):
            return module
    raise ValueError(
        f"{type(model).__name__} has no visual tokens that VideoAnchor could score: expected a transformers model with "
        "get_placeholder_mask, a language_model and an image or video token, such as "
        "Qwen2_5_VLForConditionalGeneration, InternVLForConditionalGeneration or LlavaOnevisionForConditionalGeneration"
    )


def visual_token_ids(model: PreTrainedModel) -> dict[str, int]:
    """Placeholder token ids by modality: {"image": id, "video": id}, as far as the model has them."""
    ids = {modality: getattr(model.config, f"{modality}_token_id", None) for modality in ("image", "video")}
    return {modality: int(token) for modality, token in ids.items() if token is not None}


def enable(model: PreTrainedModel, config: VideoAnchorConfig) -> "Handle":
    """Gates every decoder self-attention of `model` by the scores of its visual tokens.

    Args:
        model: a transformers video language model. Its language model's attention is set to `videoanchor_triton` until
            the handle is disabled; the vision tower keeps its own.
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
    return Handle(model, base, config)


class Handle:
    """What `enable` returns.

    Attributes:
        last: the result of the last prompt with visual tokens, one entry a batch row, None for a row without any. Rows
            with the same visual tokens (beams) share one result.
        config: the config it was made with.
        progress: None, or a function that is called with (stage, done, total) while tokens are scored.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, config: VideoAnchorConfig) -> None:
        self.config = config
        self.last: list[AnchorResult | None] = []
        self.progress: Progress | None = None
        self._base, self._model = base, model
        # .mask (B, M): positions of this call that receive visual features; .scores: what its language model call uses
        self._pending = threading.local()
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
            self._previous_implementation = previous
        self._hooks = [
            base.register_forward_pre_hook(self._before_merge, with_kwargs=True),
            base.register_forward_hook(self._after_merge, always_call=True),
            text.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            text.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        self._restore = [
            _guard(model, "generate", self._why_generate_cannot),
            _guard(model, "generate_batch", lambda _args, _kwargs: "continuous batching (generate_batch)"),
        ]
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

    def _why_generate_cannot(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        config = (
            kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self._model.generation_config
        )

        def option(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        if option("prefill_chunk_size"):
            return "chunked prefill (prefill_chunk_size), which would score each chunk of a video by itself,"
        if self.config.decode == "prefill" and (option("prompt_lookup_num_tokens") or option("assistant_model")):
            return 'assisted decoding with decode="prefill", which takes steps of several tokens for a prompt,'
        return None

    def _before_merge(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        encoded = kwargs.get("mm_encoder_outputs") or {}
        given = {
            "image": kwargs.get("pixel_values") is not None or encoded.get("image") is not None,
            "video": kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None,
        }
        if not any(given.values()):
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise NotImplementedError(
                "VideoAnchor needs input_ids beside the pixels to know which positions are visual; got "
                "inputs_embeds only"
            )
        ids = visual_token_ids(module)  # pyright: ignore[reportArgumentType]
        tokens = [token for modality, token in ids.items() if given[modality]]
        self._pending.mask = torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))

    def _after_merge(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        self._pending.mask = self._pending.scores = None  # nothing stale, also when the forward raised

    def _before_decoder(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        n_queries = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
        mask: Tensor | None = getattr(self._pending, "mask", None)
        self._pending.mask = None
        held: CacheScores | None = getattr(cache, _CACHE_ATTRIBUTE, None)
        static = getattr(cache, "is_compileable", False)
        # while decoding, the length of a static cache is known on the device only
        past = None if static and n_queries == 1 else (0 if cache is None else int(cache.get_seq_length()))

        if held is not None and past is not None and held.scores.shape[1] > past:  # cropped or reset
            held = CacheScores(held.scores[:, :past]) if past else None
        if mask is not None and static and any(getattr(cache, "is_sliding", ())):
            raise NotImplementedError(
                "VideoAnchor does not support static caches with sliding-window layers yet: use a dynamic cache"
            )
        if mask is not None and past is not None and embeds is not None:
            held = CacheScores(
                self._extend(None if held is None else held.scores, past, embeds, mask.to(embeds.device))
            )
        if cache is None:
            self._pending.scores = held
        else:
            setattr(cache, _CACHE_ATTRIBUTE, held)

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
            setattr(cache, _CACHE_ATTRIBUTE, getattr(self._pending, "scores", None))

    def _extend(self, held: Tensor | None, past: int, embeds: Tensor, mask: Tensor) -> Tensor:
        """Scores by cache position, (B, past + M): those held, 0 for text since, then those of the new
        visual tokens."""
        batch = embeds.shape[0]
        scores = torch.zeros(batch, past + embeds.shape[1], dtype=torch.float32, device=embeds.device)
        if held is not None:
            scores[:, : held.shape[1]] = held.repeat_interleave(batch // held.shape[0], 0)
        self.last = []
        previous: Tensor | None = None
        for row in range(batch):
            tokens = embeds[row, mask[row]].detach()
            if previous is not None and tokens.shape == previous.shape and torch.equal(tokens, previous):
                result = self.last[-1]
            else:
                result = anchor_scores(tokens, self.config, progress=self.progress) if len(tokens) else None
            if result is not None:
                scores[row, past:][mask[row]] = result.scores
            self.last.append(result)
            previous = tokens
        return scores


def _guard(
    model: PreTrainedModel, name: str, why: Callable[[tuple[Any, ...], Mapping[str, Any]], str | None]
) -> Callable[[], None]:
    """Replaces a method of this one model by one that raises where `why` names what is not supported. Returns the
    undo."""
    original = getattr(model, name, None)
    if original is None:
        return lambda: None
    own = name in vars(model)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        reason = why(args, kwargs)
        if reason is not None:
            raise NotImplementedError(f"VideoAnchor does not support {reason} yet; disable() the gate or do without it")
        return original(*args, **kwargs)

    def restore() -> None:
        if own:
            setattr(model, name, original)
        else:
            delattr(model, name)

    setattr(model, name, guarded)
    return restore
