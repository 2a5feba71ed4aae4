"""One video and one question through one checkpoint: the main job of the command line, as functions."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
    PreTrainedModel,
)

from ..anchor.config import VideoAnchorConfig
from ..anchor.memory import plan_block
from ..anchor.problem import NonFiniteTokensError
from ..anchor.scores import AnchorResult
from ..anchor.timing import Progress
from .attention import IMPLEMENTATION
from .backbones import visual_token_ids
from .convert_llava import insert_grid_newlines
from .enable import Handle, enable, find_multimodal_model
from .errors import InputError
from .score_cache import ScoreCache
from .token_grid import TokenGrid
from .video import VideoClip


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


def load(name_or_path: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Loads a checkpoint and its processor, with the language model's attention set to `videoanchor_triton`.

    Args:
        name_or_path: a folder or a name on the Hugging Face hub.
        device: "auto" (spread over the GPUs there are, else CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's), or a torch dtype's name.

    Raises:
        InputError: when the checkpoint cannot be loaded, or has no visual tokens.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device}: no CUDA device here; use --device cpu")
    device_map = device if device != "auto" else ("auto" if torch.cuda.is_available() else "cpu")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise InputError(
                f"model {name_or_path} ({config.model_type}) has no visual tokens: give a checkpoint that takes video, "
                "in transformers' own format, such as Qwen2.5-VL, InternVL (-hf) or LLaVA-OneVision (-hf)"
            )
        model = AutoModelForImageTextToText.from_pretrained(
            name_or_path,
            dtype=dtype,
            device_map=device_map,
            attn_implementation={"text_config": IMPLEMENTATION},
        )
        processor = AutoProcessor.from_pretrained(name_or_path)
        find_multimodal_model(model)
    except InputError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {name_or_path} cannot be loaded: {_first_line(error)}") from error
    if not hasattr(processor, "apply_chat_template"):
        raise InputError(f"model {name_or_path} has no multimodal processor: expected one with a chat template")
    return model.eval(), processor


def prepare(model: PreTrainedModel, processor: Any, clip: VideoClip, question: str) -> tuple[dict[str, Any], TokenGrid]:
    """The model's inputs for one video and one question, on the model's device, and the grid of the visual tokens.

    Raises:
        InputError: when the processor cannot place the video in the prompt.
    """
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    try:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[prompt],
            videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
            video_metadata=[_metadata(clip)],
            do_sample_frames=False,
            fps=clip.sampled_fps,
            return_tensors="pt",
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"{type(processor).__name__} cannot take this video: {_first_line(error)}") from error
    base = find_multimodal_model(model)
    if "newline" in visual_token_ids(base.config):
        inputs["input_ids"] = insert_grid_newlines(inputs["input_ids"], base.config)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tokens = torch.tensor(list(visual_token_ids(base.config).values()))
    n_visual = int(torch.isin(inputs["input_ids"], tokens).sum())
    if not n_visual:
        raise InputError(
            f"the prompt of {type(processor).__name__} holds no visual token: its chat template takes no video"
        )
    grid = _token_grid(inputs, n_visual, len(clip.frames), base)
    return dict(inputs.to(model.device)), grid


def check_fits(
    model: PreTrainedModel,
    n_prompt: int,
    max_new_tokens: int,
    clip: VideoClip,
    grid: TokenGrid,
    config: VideoAnchorConfig,
) -> None:
    """Refuses a prompt past the model's context, or more visual tokens than the scores have memory for.

    Raises:
        InputError: with the number of frames that would fit.
    """
    n_frames = len(clip.frames)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = n_prompt + max_new_tokens
    if limit is not None and needed > limit:
        frames = int(n_frames * (limit - max_new_tokens - n_prompt + grid.n_tokens) / grid.n_tokens)
        advice = f"try --max-frames {frames}" if frames > 0 else f"lower --max-new-tokens {max_new_tokens}"
        raise InputError(f"{n_frames} frames need {needed} tokens and the model's context holds {limit}: {advice}")
    if config.scorer == "ssc":
        n_features = model.config.get_text_config().hidden_size
        rank = min(n_features if config.pca_rank is None else config.pca_rank, n_features, grid.n_tokens)
        try:
            plan_block(grid.n_tokens, rank, torch.float32, model.device, config.algorithm, config.memory_budget)
        except MemoryError as error:
            raise InputError(f"{error} (--max-frames below {n_frames})") from error


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
    gpus = range(torch.cuda.device_count()) if cuda else ()
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
            f"{_first_line(error)}"
        ) from error
    except (NonFiniteTokensError, FloatingPointError) as error:
        raise InputError(
            f"visual tokens cannot be scored in {model.dtype}: {_first_line(error)}; try --dtype bfloat16 or float32"
        ) from error


def scored(handle: Handle) -> AnchorResult:
    """The scores of the video that `handle` has seen last."""
    result = handle.last[0]
    assert result is not None  # check_fits and prepare let no prompt without visual tokens pass
    return result


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _metadata(clip: VideoClip) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=clip.n_source_frames,
        fps=clip.source_fps,
        width=clip.frames.shape[2],
        height=clip.frames.shape[1],
        duration=clip.duration,
        video_backend="pyav",
        frames_indices=clip.indices.tolist(),
    )


def _token_grid(inputs: Any, n_visual: int, n_frames: int, base: PreTrainedModel) -> TokenGrid:
    if "video_grid_thw" in inputs:
        t, h, w = (int(n) for n in inputs["video_grid_thw"][0])
        merge = base.config.vision_config.spatial_merge_size
        grid = TokenGrid(t, h // merge, w // merge)
    elif "newline" in visual_token_ids(base.config):
        side = math.isqrt(n_visual // n_frames)  # side * (side + 1) tokens for each frame
        grid = TokenGrid(n_frames, side, side, row_newlines=True)
    else:  # a square of tokens for each frame
        side = math.isqrt(n_visual // n_frames)
        grid = TokenGrid(n_frames, side, side, n_visual - n_frames * side * side)
    if grid.n_tokens != n_visual or grid.n_extra >= grid.h * grid.w:
        raise InputError(
            f"cannot lay {n_visual} visual tokens on {n_frames} frames: {type(base).__name__} places them in a way "
            f"that this package does not know"
        )
    return grid


@dataclass
class _StageTimes:
    device: torch.device
    vision: float = 0.0
    steps: list[float] = field(default_factory=list)
    _start: float = 0.0
    total: float = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            for gpu in range(torch.cuda.device_count()):  # the model may be spread over them
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
    times = _StageTimes(model.device)

    def start(*_: Any) -> None:
        times._start = times.now()

    def end_vision(*_: Any) -> None:
        times.vision += times.now() - times._start

    def end_step(*_: Any) -> None:
        times.steps.append(times.now() - times._start)
        if progress is not None:
            progress("tokens", len(times.steps), 0)

    text: nn.Module = base.language_model  # pyright: ignore[reportAssignmentType]
    hooks = [
        tower.register_forward_pre_hook(start),
        tower.register_forward_hook(end_vision),
        # registered after the gate's hook, so it runs when the scores are there
        text.register_forward_pre_hook(start),
        text.register_forward_hook(end_step),
    ]
    begin = times.now()
    try:
        yield times
    finally:
        times.total = times.now() - begin
        for hook in hooks:
            hook.remove()
