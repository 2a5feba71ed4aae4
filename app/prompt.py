"""Videos, images and chat messages as the model's inputs, and where the visual tokens lie; needs a processor and a
config, no weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from PIL import Image
from transformers import PretrainedConfig

from ..integrations.errors import InputError
from ..integrations.transformers.backbones import visual_token_ids
from ..integrations.transformers.convert.llava import insert_grid_newlines
from .checkpoint import first_line
from .text import ALL_MEDIA, check_question
from .token_grid import TokenGrid
from .video.reader import VideoClip, read_video

Medium: TypeAlias = VideoClip | Image.Image | np.ndarray | str | Path
"""A video as `read_video` returns it, the path of one, or an image, (height, width, 3) uint8 or Pillow's."""
Messages: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A question, asked after all media, or chat messages as `apply_chat_template` takes them."""
_RATES_FROM_METADATA = int(transformers.__version__.split(".")[0]) >= 5
_Read: TypeAlias = Callable[[str | Path], VideoClip]


def place(
    media: Medium | Sequence[Medium] | None, messages: Messages, read: _Read = read_video
) -> tuple[list[VideoClip | Image.Image], list[dict[str, Any]]]:
    """The media in the order of the prompt, read, and messages with an empty entry where each of them goes.

    Args:
        media: one for each `{"type": "video"}` and `{"type": "image"}` entry of the messages, in their order; None
            where the entries hold them, as `{"type": "video", "video": PATH}` and `{"type": "image", "image": PATH}`.
        messages: a question is put after all media, as the entry `ALL_MEDIA` does. An image's path is then an image
            beside others, and alone a video of one frame, which all models take.
        read: reads a path.

    Raises:
        InputError: media and entries do not fit each other, the question is empty, or a path cannot be read.
    """
    given = [] if media is None else [media] if isinstance(media, Medium) else list(media)
    items = [read(one) if isinstance(one, str | Path) else one for one in given]
    if isinstance(messages, str):
        check_question(messages)
        messages = [{"role": "user", "content": [ALL_MEDIA, {"type": "text", "text": messages}]}]
    contents = [message["content"] for message in messages]
    if len(items) > 1 and any(ALL_MEDIA in content for content in contents if not isinstance(content, str)):
        items = [_image(one.frames[0]) if isinstance(one, VideoClip) and one.is_image else one for one in items]
    waiting, found, placed = iter(items), [], []
    for message, content in zip(messages, contents, strict=True):
        if not isinstance(content, str):
            entries = [dict(entry) for entry in content]
            if ALL_MEDIA in entries:
                at = entries.index(ALL_MEDIA)
                entries[at : at + 1] = [{"type": _kind(item)} for item in items]
            content = [_entry(entry, waiting, found, read) for entry in entries]
        placed.append({**message, "content": content})
    if (n_left := len(list(waiting))) or not found:
        raise InputError(
            f"messages: {n_left} of {len(items)} media have no entry of type video or image to go to"
            if found or n_left
            else "media: expected a video or an image to ask about, got none"
        )
    return [item if isinstance(item, VideoClip) else _image(item) for item in found], placed


def _kind(item: Any) -> str:
    return "video" if isinstance(item, VideoClip) else "image"


def _entry(entry: dict[str, Any], waiting: Any, found: list[Any], read: _Read) -> dict[str, Any]:
    """An entry of a message without what it holds, which goes to `found`."""
    kind = entry.get("type")
    if kind not in ("video", "image"):
        return entry
    held = [key for key in entry if key != "type"]
    if not held:
        item = next(waiting, None)
        if item is None:
            raise InputError(f"messages: more entries of type video or image than media; give one for each {kind}")
    elif held[0] in (kind, "path", "url") and len(held) == 1:
        item = entry[held[0]]
        if isinstance(item, str | Path):
            item = read(item) if kind == "video" else read(item).frames[0]
    else:
        raise InputError(
            f'messages: expected {{"type": "{kind}", "{kind}": PATH}} or {{"type": "{kind}"}} beside media, got '
            f"{', '.join(map(repr, held))}"
        )
    if _kind(item) != kind:
        raise InputError(f"messages: an entry of type {kind} meets {_kind(item)} data; give media in the same order")
    found.append(item)
    return {"type": kind}


def _image(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item.convert("RGB")
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3:
        return Image.fromarray(item)
    shown = f"{item.dtype} {item.shape}" if isinstance(item, np.ndarray) else type(item).__name__
    raise InputError(
        f"media: expected what read_video returns, a path, a Pillow image or an array (height, width, 3) uint8, got "
        f"{shown}"
    )


def build_inputs(
    processor: Any, config: PretrainedConfig, media: Medium | Sequence[Medium] | None, messages: Messages
) -> tuple[Any, list[TokenGrid]]:
    """The inputs (a `BatchFeature` on the CPU, among them input_ids (1, N) int64) and the grid of the visual tokens of
    each medium, in the order of the prompt.

    Args:
        config: of the multimodal model.
        media, messages: see `place`.

    Raises:
        InputError: see `place`; or the processor cannot place the media in the prompt.
    """
    items, messages = place(media, messages)
    clips = [item for item in items if isinstance(item, VideoClip)]
    given: dict[str, Any] = {}
    if clips:
        given["videos"] = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips]
        given["video_metadata"] = [video_metadata(clip) for clip in clips]
        given["do_sample_frames"] = False
        rates = [clip.sampled_fps for clip in clips]
        if len(set(rates)) == 1:
            given["fps"] = rates[0]
        elif not _RATES_FROM_METADATA:
            given["fps"] = rates
    if len(clips) < len(items):
        given["images"] = [item for item in items if not isinstance(item, VideoClip)]
    try:
        prompt = chat_text(processor, messages)
        inputs = processor(text=[prompt], **given, return_tensors="pt")
    except (ValueError, ImportError, RuntimeError) as error:
        uneven = len({len(clip.frames) for clip in clips}) > 1
        if isinstance(error, RuntimeError) and not uneven:  # of torch.stack, in transformers 4.57
            raise
        what = "this video" if len(items) == len(clips) == 1 else "these videos and images"
        hint = "; most models take videos of equally many frames" if uneven else ""
        raise InputError(f"{type(processor).__name__} cannot take {what}: {first_line(error)}{hint}") from error
    if "newline" in visual_token_ids(config):
        inputs["input_ids"] = insert_grid_newlines(inputs["input_ids"], config)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    visual = torch.isin(inputs["input_ids"][0], torch.tensor(list(visual_token_ids(config).values())))
    if not visual.any():
        raise InputError(
            f"the prompt of {type(processor).__name__} holds no visual token: its chat template takes no video"
        )
    return inputs, token_grids(inputs, visual.tolist(), items, config)


def chat_text(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt as its chat template writes it.

    Args:
        messages: of `place`.

    Raises:
        InputError: the template refuses the messages, or leaves a system prompt out.
    """
    try:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise InputError(f"the chat template of {type(processor).__name__} refuses the messages: {error}") from error
    for message in messages:
        if message["role"] == "system" and not all(text.strip() in prompt for text in _texts(message["content"])):
            raise InputError(
                f"the chat template of {type(processor).__name__} takes no system prompt: put its words into the "
                "question"
            )
    return prompt


