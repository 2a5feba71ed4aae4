"""What `enable` leaves on a model: the hooks that score the visual tokens of each prompt and hand the gate to every
decoder layer.

Two hooks serve every backbone. One on the multimodal model sees which positions of this call receive visual features;
one on its language model sees the merged embeddings there, scores them, and passes the gate on as one keyword. The
scores are kept on the cache object by position, so that whatever happens to a cache (copies, crops, a second turn)
happens to them.

One rule keeps a pass from running ungated in silence: the language model runs only within a forward whose inputs were
seen (or with scores that the caller gives), with our attention, and on a cache that is empty or carries our mark.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ...anchor.config import VideoAnchorConfig
from ...anchor.scores import AnchorResult, anchor_scores
from ...anchor.timing import Progress
from .attention import GATE_ARGUMENT, IMPLEMENTATION, LayerGate
from .backbones import check_chunked_prefill, model_type_of
from .cache_scores import (
    CacheScores,
    GateSwitch,
    cached_positions,
    cached_scores,
    for_rows,
    is_marked,
    keep_scores,
    room_of,
)
from .call_state import CallState, CallStates, GivenScores, Prompt, arguments, check_single_steps, options_of, prompt_of
from .frames import frames_of_rows, frames_of_videos, images_of
from .merging import Merging
from .scoring import AnchorScores, Known, score_rows, tensor_parallel_group
from .undoable import add_hook, replace_method, set_attention
from .visual_tokens import VisualTokens, feature_rows

HANDLE_ATTRIBUTE = "_videoanchor_handle"
_FEATURES = ("pixel_values", "mm_encoder_outputs")
"""What the arguments of generate() that bring images and videos begin with."""


class Handle:
    """What `enable` returns.

    Attributes:
        last: the result of the last prompt, one entry a batch row, None for a row without visual tokens; empty where
            nothing was scored (a prompt of text only, or within `use_scores`). Rows with the same visual tokens (beams)
            share one result.
        config: the config it was made with.
        progress: None, or a function that is called with (stage, done, total) while tokens are scored.
        anchor_scores: what scores a row of tokens; the `anchor_scores` of a `ScoreCache` keeps results on disk.

    Examples:
        With a `model` of transformers, and `inputs` that its processor made of a question and a video:

        >>> import videoanchor_triton as va
        >>> handle = va.enable(model, va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5))
        >>> output = model.generate(**inputs, max_new_tokens=4)
        >>> handle.last[0].converged
        True
        >>> handle.disable()
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel, config: VideoAnchorConfig) -> None:
        self.config = config
        self.last: list[AnchorResult | None] = []
        self.progress: Progress | None = None
        self.anchor_scores: AnchorScores = anchor_scores
        self._base, self._tokens = base, VisualTokens(base, config)
        self._calls, self._given, self._switch = CallStates(), GivenScores(), GateSwitch(on=True)
        outer = [x for x in model.modules() if isinstance(x, PreTrainedModel) and base in set(x.modules())]
        self._group = tensor_parallel_group(outer[0])
        generating = [x for x in outer if hasattr(x, "generate")]
        self._sees_prompts = bool(generating)
        text: PreTrainedModel = base.language_model  # pyright: ignore[reportAssignmentType]
        with ExitStack() as undo:
            undo.callback(vars(base).pop, HANDLE_ATTRIBUTE, None)
            set_attention(outer[0], text, undo)
            for x in generating:
                replace_method(x, "generate", self._around_generate, undo)
                replace_method(x, "generate_batch", _refuse_continuous_batching, undo)
            for modality in ("image", "video"):
                replace_method(
                    base, f"get_{modality}_features", functools.partial(self._around_features, modality), undo
                )
            self._merging = None
            if config.merges:
                score, last = self._score, lambda: self.last
                parts = self._tokens, config, self._calls, self._given, score, last, self._group
                self._merging = Merging(base, *parts)
                self._merging.install(generating, undo)
            for hook in (
                base.register_forward_pre_hook(self._before_merge, with_kwargs=True),
                base.register_forward_hook(self._after_merge, always_call=True),
                text.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
                text.register_forward_hook(self._after_decoder, with_kwargs=True),
            ):
                add_hook(hook, undo)
            setattr(base, HANDLE_ATTRIBUTE, self)
            self._undo = undo.pop_all()

    def disable(self) -> None:
        """Removes the gate and restores the attention that the model had. A second call does nothing."""
        self._switch.on = False
        self._undo.close()  # each part of it, also where one fails

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError(
            "a model cannot be copied or pickled while VideoAnchor is enabled: call videoanchor_triton.disable(model) "
            "first, and enable the copy"
        )

    def use_scores(self, scores: Tensor) -> AbstractContextManager[None]:
        """Within the block, prompts get these scores and nothing is scored: for prompts that come as `inputs_embeds`,
        and for scores of your own. It holds for this thread and for threads that start while it is open (a streamer's
        generate()).

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
        return self._given.block(scores.detach().float())

    @property
    def _call(self) -> CallState:
        return self._calls.own

    def _around_generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model: PreTrainedModel = generate.__self__  # pyright: ignore[reportFunctionMemberAccess]
        call = arguments(generate, args, kwargs)
        options = options_of(call, model.generation_config)
        chunk_size: int | None = options.get("prefill_chunk_size")
        if chunk_size and any(value is not None and name.startswith(_FEATURES) for name, value in call.items()):
            check_chunked_prefill(model, self._base, chunk_size)
        if self.config.decode == "prefill":
            check_single_steps(options)
        if self._merging is not None:
            self._merging.check_options(options)
        outer = self._call.prompt, self._call.known
        self._call.prompt = prompt_of(call, chunk_size)
        self._call.known = [] if options.get("use_cache") is False else None  # each step sees the prompt again
        self.last = []
        try:
            return self._call.prompt.whole(generate(*args, **kwargs))
        finally:
            self._call.clear()
            self._call.prompt, self._call.known = outer
            self._call.steps = self._call.images = None

    def _around_features(self, modality: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Notes of which images and videos features are made, be it within the forward or, once a prompt, before."""
        call = self._call
        if call.encoding:  # the videos of some models are their images
            return encode(*args, **kwargs)
        given = arguments(encode, args, kwargs)
        call.encoding = True
        try:
            output = encode(*args, **kwargs)
        finally:
            call.encoding = False
        if self.config.looks_at_frames or self.config.merges:
            if modality == "video":
                call.steps = frames_of_videos(given)
            else:
                call.images = images_of(given, output, model_type_of(self._base.config))
        if call.merging:
            if call.given is None and modality not in call.modalities:
                self._see(call.modalities | {modality})
        elif call.prompt is not None and call.prompt.chunk_size:
            call.prompt.encoded[modality] = output
        elif not self._sees_prompts:
            call.encoded_rows[modality] = len(feature_rows(output))
        return output

    def _see(self, modalities: frozenset[str]) -> None:
        """Finds where this pass merges features of these modalities."""
        call = self._call
        if call.prompt is not None and call.prompt.planned:
            return  # a chunk, or merged: the whole prompt is scored at once
        call.modalities = modalities
        call.visual, call.columns = self._tokens.positions(modalities, call.input_ids, call.embeds)
        call.video = self._tokens.of_videos(call.input_ids, call.embeds)

    def _before_merge(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call
        call.clear()
        call.merging, call.given = True, self._given.of_thread(call.thread)
        if call.given is not None:
            return
        inputs = arguments(module.forward, args, kwargs)
        call.input_ids, call.embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        encoded = {name: output for name, output in (inputs.get("mm_encoder_outputs") or {}).items() if output}
        pixels = {
            "image": inputs.get("pixel_values", inputs.get("pixel_values_images")),
            "video": inputs.get("pixel_values_videos"),
        }
        modalities = frozenset(name for name in pixels if pixels[name] is not None or name in encoded)
        if self._merging is not None:
            self._merging.check_forward(inputs, bool(modalities))
        if call.encoded_rows and any(
            len(feature_rows(encoded[name])) < call.encoded_rows.pop(name, 0) for name in encoded
        ):
            raise RuntimeError(
                "this pass got a part of the features that were made for its prompt, and a part cannot be scored by "
                "itself: enable the model whose generate() is called, not a part of it"
            )
        if modalities:
            self._see(modalities)
        elif call.input_ids is None:
            raise ValueError(
                "inputs_embeds without pixels: VideoAnchor cannot know which positions are visual. Give the scores: "
                "with handle.use_scores(scores): ..., (batch, positions), 0 for text"
            )

    def _after_merge(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        self._call.clear()  # nothing stale, also when the forward raised

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._call
        given = call.given if call.merging else self._given.of_thread(call.thread)
        inputs = arguments(module.forward, args, kwargs)
        cache: Cache | None = inputs.get("past_key_values")
        embeds: Tensor | None = inputs.get("inputs_embeds")
        batch, n_queries = (inputs["input_ids"] if embeds is None else embeds).shape[:2]
        held = cached_scores(cache)
        self._check_pass(module, given, held)

        chunks = call.prompt if call.prompt is not None and call.prompt.planned and given is None else None
        taken = given is None or (held is not None and held.given is given and held.scores.shape[1] == given.shape[1])
        asked = call.visual is not None or chunks is not None or not taken
        find_gate = self._find_gate_uncompiled if asked else self._find_gate  # pyright: ignore[reportAttributeAccessIssue]
        gate = find_gate(held, chunks, given, cache, embeds, (batch, n_queries), asked)
        return args, {**kwargs, GATE_ARGUMENT: gate}

    def _find_gate(
        self,
        held: CacheScores | None,
        chunks: Prompt | None,
        given: Tensor | None,
        cache: Cache | None,
        embeds: Tensor | None,
        shape: tuple[int, int],
        asked: bool,
    ) -> LayerGate:
        """The gate of a pass of shape (rows, positions), by the scores that its cache holds and then keeps: those held
        before, and new ones where they are `asked` for."""
        call, (batch, n_queries) = self._call, shape
        past = cached_positions(cache, n_queries, asked=asked, given=given is not None)
        if past == 0 and call.prompt is None:
            self.last = []
        if held is not None and past is not None:
            held = held.first(past)  # cropped behind the cache's back
        if given is not None:
            if past is not None and (past < given.shape[1] or not is_marked(cache)):
                held = for_rows(CacheScores(given[:, : past + n_queries], given), batch, embeds)
        elif (new := self._new_scores(chunks, cache, embeds, past or 0, shape)) is not None:
            held = (held or CacheScores(new.scores[:, :0])).followed_by(new, past or 0)
        gate = self._gate(held, cache, past, n_queries)
        call.visual = None
        if cache is None:
            call.without_cache = held
        else:
            keep_scores(cache, held, self._switch)
        return gate

    @torch.compiler.disable
    def _find_gate_uncompiled(self, *arguments: Any) -> LayerGate:
        """For tokens to score: nothing for a compiler, and what a cache keeps must not lie in a CUDA graph's memory."""
        return self._find_gate(*arguments)

    def _check_pass(self, module: nn.Module, given: Tensor | None, held: CacheScores | None) -> None:
        """Raise unless this pass of the language model can be gated."""
        if held is not None and held.merged is not None and (self._merging is None or given is not None):
            raise RuntimeError(
                "this cache holds merged tokens (keep), whose counts are not in given scores, and whose places only "
                "generate() with keep knows: continue it with the settings it was filled with, or start from a new one"
            )
        if not self._call.merging and given is None:
            raise RuntimeError(
                f"{type(module).__name__} was called by itself, and VideoAnchor cannot know which of its inputs are "
                "visual: call the whole model (not its forward, which runs no hooks), or give the scores with "
                "handle.use_scores(scores)"
            )
        implementation = module.config._attn_implementation  # pyright: ignore
        if implementation != IMPLEMENTATION:
            raise RuntimeError(
                f"the attention was set to {implementation!r} while VideoAnchor is enabled, and has no gate: call "
                f"disable() before set_attn_implementation, or set {IMPLEMENTATION!r} again"
            )

    def _new_scores(
        self, chunks: Prompt | None, cache: Cache | None, embeds: Tensor | None, past: int, shape: tuple[int, int]
    ) -> CacheScores | None:
        """Scores of the positions of this pass, of `shape`, or None where it brings no visual token."""
        call = self._call
        if chunks is not None:
            if chunks.scores is None:
                if chunks.new_ids is None:
                    raise ValueError("chunked prefill of embeddings: give the scores, by handle.use_scores(scores)")
                self._tokens.check_cut(chunks.new_ids, chunks.encoded)
                rows, visual, columns = self._tokens.merged(chunks.new_ids, chunks.encoded)
                of_videos = self._tokens.of_videos(chunks.new_ids, None)
                chunks.scores = CacheScores(self._score(rows, visual, columns, of_videos))
            return for_rows(chunks.part(past, shape[1], cached=cache is not None), shape[0], embeds)
        if call.visual is None or embeds is None:
            return None
        visual, columns = call.visual.to(embeds.device), [places.to(embeds.device) for places in call.columns]
        rows = (embeds[row, places] for row, places in enumerate(columns))
        return CacheScores(self._score(rows, visual, columns, call.video))

    def _gate(self, held: CacheScores | None, cache: Cache | None, past: int | None, n_queries: int) -> LayerGate:
        off = self.config.decode == "prefill" and self._decodes(n_queries)
        if held is None or (off and held.merged is None):
            return LayerGate()
        gate = held.gate(self.config, room_of(cache), counts_only=off)
        return replace(gate, n_positions=None if past is None else past + n_queries)

    def _decodes(self, n_queries: int) -> bool:
        """Whether this pass comes after the prompt; outside generate(), whether it looks like that."""
        prompt = self._call.prompt
        if prompt is None:
            return n_queries == 1 and self._call.visual is None
        if prompt.passes:
            prompt.passes -= 1
            return False
        if n_queries > 1:
            raise NotImplementedError(
                f'decode="prefill": a step after the prompt has {n_queries} tokens, expected 1; use decode="persist", '
                "or decode without assistance"
            )
        return True

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A cache that the language model made itself, because the caller passed none, takes the scores too.

        Raises:
            RuntimeError: no layer took the gate.
        """
        gate: LayerGate = kwargs[GATE_ARGUMENT]
        if not gate.taken[0] and not (gate.log_gamma_k is None and gate.gamma_v is None):
            raise RuntimeError(
                f"no attention layer of {type(module).__name__} took VideoAnchor's gate: this model cannot be gated"
            )
        cache = getattr(output, "past_key_values", None)
        if cache is not None and arguments(module.forward, args, kwargs).get("past_key_values") is None:
            keep_scores(cache, self._call.without_cache, self._switch)

    def _score(self, rows: Iterable[Tensor], visual: Tensor, columns: list[Tensor], video: Tensor | None) -> Tensor:
        """(B, M) scores of the visual tokens of each row, which stand at its `columns`, 0 where `visual` is False."""
        call = self._call
        known: Known | None = call.known
        if known is None and len(visual) > 1:  # beams are equal rows
            known = []
        frames = None if video is None else frames_of_rows(visual, video, call.steps, call.images)
        results = score_rows(
            rows, self.config, known, frames=frames, score=self.anchor_scores, progress=self.progress, group=self._group
        )
        scores = torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
        for row, result in enumerate(results):
            if result is not None:
                scores[row, columns[row]] = result.scores
        self.last = results
        return scores


def _refuse_continuous_batching(generate_batch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "generate_batch (continuous batching) runs its own attention and takes no gate: use generate(), or disable()"
    )
