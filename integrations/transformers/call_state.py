"""What the hooks of an enabled model know of the call that they run in: scores that the caller gives, the prompt of a
running generate(), and the forward pass."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache_scores import CacheScores
from .frames import Images
from .scoring import Known

_ASSISTANCE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options of generate() that make it decode several tokens in a step."""


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives, by name, also what it gives by position."""
    if not args:
        return {**kwargs}
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def options_of(call: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The options of a call of generate(): from its arguments, from its config, or else from the model's."""
    layers = vars(default), vars(call.get("generation_config") or object), call
    return {name: value for layer in layers for name, value in layer.items() if value is not None}


def check_single_steps(options: Mapping[str, Any]) -> None:
    """
    Raises:
        NotImplementedError: passes after the prompt have several tokens, as `decode="prefill"` knows a prompt by.
    """
    if any(options.get(name) for name in _ASSISTANCE):
        raise NotImplementedError(
            'decode="prefill" takes a step of several tokens for a prompt, and assisted decoding takes such steps: use '
            'decode="persist", or decode without assistance'
        )
    if options.get("use_cache") is False:
        raise NotImplementedError(
            'decode="prefill" without a cache would gate each new token with the prompt, which every step sees again: '
            'use decode="persist", or use_cache=True'
        )


@dataclass(eq=False)
class _Block:
    """An open block of `use_scores`: the thread that opened it, those that ran then, and its scores. (No tuple: of
    one torch.compile would look at all, the threads included.)"""

    opener: int
    running: set[int]
    scores: Tensor


