"""What a tiny video of `FRAMES` frames is to a backbone: its tokens in a prompt and its pixels."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor

V5 = int(hf.__version__.split(".")[0]) >= 5
FRAMES = 3
VOCABULARY, PAD, IMAGE, VIDEO, VISION_START, VISION_END, FRAME_START, FRAME_END = 200, 0, 190, 191, 192, 193, 194, 195


@dataclass(frozen=True)
class Media:
    """A video as a backbone takes it.

    Args:
        tokens: its ids in a prompt.
        pixels: the inputs that n videos make.
        token_types: by the name of an input that tells visual tokens from text: what it has for a placeholder, 0 for
            text.
    """

    tokens: list[int]
    pixels: Callable[[int, Generator], dict[str, Tensor]]
    token_types: dict[str, dict[int, int]] = field(default_factory=dict)


def _patches(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """Frames of 4 x 4 patches of 4 x 4 pixels, two images a patch, merged by 2 x 2."""
    pixels = torch.randn(n_videos * FRAMES * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[FRAMES, 4, 4]] * n_videos)}


def _patches_and_seconds(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    return {**_patches(n_videos, generator), "video_second_per_grid": torch.ones(n_videos)}


def _patches_merged_in_time(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(n_videos * 2 * FRAMES * 16, 3 * 4 * 4, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2 * FRAMES, 4, 4]] * n_videos)}


def _patches_with_merge_size(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(n_videos * FRAMES * 16, 3 * 4 * 4, generator=generator)
    grid = torch.tensor([[FRAMES, 4, 4]] * n_videos)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid, "video_merge_sizes": torch.tensor([2] * n_videos)}


def _patches_with_positions(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(n_videos * FRAMES, 16, 2)
    pixels = torch.rand(n_videos * FRAMES, 16, 3 * 4 * 4, generator=generator)
    n_frames = torch.tensor([FRAMES] * n_videos)
    return {"pixel_values_videos": pixels, "video_position_ids": place, "num_frames_per_video": n_frames}


def _frames(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(n_videos, FRAMES, 3, 16, 16, generator=generator)}


def images(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """One image a frame."""
    return {"pixel_values": torch.randn(n_videos * FRAMES, 3, 16, 16, generator=generator)}


def sized_images(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """Images with their sizes."""
    return {**images(n_videos, generator), "image_sizes": torch.tensor([[16, 16]] * FRAMES * n_videos)}


def cropped_images(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """Images as an overview and one crop."""
    pixels = torch.randn(n_videos * FRAMES, 2, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]] * FRAMES * n_videos)}


def large_images(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """One image of 64 x 64 pixels a frame."""
    return {"pixel_values": torch.randn(n_videos * FRAMES, 3, 64, 64, generator=generator)}


def masked_images(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """Images with a mask of pixels."""
    mask = torch.ones(n_videos * FRAMES, 16, 16, dtype=torch.bool)
    return {**images(n_videos, generator), "pixel_mask": mask}


def flat_patches(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """Images as 16 patches, with their shapes."""
    n = n_videos * FRAMES
    return {
        "pixel_values": torch.randn(n, 16, 3 * 4 * 4, generator=generator),
        "spatial_shapes": torch.tensor([[4, 4]] * n),
        "pixel_attention_mask": torch.ones(n, 16, dtype=torch.long),
    }


def square_patches(n_videos: int, generator: Generator) -> dict[str, Tensor]:
    """Images as patches in a row."""
    pixels = torch.randn(n_videos * FRAMES * 16, 3, 4, 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * FRAMES * n_videos)}


def image_media(n_tokens: int, pixels: Any = images, token_types: dict[str, dict[int, int]] | None = None) -> Media:
    """A video given as images, one a frame, with a text token before each."""
    tokens = [token for frame in range(FRAMES) for token in (30 + frame, *[IMAGE] * n_tokens)]
    return Media(tokens, pixels, token_types or {})


_ALL = [VIDEO] * (FRAMES * 4)
_BLOCK = [VISION_START, *_ALL, VISION_END]
_BLOCKS = [token for frame in range(FRAMES) for token in (20 + frame, VISION_START, *[VIDEO] * 4, VISION_END)]
_GLM_BLOCKS = [token for frame in range(FRAMES) for token in (FRAME_START, *[IMAGE] * 4, FRAME_END, 20 + frame)]
_TYPES = {"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}}

PATCHES = Media(_BLOCK, _patches, _TYPES if V5 else {})
PATCHES_UNTYPED = Media(_BLOCK, _patches)
PATCHES_BY_FRAME = Media(_BLOCKS, _patches, _TYPES if V5 else {})
PATCHES_AT_IMAGE_TOKENS = Media(
    [VISION_START, *_GLM_BLOCKS, VISION_END], _patches, {"mm_token_type_ids": {IMAGE: 2}} if V5 else {}
)
PATCHES_AND_SECONDS = Media(_BLOCK, _patches_and_seconds)
PATCHES_MERGED_IN_TIME = Media(_BLOCK, _patches_merged_in_time, _TYPES)
PATCHES_WITH_MERGE_SIZE = Media(_ALL, _patches_with_merge_size)
PATCHES_WITH_POSITIONS = Media(_ALL, _patches_with_positions, _TYPES)
VIDEO_FRAMES = Media(_ALL, _frames)
VIDEO_FRAMES_AND_NEWLINE = Media([*_ALL, VIDEO], _frames)
VIDEO_FRAMES_UNPOOLED = Media([VIDEO] * (FRAMES * 17), _frames)