def _texts(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [entry["text"] for entry in content if "text" in entry]


def video_metadata(clip: VideoClip) -> Any:
    """What a processor wants to know of the video that the frames come from (`transformers.VideoMetadata`)."""
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


def token_grids(inputs: Any, visual: list[bool], items: Sequence[Any], config: PretrainedConfig) -> list[TokenGrid]:
    """Where the visual tokens of each medium lie. Those of an image whose tiles are not known have no places; where
    even the media cannot be told apart, one grid without places holds all tokens.

    Args:
        visual: which tokens of the prompt are visual.
        items: the media, videos as `VideoClip`.

    Raises:
        InputError: a video's tokens fit no layout that is known.
    """
    if "video_grid_thw" in inputs or "image_grid_thw" in inputs:
        merge = config.vision_config.spatial_merge_size
        rows = {kind: iter(inputs.get(f"{kind}_grid_thw", ())) for kind in ("video", "image")}
        shapes = [[int(n) for n in next(rows[_kind(item)])] for item in items]
        grids = [TokenGrid(t, h // merge, w // merge) for t, h, w in shapes]
        if sum(grid.n_tokens for grid in grids) == sum(visual):
            return grids
        raise _unknown_layout(sum(visual), items, config)
    lengths = [sum(run) for is_visual, run in groupby(visual) if is_visual]
    n_runs = [len(item.frames) if isinstance(item, VideoClip) else 1 for item in items]
    if len(items) == 1:
        counts = [sum(lengths)]
    elif len(lengths) == len(items):
        counts = lengths
    elif len(lengths) == sum(n_runs):  # the model sets frames apart
        left = iter(lengths)
        counts = [sum(next(left) for _ in range(n)) for n in n_runs]
    else:
        return [TokenGrid(0, 0, 0, sum(lengths))]
    return [
        _video_grid(count, item, config) if isinstance(item, VideoClip) else TokenGrid(0, 0, 0, count)
        for count, item in zip(counts, items, strict=True)
    ]


def _video_grid(n_tokens: int, clip: VideoClip, config: PretrainedConfig) -> TokenGrid:
    """A square for each frame."""
    n_frames = len(clip.frames)
    side = math.isqrt(n_tokens // n_frames)
    if "newline" in visual_token_ids(config):  # side * (side + 1) tokens for each frame
        grid = TokenGrid(n_frames, side, side, row_newlines=True)
    else:
        grid = TokenGrid(n_frames, side, side, n_tokens - n_frames * side * side)
    if grid.n_tokens != n_tokens or grid.n_extra >= grid.h * grid.w:
        raise _unknown_layout(n_tokens, [clip], config)
    return grid


def _unknown_layout(n_tokens: int, items: Sequence[Any], config: PretrainedConfig) -> InputError:
    n_frames = sum(len(item.frames) if isinstance(item, VideoClip) else 1 for item in items)
    return InputError(
        f"cannot lay {n_tokens} visual tokens on {n_frames} frames: {config.model_type} places them in a way that "
        "this package does not know"
    )
