"""One video and one question through one checkpoint: the main job of the command line, as functions."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Cache,
    PreTrainedModel,
)
from transformers.distributed.configuration_utils import DistributedConfig

from ..anchor.config import VideoAnchorConfig
from ..anchor.problem import NonFiniteTokensError
from ..anchor.scores import AnchorResult
from ..anchor.timing import Progress
from ..integrations.errors import InputError
from ..integrations.transformers.attention import IMPLEMENTATION
from ..integrations.transformers.enable import Handle, enable
from ..integrations.transformers.visual_tokens import find_multimodal_model
from .budget import check_fits
from .checkpoint import cannot_load, check_dtype, check_splits, devices_of, first_line, read_config, read_processor
from .prompt import build_inputs
from .score_cache import ScoreCache
from .token_grid import TokenGrid
from .video.reader import VideoClip


@dataclass(frozen=True, eq=False)
class RunResult:
    """What `answer` returns.

    Args:
        answer: the generated text.
        n_prompt_tokens, n_visual_tokens, n_generated_tokens: counts.
        grid: where the visual tokens lie.
        anchor: scores and labels of the visual tokens.
        seconds: by stage: vision, ssc, prefill, decode, decode_per_token, generate (all of the call).
        device: the name of the GPU that holds the model's first layers, or "cpu".
        peak_memory_bytes: of the allocators of all GPUs together; None on a CPU.
    """

    answer: str
    n_prompt_tokens: int
    n_visual_tokens: int
    n_generated_tokens: int
    grid: TokenGrid
    anchor: AnchorResult
    seconds: dict[str, float]
    device: str
    peak_memory_bytes: int | None


def load(
    name_or_path: str, device: str = "auto", dtype: str = "auto", tensor_parallel: int = 1
) -> tuple[PreTrainedModel, Any]:
    """Loads a checkpoint and its processor, with the language model's attention set to `videoanchor_triton`.

    Args:
        name_or_path: a folder or a name on the Hugging Face hub.
        device: "auto" (spread over the GPUs there are, else CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's), or a torch dtype's name.
        tensor_parallel: 1, or the processes that torchrun has started and that all call this: each gets its part of the
            language model, on a GPU of its own, and the other weights whole.

    Raises:
        InputError: when the checkpoint cannot be loaded or split, lacks weights, or has no visual tokens.
    """
    check_dtype(dtype)
    devices_of(device)
    read_config(name_or_path)  # refuses what takes no video
    if tensor_parallel > 1:
        check_splits(name_or_path, tensor_parallel, device)
        placement = _split(tensor_parallel)
    else:
        placement = {"device_map": device if device != "auto" else ("auto" if torch.cuda.is_available() else "cpu")}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name_or_path,
            output_loading_info=True,
            trust_remote_code=False,
            dtype=dtype,
            **placement,
            attn_implementation={"text_config": IMPLEMENTATION},
        )
        model, found = loaded
        find_multimodal_model(model)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise cannot_load(name_or_path, error) from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"model {name_or_path} lacks {len(missing)} of its weights ({missing[0]}, ...), and would run with random "
            "ones: download or convert it again"
        )
    return model.eval(), read_processor(name_or_path)


def _split(n: int) -> dict[str, Any]:
    """How `from_pretrained` is asked for a part of a model: by `tp_plan` before transformers 5."""
    if "tp_size" not in {one.name for one in fields(DistributedConfig)}:
        return {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(tp_size=n, tp_plan="auto")}  # pyright: ignore[reportCallIssue]


def prepare(model: PreTrainedModel, processor: Any, clip: VideoClip, question: str) -> tuple[dict[str, Any], TokenGrid]:
    """The model's inputs for one video and one question, on the model's device, and the grid of the visual tokens.

    Raises:
        InputError: when the processor cannot place the video in the prompt.
    """
    inputs, grid = build_inputs(processor, find_multimodal_model(model).config, clip, question)
    return dict(inputs.to(model.device)), grid


def answer(
    model: PreTrainedModel,
    processor: Any,
    clip: VideoClip,
    question: str,
    config: VideoAnchorConfig,
    *,
    max_new_tokens: int = 128,
    scores: ScoreCache | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Asks `question` about `clip` with the gate on, by greedy decoding.

    Args:
        scores: where scores are kept; None computes them anew.

    Raises:
        InputError: when the video does not fit the model, its context or the memory.
    """
    inputs, grid = prepare(model, processor, clip, question)
    check_fits(model, inputs["input_ids"].shape[1], max_new_tokens, clip, grid, config)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "scores": scores, "progress": progress}
    return generate(model, processor, inputs, clip, grid, config, **options)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first positions of a prompt, its video among them.

    Args:
        cache: their keys and values, and the scores; continuing it changes it.
        anchor: scores and labels of the visual tokens.
        seconds: by stage, see `RunResult`.
    """

    cache: Cache
    anchor: AnchorResult
    seconds: dict[str, float]


def generate(
    model: PreTrainedModel,
    processor: Any,
    inputs: dict[str, Any],
    clip: VideoClip,
    grid: TokenGrid,
    config: VideoAnchorConfig,
    *,
    max_new_tokens: int,
    prefix: Prefix | None = None,
    scores: ScoreCache | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Answers what `prepare` has made, with the gate on, by greedy decoding.

    Args:
        scores: where scores are kept; None computes them anew.
        prefix: of this prompt; its cache is continued, and `inputs` need no pixels.

    Raises:
        InputError: when the video does not fit the memory, or cannot be scored.
    """
    n_prompt = inputs["input_ids"].shape[1]
    cuda = model.device.type == "cuda"
    gpus = _gpus(model)
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    past = {} if prefix is None else {"past_key_values": prefix.cache}
    with gated(model, config, clip, grid, scores, progress) as handle, stage_times(model, progress) as times:
        output = model.generate(**inputs, **past, max_new_tokens=max_new_tokens, do_sample=False)  # pyright: ignore
        anchor = scored(handle) if prefix is None else prefix.anchor
    generated = output[0, n_prompt:]
    return RunResult(
        answer=processor.batch_decode(generated[None], skip_special_tokens=True)[0].strip(),
        n_prompt_tokens=n_prompt,
        n_visual_tokens=grid.n_tokens,
        n_generated_tokens=len(generated),
        grid=grid,
        anchor=anchor,
        seconds=times.summary(0.0 if prefix is not None else sum(anchor.seconds.values())),
        device=torch.cuda.get_device_name(model.device) if cuda else "cpu",
        peak_memory_bytes=sum(map(torch.cuda.max_memory_allocated, gpus)) if cuda else None,
    )


