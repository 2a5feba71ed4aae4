"""Which frame each visual token of a prompt belongs to, for `score="cross_frame"`.

Tokens side by side in a prompt are a run. A run of a video's tokens is one frame where the model sets frames apart (by
text, or by start and end tokens), else a whole video; the encoder's input says how many frames it has. Each image, or
frame that came as an image, is a frame of its own: the encoder's output says how many tokens it has, since nothing need
stand between two images, and line breaks may stand within one.
"""

from collections.abc import Mapping
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Visual tokens side by side: how many, and whether they are a video's."""

    length: int
    video: bool


class Images(NamedTuple):
    """Features as an encoder returned them: the number of tokens of each part, and whether each is an image for sure,
    not a tile of one."""

    lengths: list[int]
    whole: bool


_SIZES = ("image_grid_thw", "image_sizes")
_ONE_PART_AN_IMAGE = frozenset({"llava", "vipllava", "video_llava", "deepseek_vl", "janus"})
"""Model types without tiles, whose encoder is not told the sizes of images."""


def images_of(arguments: Mapping[str, Any], output: Any, model_type: str) -> Images:
    """The images of one call of `get_image_features`.

    Args:
        arguments: of the call, by name.
        output: what it returned.
        model_type: of the multimodal model's config.
    """
    features = output if isinstance(output, Tensor | list | tuple) else output["pooler_output"]
    if isinstance(features, tuple) and not (isinstance(features[0], Tensor) and features[0].ndim == 2):
        features = features[0]  # transformers 4.57: features of other kinds stand behind
    lengths = [part.numel() // part.shape[-1] for part in features]
    sizes = next((arguments[name] for name in _SIZES if arguments.get(name) is not None), ())
    return Images(lengths, model_type in _ONE_PART_AN_IMAGE or len(sizes) == len(lengths))


def frames_of_videos(arguments: Mapping[str, Any]) -> list[int] | None:
    """The frames (in time, as the decoder sees them) of each video of one call of `get_video_features`, or None where
    its arguments do not say."""
    grid, pixels = arguments.get("video_grid_thw"), next(iter(arguments.values()))
    if grid is not None:
        return grid[:, 0].tolist()
    return [pixels.shape[1]] * pixels.shape[0] if pixels.ndim == 5 else None  # (videos, frames, channels, ...)


def frames_of_rows(
    visual: Tensor, video: Tensor, steps: list[int] | None, images: Images | None = None
) -> list[Tensor]:
    """The frame of each visual token, row by row.

    Args:
        visual: (B, M) True at visual tokens.
        video: (B, M) True at those of videos.
        steps: for each video in the order of the prompts its number of frames (in time, as the decoder sees them: Qwen
            merges two into one); None where no video was encoded as such.
        images: those encoded, in the order of the prompts; None where none were.

    Returns:
        for each row (n,) int64, the frame of each of its n visual tokens, 0, 1, ... over all that the row holds.

    Raises:
        ValueError: the runs do not fit the videos or the images, or may be one image in tiles or several.
    """
    rows = [_runs(seen, of_video) for seen, of_video in zip(visual.cpu(), video.cpu(), strict=True)]
    counts, pieces = _frames_of_runs(rows, steps or []), _images_of_runs(rows, images)
    frames = []
    for runs, in_run, of_row in zip(rows, counts, pieces, strict=True):
        first, parts = 0, [torch.zeros(0, dtype=torch.int64)]
        of_images = iter(of_row)
        for run, n_frames in zip(runs, in_run, strict=True):
            if run.video:
                each = max(run.length // n_frames, 1)
                frame = (torch.arange(run.length) // each).clamp(max=n_frames - 1)  # a newline ends the last
                parts.append(first + frame)
                first += n_frames
                continue
            for piece in next(of_images):
                first += piece.begins
                parts.append(torch.full((piece.length,), first - 1))
        frames.append(torch.cat(parts).to(visual.device))
    return frames


class Piece(NamedTuple):
    """Tokens of one image side by side: how many, and whether they are its first."""

    length: int
    begins: bool


def _images_of_runs(rows: list[list[Run]], images: Images | None) -> list[list[list[Piece]]]:
    """For each row, the pieces of images in each of its runs of image tokens."""
    runs = [[run.length for run in row if not run.video] for row in rows]
    if images is None:
        return [[[Piece(length, True)] for length in row] for row in runs]
    n_tokens, n_encoded = sum(map(sum, runs)), sum(images.lengths)
    beams = n_tokens // n_encoded if n_encoded else 0
    if n_tokens != beams * n_encoded or (beams and len(rows) % beams):
        raise ValueError(
            f'score="cross_frame" cannot tell the images apart: {len(images.lengths)} of {n_encoded} tokens were '
            f"encoded, and {n_tokens} stand in the prompt; use another score"
        )
    left, remaining = 0, iter(images.lengths)
    pieces: list[list[list[Piece]]] = []
    for row, lengths in enumerate(runs):
        if beams and row % beams:
            pieces.append(pieces[-1])
            continue
        pieces.append([])
        for room in lengths:
            pieces[-1].append([])
            while room:
                begins = left == 0
                left = left or next(remaining)
                taken = min(left, room)
                pieces[-1][-1].append(Piece(taken, begins))
                left, room = left - taken, room - taken
            if len(pieces[-1][-1]) > 1 and not images.whole:
                raise ValueError(
                    f'score="cross_frame" cannot tell one image in {len(pieces[-1][-1])} tiles from several images '
                    "with nothing between them: have one tile an image, or use another score"
                )
    return pieces


def _runs(visual: Tensor, video: Tensor) -> list[Run]:
    positions = visual.nonzero()[:, 0]
    if len(positions) == 0:
        return []
    new = (positions.diff() != 1) | (video[positions[1:]] != video[positions[:-1]])
    starts = [0, *(new.nonzero()[:, 0] + 1).tolist(), len(positions)]
    return [Run(end - start, bool(video[positions[start]])) for start, end in pairwise(starts)]


def _frames_of_runs(rows: list[list[Run]], steps: list[int]) -> list[list[int]]:
    """How many frames each run holds. Rows that are beams of one prompt stand side by side and share its videos."""
    n_runs = sum(run.video for run in chain.from_iterable(rows))
    if not steps or n_runs == 0:
        return [[1] * len(runs) for runs in rows]
    if n_runs % sum(steps) == 0 and n_runs >= sum(steps):
        return [[1] * len(runs) for runs in rows]  # each run of a video is a frame
    if n_runs % len(steps) or len(rows) % (n_runs // len(steps)):
        raise ValueError(
            f'score="cross_frame" cannot tell the frames apart: {len(steps)} videos of {steps} frames stand in '
            f"{n_runs} runs of tokens; use another score"
        )
    beams = n_runs // len(steps)
    remaining = iter(steps)
    counts: list[list[int]] = []
    for row, runs in enumerate(rows):
        if row % beams:
            counts.append(counts[-1])
        else:
            counts.append([next(remaining) if run.video else 1 for run in runs])
    return counts