class GivenScores:
    """The open blocks of `use_scores`. A block holds in its own thread and in threads that start while it is open."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    @contextmanager
    def block(self, scores: Tensor) -> Iterator[None]:
        running = {thread.ident for thread in threading.enumerate() if thread.ident is not None}
        block = _Block(threading.get_ident(), running, scores)
        self._blocks.append(block)
        try:
            yield
        finally:
            self._blocks = [other for other in self._blocks if other is not block]

    def of_thread(self, thread: int) -> Tensor | None:
        """The scores of a thread's innermost block, else of the block in which it was started.

        Raises:
            RuntimeError: it may have been started in the block of either of two threads.
        """
        if not self._blocks:
            return None
        own = [block for block in self._blocks if block.opener == thread]
        if own:
            return own[-1].scores
        others = [block for block in self._blocks if thread not in block.running]
        if len({block.opener for block in others}) > 1:
            raise RuntimeError(
                "several threads have a use_scores block open, and this thread, started since, has none of its own: "
                "open use_scores in the thread that calls the model"
            )
        return others[-1].scores if others else None


@dataclass
class Prompt:
    """The prompt of a running generate().

    Attributes:
        new_ids: (B, M) token ids that no cache holds, before beams repeat the rows; None for a prompt of embeddings.
        start: cache positions before them.
        chunk_size: the positions of a pass where the prompt is prefilled in chunks, else None.
        passes: forward passes that prefill still takes.
        encoded: what the encoder made of all its images and of all its videos, until the last chunk has got its part.
        scores: (B, M) of a prompt that is prefilled in chunks, or whose tokens were merged, once they are made.
        given_ids: (B, L) the prompt of generate() where its tokens were merged.
        n_short: positions of the prompt that took its place.
        handed_out: all of the scores are on the cache.
    """

    new_ids: Tensor | None
    start: int
    chunk_size: int | None
    passes: int
    encoded: dict[str, Any] = field(default_factory=dict)
    scores: CacheScores | None = None
    given_ids: Tensor | None = None
    n_short: int = 0
    handed_out: bool = False

    @property
    def merged(self) -> bool:
        """Whether its tokens were merged."""
        return self.given_ids is not None

    @property
    def planned(self) -> bool:
        """Whether its scores are made of the whole of it, and handed out by position."""
        return not self.handed_out and (bool(self.encoded) or self.merged)

    def part(self, past: int, n_queries: int, *, cached: bool) -> CacheScores:
        """The scores of at most `n_queries` positions from cache position `past` on; what follows the prompt is text.
        Without a cache each pass asks for all of them again."""
        assert self.scores is not None
        first = past - self.start
        new = self.scores.each(lambda x: x[:, first : first + n_queries])
        self.handed_out = cached and first + n_queries >= self.scores.scores.shape[1]
        if self.handed_out:
            self.encoded = {}
        return new

    def whole(self, output: Any) -> Any:
        """What generate() returns, with the prompt as it was given in front of what was generated."""
        if self.given_ids is None:
            return output
        short: Tensor = output if isinstance(output, Tensor) else output.sequences
        ids = self.given_ids.to(short.device)
        ids = ids.repeat_interleave(len(short) // len(ids), 0)
        whole = torch.cat([ids, short[:, self.n_short :]], 1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output


def prompt_of(call: Mapping[str, Any], chunk_size: int | None) -> Prompt:
    """What generate() was called with, as it reads it itself: a prompt may repeat the tokens that its cache holds, and
    then its mask is as long as it is.

    Args:
        call: the arguments of generate() by name.
        chunk_size: its prefill_chunk_size.
    """
    ids: Tensor | None = call.get("inputs", call.get("input_ids"))
    embeds: Tensor | None = call.get("inputs_embeds")
    if embeds is not None:
        ids = None
    cache, mask = call.get("past_key_values"), call.get("attention_mask")
    start = 0 if cache is None else int(cache.get_seq_length())
    tokens = ids if embeds is None else embeds
    length = 1 if tokens is None else tokens.shape[1]
    if tokens is not None and (embeds is not None or mask is None or mask.shape[1] == length):
        length -= start
        ids = None if ids is None else ids[:, start:]
    if not chunk_size:
        return Prompt(ids, start, None, 1)
    encoded = {modality: output for modality, output in (call.get("mm_encoder_outputs") or {}).items() if output}
    return Prompt(ids, start, chunk_size, -(-length // chunk_size), encoded)


class CallState:
    """What one thread's call has come to.

    Attributes:
        merging: the multimodal model's forward runs.
        modalities: those whose features the running forward merges.
        input_ids, embeds: what it was given.
        visual, columns: (B, M) positions that receive visual features, and for each row their columns, (n,).
        video: (B, M) those of videos, where the score looks at frames.
        given: (B, T) scores by cache position, from the caller.
        without_cache: what a cache that the language model makes itself is to keep.
        encoding: features are being made.
        steps, images: the frames of each video, and the images, encoded last, where the score looks at frames.
        encoded_rows: how many features of each modality were made outside the forward, where no prompt is known.
        prompt: while generate() runs, its prompt.
        known: while generate() runs without a cache, rows that have been scored.
        thread: the thread, asked for once: torch.compile cannot ask.
    """

    merging: bool = False
    modalities: frozenset[str] = frozenset()
    input_ids: Tensor | None = None
    embeds: Tensor | None = None
    visual: Tensor | None = None
    video: Tensor | None = None
    given: Tensor | None = None
    without_cache: CacheScores | None = None
    encoding: bool = False
    steps: list[int] | None = None
    images: Images | None = None
    prompt: Prompt | None = None
    known: Known | None = None

    def __init__(self) -> None:
        self.encoded_rows: dict[str, int] = {}
        self.columns: list[Tensor] = []
        self.thread = threading.get_ident()

    def clear(self) -> None:
        """Forgets the forward pass."""
        self.merging, self.modalities = False, frozenset()
        self.input_ids = self.embeds = self.visual = self.video = self.given = self.without_cache = None


class CallStates(threading.local):
    """The call of each thread. (An object within: torch.compile loses changes of the attributes of a thread-local.)"""

    def __init__(self) -> None:
        self.own = CallState()