@contextmanager
def gated(
    model: PreTrainedModel,
    config: VideoAnchorConfig,
    clip: VideoClip,
    grid: TokenGrid,
    scores: ScoreCache | None = None,
    progress: Progress | None = None,
) -> Iterator[Handle]:
    """`enable` in inference mode.

    Raises:
        InputError: when the video does not fit the memory, or cannot be scored.
    """
    try:
        with enable(model, config) as handle, torch.inference_mode():
            handle.progress = progress
            if scores is not None:
                handle.anchor_scores = scores.anchor_scores
            yield handle
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(
            f"not enough memory for {grid.n_tokens} visual tokens (--max-frames below {len(clip.frames)}): "
            f"{first_line(error)}"
        ) from error
    except (NonFiniteTokensError, FloatingPointError) as error:
        raise InputError(
            f"visual tokens cannot be scored in {model.dtype}: {first_line(error)}; try --dtype bfloat16 or float32"
        ) from error


def scored(handle: Handle) -> AnchorResult:
    """The scores of the video that `handle` has seen last."""
    result = handle.last[0]
    assert result is not None  # check_fits and prepare let no prompt without visual tokens pass
    return result


def _gpus(model: PreTrainedModel) -> list[torch.device]:
    """Those that hold it."""
    return sorted({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}, key=str)


@dataclass
class _StageTimes:
    gpus: list[torch.device]
    vision: float = 0.0
    steps: list[float] = field(default_factory=list)
    _start: float = 0.0
    total: float = 0.0

    def now(self) -> float:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()

    def summary(self, ssc: float) -> dict[str, float]:
        """Seconds by stage. A step is one pass of the language model, without the scoring before the first."""
        first, decode = self.steps[0], sum(self.steps[1:])
        return {
            "vision": self.vision,
            "ssc": ssc,
            "prefill": first,
            "decode": decode,
            "decode_per_token": decode / max(len(self.steps) - 1, 1),
            "generate": self.total,
        }


@contextmanager
def stage_times(model: PreTrainedModel, progress: Progress | None):
    """Times the vision tower and each pass of the language model (its layers only: the scores come before them)."""
    base = find_multimodal_model(model)
    tower: nn.Module = getattr(base, "visual", None) or base.vision_tower  # pyright: ignore[reportAssignmentType]
    times = _StageTimes(_gpus(model))

    def start(*_: Any) -> None:
        times._start = times.now()

    def start_vision(*_: Any) -> None:
        if progress is not None:
            progress("vision", 0, 0)
        start()

    def end_vision(*_: Any) -> None:
        times.vision += times.now() - times._start

    def start_step(*_: Any) -> None:
        if progress is not None and not times.steps:
            progress("prefill", 0, 0)
        start()

    def end_step(*_: Any) -> None:
        times.steps.append(times.now() - times._start)
        if progress is not None:
            progress("tokens", len(times.steps), 0)

    text: nn.Module = base.language_model  # pyright: ignore[reportAssignmentType]
    hooks = [
        tower.register_forward_pre_hook(start_vision),
        tower.register_forward_hook(end_vision),
        # registered after the gate's hook, so it runs when the scores are there
        text.register_forward_pre_hook(start_step),
        text.register_forward_hook(end_step),
    ]
    begin = times.now()
    try:
        yield times
    finally:
        times.total = times.now() - begin
        for hook in hooks:
            hook.remove()
