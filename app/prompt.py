"""One clip and one question as the model's inputs, and where the visual tokens lie; needs a processor and a config,
no weights."""

import math
from typing import Any

import torch
from transformers import PretrainedConfig

from ..integrations.errors import InputError
from ..integrations.transformers.backbones import visual_token_ids
from ..integrations.transformers.convert.llava import insert_grid_newlines
from .checkpoint import first_line
from .text import check_question
from .token_grid import TokenGrid
from .video.reader import VideoClip


def build_inputs(processor: Any, config: PretrainedConfig, clip: VideoClip, question: str) -> tuple[Any, TokenGrid]:
    """The inputs (a `BatchFeature` on the CPU, among them input_ids (1, N) int64) and the grid of the visual tokens.

    Args:
        config: of the multimodal model.

    Raises:
        InputError: when the question is empty, or the processor cannot place the video in the prompt.
    """
    check_question(question)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    try:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[prompt],
            videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
            video_metadata=[video_metadata(clip)],
            do_sample_frames=False,
            fps=clip.sampled_fps,
            return_tensors="pt",
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"{type(processor).__name__} cannot take this video: {first_line(error)}") from error
    ids = visual_token_ids(config)
    if "newline" in ids:
        inputs["input_ids"] = insert_grid_newlines(inputs["input_ids"], config)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    n_visual = int(torch.isin(inputs["input_ids"], torch.tensor(list(ids.values()))).sum())
    if not n_visual:
        raise InputError(
            f"the prompt of {type(processor).__name__} holds no visual token: its chat template takes no video"
        )
    return inputs, token_grid(inputs, n_visual, len(clip.frames), config)


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


def token_grid(inputs: Any, n_visual: int, n_frames: int, config: PretrainedConfig) -> TokenGrid:
    """Where `n_visual` visual tokens of `n_frames` frames lie.

    Raises:
        InputError: when they fit no layout that is known.
    """
    if "video_grid_thw" in inputs:
        t, h, w = (int(n) for n in inputs["video_grid_thw"][0])
        merge = config.vision_config.spatial_merge_size
        grid = TokenGrid(t, h // merge, w // merge)
    elif "newline" in visual_token_ids(config):
        side = math.isqrt(n_visual // n_frames)  # side * (side + 1) tokens for each frame
        grid = TokenGrid(n_frames, side, side, row_newlines=True)
    else:  # a square of tokens for each frame
        side = math.isqrt(n_visual // n_frames)
        grid = TokenGrid(n_frames, side, side, n_visual - n_frames * side * side)
    if grid.n_tokens != n_visual or grid.n_extra >= grid.h * grid.w:
        raise InputError(
            f"cannot lay {n_visual} visual tokens on {n_frames} frames: {config.model_type} places them in a way that "
            "this package does not know"
        )
    return grid
