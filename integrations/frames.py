"""Which frame each visual token of a prompt belongs to, for `score="cross_frame"`.

Tokens side by side in a prompt are a run. A run of a video's tokens is one frame where the model sets frames apart (by
text, or by start and end tokens), else a whole video; the encoder's input says how many frames it has. Any other run is
one frame or view: an image, or a frame that came as an image.
"""

from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Visual tokens side by side: how many, and whether they are a video's."""

    length: int
    video: bool


def frames_of_rows(visual: Tensor, video: Tensor, steps: list[int] | None) -> list[Tensor]:
    """The frame of each visual token, row by row.

    Args:
        visual: (B, M) True at visual tokens.
        video: (B, M) True at those of videos.
        steps: for each video in the order of the prompts its number of frames (in time, as the decoder sees them: Qwen
            merges two into one); None where no video was encoded as such.

    Returns:
        for each row (n,) int64, the frame of each of its n visual tokens, 0, 1, ... over all that the row holds.

    Raises:
        ValueError: the runs do not fit the videos.
    """
    rows = [_runs(seen, of_video) for seen, of_video in zip(visual.cpu(), video.cpu(), strict=True)]
    counts = _frames_of_runs(rows, steps or [])
    frames = []
    for runs, in_run in zip(rows, counts, strict=True):
        first, parts = 0, [torch.zeros(0, dtype=torch.int64)]
        for run, n_frames in zip(runs, in_run, strict=True):
            each = max(run.length // n_frames, 1)
            parts.append(first + (torch.arange(run.length) // each).clamp(max=n_frames - 1))  # a newline ends the last
            first += n_frames
        frames.append(torch.cat(parts).to(visual.device))
    return frames


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
