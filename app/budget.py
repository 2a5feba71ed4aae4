"""How many tokens and how much memory clips will take, before any weight is loaded, and how many frames would fit."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..anchor import memory
from ..anchor.authors import authors_memory_bytes, check_authors_memory
from ..anchor.config import VideoAnchorConfig
from ..anchor.problem import features_memory_bytes
from ..integrations.errors import InputError
from ..integrations.transformers.backbones import softmax_layers
from .checkpoint import check_dtype, read_config, read_processor, weight_bytes
from .machine import devices_of
from .prompt import Messages, build_inputs
from .token_grid import TokenGrid
from .video.reader import Clips, VideoClip, each_clip
from .video.sampling import uniform

_GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """What the clips of a prompt and one question take. Memory is in bytes and estimated; only the tokens are exact.

    Args:
        n_frames, n_visual_tokens, n_prompt_tokens, max_new_tokens: counts; the prompt holds the visual tokens.
        context: positions that the model has; None where its config does not say.
        weights: None where their size is not known.
        kv_cache: keys and values of all attention layers, for prompt and answer.
        activations: of the vision tower or of the language model's prefill, whichever is larger.
        scores: of the visual tokens and their scorer: PCA, self-expression.
        available: free on the devices; None where the system does not tell.
        device: where it would run.
        problem: why it does not fit; None where it does.
    """

    n_frames: int
    n_visual_tokens: int
    n_prompt_tokens: int
    max_new_tokens: int
    context: int | None
    scores: int
    device: str
    weights: int | None = None
    kv_cache: int = 0
    activations: int = 0
    available: int | None = None
    problem: str | None = None

    @property
    def past_context(self) -> bool:
        """Prompt and answer have more tokens than the context has positions."""
        return self.context is not None and self.n_prompt_tokens + self.max_new_tokens > self.context

    @property
    def needed(self) -> int:
        """Bytes: scores are computed before the cache is filled, so that the larger of the two counts."""
        return (self.weights or 0) + max(self.scores, self.kv_cache + self.activations)

    def lines(self) -> list[str]:
        """For people."""
        total = self.n_prompt_tokens + self.max_new_tokens
        context = "" if self.context is None else f" of {self.context} in the model's context"
        free = "" if self.available is None else f" of {_gib(self.available)} free"
        return [
            f"tokens: {self.n_prompt_tokens} in the prompt ({self.n_visual_tokens} visual, {self.n_frames} frames), "
            f"{self.max_new_tokens} new: {total}{context}",
            f"memory: about {_gib(self.needed)}{free} on {self.device} ({self._parts()})",
        ]

    def _parts(self) -> str:
        weights = "of unknown size" if self.weights is None else _gib(self.weights)
        return (
            f"weights {weights}, KV cache {_gib(self.kv_cache)}, activations {_gib(self.activations)}, scores "
            f"{_gib(self.scores)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "needed": self.needed}


class Planner:
    """Works out budgets for one checkpoint and one setting of the gate.

    Args:
        name_or_path: a folder or a name on the Hugging Face hub; its config, its processor and the headers of its
            weights are read. What is free on the devices is looked up once, now: make it before the model is loaded.
        settings: of the scores.
        max_new_tokens: of the answer.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" or a torch dtype's name.
        tensor_parallel: processes that the model is split among. Budgets are then those of one of them, with that part
            of the weights (the vision tower, which is not split, counts as if it were) and of the memory of a CPU.

    Raises:
        InputError: the checkpoint cannot be read or takes no video; there is no such device or dtype.
    """

    def __init__(
        self,
        name_or_path: str,
        settings: VideoAnchorConfig,
        *,
        max_new_tokens: int,
        device: str = "auto",
        dtype: str = "auto",
        tensor_parallel: int = 1,
    ) -> None:
        check_dtype(dtype)
        devices = devices_of(device)
        if tensor_parallel > 1:
            devices = devices[:1]
        self._config = read_config(name_or_path)
        self._processor = read_processor(name_or_path)
        self._text: Any = self._config.get_text_config()
        self._settings, self._max_new_tokens = settings, max_new_tokens
        self._device, self._n_parts = devices[0], tensor_parallel
        self._device_name = str(devices[0]) if len(devices) == 1 else f"{len(devices)} GPUs"
        free = [memory.available_memory_bytes(one) for one in devices]
        self._available = sum(n for n in free if n is not None) if None not in free else None
        self._weights = weight_bytes(name_or_path, self._config, dtype)
        if tensor_parallel > 1:
            on_cpu = devices[0].type == "cpu"
            self._device_name = f"each of {tensor_parallel} {'processes' if on_cpu else 'GPUs'}"
            if on_cpu and self._available is not None:
                self._available //= tensor_parallel
            if self._weights is not None:
                self._weights //= tensor_parallel
        stored = getattr(self._config, "dtype", None) or getattr(self._text, "dtype", None) or torch.float32
        self._itemsize = (stored if dtype == "auto" else getattr(torch, dtype)).itemsize

    def budget(self, clips: Clips, question: Messages) -> Budget:
        """What `clips` and `question` take; `problem` says whether they fit.

        Raises:
            InputError: when the processor cannot place the clips in the prompt.
        """
        inputs, grids = build_inputs(self._processor, self._config, clips, question)
        n_prompt, n_visual = inputs["input_ids"].shape[1], sum(grid.n_tokens for grid in grids)
        scores, problem = self._scores(n_visual)
        budget = Budget(
            n_frames=sum(len(clip.frames) for clip in each_clip(clips)),
            n_visual_tokens=n_visual,
            n_prompt_tokens=n_prompt,
            max_new_tokens=self._max_new_tokens,
            context=getattr(self._text, "max_position_embeddings", None),
            weights=self._weights,
            kv_cache=self._kv_cache(n_prompt + self._max_new_tokens),
            activations=max(self._prefill(n_prompt), self._vision(inputs)),
            scores=scores,
            available=self._available,
            device=self._device_name,
        )
        return replace(budget, problem=_problem(budget) or problem)

    def largest(self, clips: Clips, question: Messages) -> int:
        """The largest number of frames of each clip, below those of the longest, that fits; 0 where not even one does.
        Each number that is tried goes through the processor."""

        def fits(n: int) -> bool:
            fewer = [clip if len(clip.frames) <= n else clip.take(_spread(clip, n)) for clip in each_clip(clips)]
            return self.budget(fewer, question).problem is None

        whole, n_frames = self.budget(clips, question), max(len(clip.frames) for clip in each_clip(clips))
        room = (whole.context or whole.n_prompt_tokens) - self._max_new_tokens - whole.n_prompt_tokens
        # exact where tokens grow with frames
        return _largest(fits, n_frames, n_frames + room * n_frames // whole.n_visual_tokens)

    def advice(self, clips: Clips, question: Messages) -> str:
        """What to change so that it fits."""
        return _advice(self.budget(clips, question), self.largest(clips, question))

    def _kv_cache(self, n_tokens: int) -> int:
        """Linear attention and convolutions keep a state of fixed size, left out here."""
        text = self._text
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * softmax_layers(text) * heads * width * n_tokens * self._itemsize // self._n_parts

    def _prefill(self, n_tokens: int) -> int:
        """One layer: its input and residual, queries and output, and the three arrays of a gated MLP."""
        middle = self._text.intermediate_size // self._n_parts
        return n_tokens * (4 * self._text.hidden_size + 3 * middle) * self._itemsize

    def _vision(self, inputs: Any) -> int:
        """The same for one layer of the vision tower over all patches, and the pixels as the processor gives them."""
        vision = self._config.vision_config
        pixels = [value for name, value in inputs.items() if name.startswith("pixel_values")]
        hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
        middle = getattr(vision, "intermediate_size", None) or 4 * hidden
        patch = vision.patch_size
        height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
        depth = getattr(vision, "temporal_patch_size", 1)
        n_patches = sum(value.numel() for value in pixels) // (3 * depth * height * width)
        return n_patches * (4 * hidden + 3 * middle) * self._itemsize + sum(value.nbytes for value in pixels)

    def _scores(self, n_tokens: int) -> tuple[int, str | None]:
        """See `_plan_scores`; the solver has half of what the weights leave."""
        limit = self._settings.memory_budget
        if limit is None and self._available is not None:
            limit = max(self._available - (self._weights or 0), 0) // 2
        return _plan_scores(n_tokens, self._text.hidden_size, self._itemsize, self._settings, self._device, limit)


def check_fits(
    model: PreTrainedModel,
    n_prompt: int,
    max_new_tokens: int,
    media: Any,
    grids: Sequence[TokenGrid],
    settings: VideoAnchorConfig,
) -> None:
    """What `Planner` asks before a model is loaded, of one that is: whether prompt and answer fit its context and the
    scores the memory. It takes it that fewer frames have as many tokens each.

    Args:
        n_prompt: tokens of the prompt, those of `grids` among them.
        media: see `prompt.place`.

    Raises:
        InputError: it does not fit; for a single clip with the number of frames that would.
    """
    text: Any = model.config.get_text_config()
    n_all = sum(grid.n_tokens for grid in grids)

    def budget(n_frames: int, n_visual: int) -> Budget:
        scores, problem = _plan_scores(
            n_visual, text.hidden_size, model.dtype.itemsize, settings, model.device, settings.memory_budget
        )
        taken = Budget(
            n_frames=n_frames,
            n_visual_tokens=n_visual,
            n_prompt_tokens=n_prompt - n_all + n_visual,
            max_new_tokens=max_new_tokens,
            context=getattr(text, "max_position_embeddings", None),
            scores=scores,
            device=str(model.device),
        )
        return replace(taken, problem=_problem(taken) or problem)

    items = media if isinstance(media, Sequence) and not isinstance(media, str) else [media]
    clip = items[0]
    if len(items) > 1 or not isinstance(clip, VideoClip):
        whole = budget(sum(max(grid.t, 1) for grid in grids), n_all)
        if whole.problem is not None:
            raise InputError(f"{whole.problem}: give fewer or shorter videos, or smaller images")
        return
    (grid,) = grids
    n_frames = len(clip.frames)
    frames_a_step = -(-n_frames // grid.t)

    def fewer(n: int) -> Budget:
        return budget(n, replace(grid, t=-(-n // frames_a_step)).n_tokens)

    whole = fewer(n_frames)
    if whole.problem is not None:
        best = _largest(lambda n: fewer(n).problem is None, n_frames)
        raise InputError(f"{whole.problem}: {_advice(whole, best)}")


def _plan_scores(
    n_tokens: int, width: int, itemsize: int, settings: VideoAnchorConfig, device: torch.device, limit: int | None
) -> tuple[int, str | None]:
    """Bytes, and why they cannot be had: the visual tokens, picked from the embeddings, and beside them the PCA and
    then the solver, which takes as many tokens at a time as `limit` bytes allow, or half of what is free. A scorer that
    is a function is taken to need as much as it is given."""
    tokens = n_tokens * width * itemsize
    if settings.scorer == "uniform":
        return tokens, None
    if settings.scorer not in ("ssc", "knn", "kmeans"):
        return 2 * tokens, None
    pca = features_memory_bytes(n_tokens, width, settings.pca_rank)
    if settings.scorer != "ssc":
        return tokens + pca, None
    rank = min(width if settings.pca_rank is None else settings.pca_rank, width, n_tokens)
    authors, n_iterated, problem = settings.arithmetic == "authors", memory.SMALLEST_BLOCK, None
    try:
        if authors:
            check_authors_memory(n_tokens, device, limit)
        else:
            plan = memory.plan_solver(n_tokens, n_tokens, rank, device, limit)
            n_iterated = plan.block * plan.threads
    except MemoryError as error:
        problem = str(error)
    solver = memory.solver_memory_bytes(n_tokens, n_tokens, rank, n_iterated)
    return tokens + max(pca, authors_memory_bytes(n_tokens) if authors else solver), problem


def _problem(budget: Budget) -> str | None:
    if budget.past_context:
        n_tokens = budget.n_prompt_tokens + budget.max_new_tokens
        return f"{budget.n_frames} frames need {n_tokens} tokens and the model's context holds {budget.context}"
    if budget.available is not None and budget.needed > budget.available:
        return (
            f"{budget.n_frames} frames, {budget.n_visual_tokens} tokens, need about {_gib(budget.needed)} and "
            f"{_gib(budget.available)} are free on {budget.device} ({budget._parts()})"
        )
    return None


def _spread(clip: VideoClip, n_frames: int) -> np.ndarray:
    return uniform(np.arange(len(clip.frames), dtype=np.float64), n_frames)


def _largest(fits: Callable[[int], bool], n_frames: int, probe: int = 1) -> int:
    """The largest number of frames, below `n_frames`, that fits; 0 where not even one does. It tries `probe` first."""
    low, high, step = 0, n_frames, 1
    while high - low > 1:
        probe = min(max(probe, low + 1), high - 1)
        if fits(probe):
            low, probe, step = probe, probe + step, 2 * step
        else:
            high, probe = probe, (low + probe) // 2
    return low


def _advice(whole: Budget, n_frames: int) -> str:
    """What to change where `whole` does not fit and so many frames do."""
    if n_frames:
        return f"try --max-frames {n_frames}"
    if whole.past_context:
        return f"not even --max-frames 1 fits: lower --max-new-tokens {whole.max_new_tokens}"
    return "not even --max-frames 1 fits: take a smaller checkpoint, or --dtype bfloat16 if its weights are larger"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.2g} GiB" if n_bytes < 10 * _GIB else f"{n_bytes / _GIB:.0f} GiB"
