"""One question about videos and images through one checkpoint: the main job of the command line, as functions."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, Cache, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from ..anchor.config import VideoAnchorConfig
from ..anchor.problem import NonFiniteTokensError
from ..anchor.scores import AnchorResult
from ..anchor.timing import Progress
from ..integrations.errors import InputError
from ..integrations.transformers.attention import IMPLEMENTATION
from ..integrations.transformers.enable import enable
from ..integrations.transformers.handle import Handle
from ..integrations.transformers.visual_tokens import find_multimodal_model
from .answer import Answer, GateEffect
from .budget import check_fits
from .checkpoint import cannot_load, check_dtype, check_splits, first_line, read_config, read_processor
from .machine import devices_of, slow_arithmetic
from .output_size import largest_change, output_sizes
from .prompt import Medium, Messages, build_inputs, place
from .score_cache import ScoreCache
from .stage_times import gpus_of, stage_times
from .token_grid import TokenGrid
from .token_sampling import TokenSampling, drawing
from .video.reader import Sampling, read_video

logger = logging.getLogger(__name__)


def ask(
    model: PreTrainedModel | str | Path,
    video: Medium | Sequence[Medium] | None,
    question: Messages,
    config: VideoAnchorConfig,
    *,
    processor: Any = None,
    max_frames: int = 32,
    fps: float | None = None,
    sampling: Sampling = "uniform",
    max_new_tokens: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Answer:
    """Asks a model about videos and images with the gate on, by greedy decoding.

    Args:
        model: a folder or a name on the Hugging Face hub, or a model that is loaded: faster from the second question
            on.
        video: a path (a video, an image, or a folder of images, the views of a scene), what `read_video` returns, an
            image ((height, width, 3) uint8 or Pillow's), or several of these; None where the messages hold them. A path
            of an image is an image beside others, and alone a video of one frame.
        question: asked after all of them; or chat messages in transformers' format, whose entries of type "video" and
            "image" are filled in their order.
        config: strength of the gate, and how tokens are scored.
        processor: of a loaded model; None reads that of the checkpoint it was loaded from.
        max_frames, fps, sampling: of each path to a video, see `read_video`.
        max_new_tokens: of the answer.
        device, dtype: of a model that is loaded here, see `load`.
        progress: see `Progress`.

    Returns:
        the answer's text, the scores of the visual tokens, and the seconds of each stage.

    Raises:
        InputError (a ValueError): wrong input: a video or checkpoint that cannot be read, an empty question, media and
            messages that do not fit each other; a prompt that does not fit the model's context or the memory.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> import numpy as np
        >>> import videoanchor_triton as va
        >>> from videoanchor_triton.app.demo import make_checkpoint
        >>> model = Path(mkdtemp(), "tiny")  # with random weights; yours is "Qwen/Qwen2.5-VL-7B-Instruct"
        >>> make_checkpoint(model)
        >>> image = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=4, pca_rank=8)
        >>> answer = va.ask(model, [image, image], "Where is the lamp?", config, max_new_tokens=4)
        >>> answer.n_generated_tokens
        4
        >>> [answer.anchor.scores.shape[0], *(grid.n_tokens for grid in answer.grids)]
        [32, 16, 16]

    See Also:
        enable: the gate for a `generate()` of your own.
        prepare: only the model's inputs.
    """
    times = [time.perf_counter()]
    read = partial(read_video, max_frames=max_frames, fps=fps, sampling=sampling, progress=progress)
    items, messages = place(video, question, read)
    times.append(time.perf_counter())
    if isinstance(model, str | Path):
        model, found = load(str(model), device, dtype)
        processor = processor or found
    elif processor is None:
        if not model.name_or_path:
            raise InputError(
                "processor: this model does not say which checkpoint it was loaded from: give its processor too"
            )
        processor = read_processor(model.name_or_path)
    times.append(time.perf_counter())
    result = answer(model, processor, items, messages, config, max_new_tokens=max_new_tokens, progress=progress)
    before = {"decode_video": times[1] - times[0], "load_model": times[2] - times[1]}
    return replace(result, seconds=before | result.seconds)


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
    if slow := slow_arithmetic(model.dtype, model.device):
        logger.warning("%s: %s", name_or_path, slow)
    return model.eval(), read_processor(name_or_path)


def _split(n: int) -> dict[str, Any]:
    """How `from_pretrained` is asked for a part of a model: by `tp_plan` before transformers 5."""
    if "tp_size" not in {one.name for one in fields(DistributedConfig)}:
        return {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(tp_size=n, tp_plan="auto")}  # pyright: ignore[reportCallIssue]


def prepare(
    model: PreTrainedModel, processor: Any, media: Medium | Sequence[Medium] | None, messages: Messages
) -> tuple[dict[str, Any], list[TokenGrid]]:
    """The inputs of a model's `generate()` for a prompt with videos and images.

    Args:
        model: they are put on its device.
        processor: of its checkpoint.
        media: a path (a video, or what `read_video` reads), what `read_video` returns, an image ((height, width, 3)
            uint8 or Pillow's), or several of these; None where the messages hold them.
        messages: a question, asked after all media; or chat messages in transformers' format, whose entries of type
            "video" and "image" are filled in their order.

    Returns:
        the inputs, among them `input_ids` (1, N) int64; and where the visual tokens of each video and image lie, in the
        order of the prompt. An image whose tiles are not known has tokens without places.

    Raises:
        InputError (a ValueError): media and messages do not fit each other, or the processor cannot place them.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> import numpy as np
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> import videoanchor_triton as va
        >>> from videoanchor_triton.app.demo import make_checkpoint
        >>> folder = Path(mkdtemp(), "tiny")  # with random weights; yours is "Qwen/Qwen2.5-VL-7B-Instruct"
        >>> make_checkpoint(folder)
        >>> model = AutoModelForImageTextToText.from_pretrained(folder)
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> image = np.zeros((112, 168, 3), dtype=np.uint8)
        >>> inputs, grids = va.prepare(model, processor, image, "Where is the lamp?")
        >>> grids
        [TokenGrid(t=1, h=4, w=6, n_extra=0, row_newlines=False)]

    See Also:
        enable: the gate around `generate()`.
        ask: all in one call.
    """
    inputs, grids = build_inputs(processor, find_multimodal_model(model).config, media, messages)
    return dict(inputs.to(model.device)), grids


def answer(
    model: PreTrainedModel,
    processor: Any,
    media: Medium | Sequence[Medium] | None,
    messages: Messages,
    config: VideoAnchorConfig,
    *,
    max_new_tokens: int = 128,
    scores: ScoreCache | None = None,
    gate_effect: bool = False,
    drawn: TokenSampling | None = None,
    progress: Progress | None = None,
) -> Answer:
    """`ask` of a loaded model.

    Args:
        scores: where scores are kept; None computes them anew.
        drawn: how tokens are drawn; None takes the likeliest each time.
        gate_effect: find out how far the gate moved the answer and the attention's output, in two more prefills.

    Raises:
        InputError: when the prompt does not fit the model, its context or the memory.
    """
    inputs, grids = prepare(model, processor, media, messages)
    check_fits(model, inputs["input_ids"].shape[1], max_new_tokens, media, grids, config)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "scores": scores, "drawn": drawn, "progress": progress}
    result = generate(model, processor, inputs, grids, config, **options)
    if gate_effect:
        result = replace(result, gate_effect=_gate_effect(model, processor, inputs, config, result.anchor))
    return result


def _gate_effect(
    model: PreTrainedModel, processor: Any, inputs: dict[str, Any], config: VideoAnchorConfig, anchor: AnchorResult
) -> GateEffect:
    """Two more prefills, with the scores that are known and without a gate."""
    first, sizes = [], []
    for one in (config, replace(config, alpha_k=0.0, alpha_v=0.0, alpha_q=0.0)):
        with gated(model, one) as handle, output_sizes() as measured:
            handle.anchor_scores = lambda *_, **__: anchor
            output = model.generate(  # pyright: ignore[reportCallIssue]
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        first.append(output.logits[0][0].float().softmax(-1))
        sizes.append(measured)
    token, token_without = int(first[0].argmax()), int(first[1].argmax())
    probability, probability_without = (float(one[token]) for one in first)
    texts = [processor.decode([one]).strip() for one in (token, token_without)]
    return GateEffect(texts[0], probability, probability_without, texts[1], largest_change(*sizes))


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first positions of a prompt, its video among them.

    Args:
        cache: their keys and values, and the scores; continuing it changes it.
        anchor: scores and labels of the visual tokens.
        seconds: by stage, see `Answer`.
    """

    cache: Cache
    anchor: AnchorResult
    seconds: dict[str, float]


def generate(
    model: PreTrainedModel,
    processor: Any,
    inputs: dict[str, Any],
    grids: list[TokenGrid],
    config: VideoAnchorConfig,
    *,
    max_new_tokens: int,
    prefix: Prefix | None = None,
    scores: ScoreCache | None = None,
    drawn: TokenSampling | None = None,
    progress: Progress | None = None,
) -> Answer:
    """Answers what `prepare` has made, with the gate on.

    Args:
        scores: where scores are kept; None computes them anew.
        drawn: see `answer`.
        prefix: of this prompt; its cache is continued, and `inputs` need no pixels.

    Raises:
        InputError: when the video does not fit the memory, or cannot be scored.
    """
    n_prompt = inputs["input_ids"].shape[1]
    cuda = model.device.type == "cuda"
    gpus = gpus_of(model)
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    past = {} if prefix is None else {"past_key_values": prefix.cache}
    with (
        gated(model, config, scores, progress) as handle,
        stage_times(model, progress) as times,
        drawing(drawn, gpus) as options,
    ):
        output = model.generate(**inputs, **past, **options, max_new_tokens=max_new_tokens)  # pyright: ignore
        anchor = scored(handle) if prefix is None else prefix.anchor
    generated = output[0, n_prompt:]
    return Answer(
        text=processor.batch_decode(generated[None], skip_special_tokens=True)[0].strip(),
        n_prompt_tokens=n_prompt,
        n_visual_tokens=sum(grid.n_tokens for grid in grids),
        n_generated_tokens=len(generated),
        grids=grids,
        anchor=anchor,
        seconds=times.summary(0.0 if prefix is not None else sum(anchor.seconds.values())),
        device=torch.cuda.get_device_name(model.device) if cuda else "cpu",
        peak_memory_bytes=sum(map(torch.cuda.max_memory_allocated, gpus)) if cuda else None,
    )


@contextmanager
def gated(
    model: PreTrainedModel,
    config: VideoAnchorConfig,
    scores: ScoreCache | None = None,
    progress: Progress | None = None,
) -> Iterator[Handle]:
    """`enable` in inference mode.

    Raises:
        InputError: when the video does not fit the memory, or cannot be scored, or its tokens cannot be merged.
    """
    try:
        with enable(model, config) as handle, torch.inference_mode():
            handle.progress = progress
            if scores is not None:
                handle.anchor_scores = scores.anchor_scores
            yield handle
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(
            f"not enough memory for so many visual tokens, take fewer frames: {first_line(error)}"
        ) from error
    except NotImplementedError as error:
        if not config.merges:
            raise
        raise InputError(first_line(error)) from error
    except (NonFiniteTokensError, FloatingPointError) as error:
        raise InputError(
            f"visual tokens cannot be scored in {model.dtype}: {first_line(error)}; try --dtype bfloat16 or float32"
        ) from error


def scored(handle: Handle) -> AnchorResult:
    """The scores of the video that `handle` has seen last."""
    result = handle.last[0]
    assert result is not None  # check_fits and prepare let no prompt without visual tokens pass
    return result
