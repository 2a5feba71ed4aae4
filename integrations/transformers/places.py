"""Where the visual tokens of a prompt are: in time, rows and columns, and in the angles of the rotary embedding."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_of_features(output: Any, steps: list[int] | None) -> Tensor:
    """(F,) int64 the frame of each feature, in the order of the prompt: 0, 1, ... over all rows.

    Args:
        output: what an encoder returned for them. A part of it is a frame, an image or a tile where nothing is known.
        steps: for each video its number of frames; None for images, and where the encoder's input does not say.
    """
    parts = output["pooler_output"]
    lengths = [part.numel() // part.shape[-1] for part in parts]
    if steps is None or len(steps) != len(lengths):
        steps = [1] * len(lengths)
    frames, first = [], 0
    for length, n_frames in zip(lengths, steps, strict=True):
        each = max(length // n_frames, 1)
        frames.append(first + (torch.arange(length, device=parts[0].device) // each).clamp(max=n_frames - 1))
        first += n_frames  # and a newline behind a video ends its last frame
    return torch.cat(frames)


def rows_of_positions(position_ids: Tensor, row: int, columns: Tensor) -> Tensor:
    """(A, n) the positions of tokens of a row, A = 3 (time, height, width) or 1, of `position_ids` (B or 1, L) or
    (1 to 4, B or 1, L), the first of four being that of text."""
    if position_ids.ndim == 2:
        position_ids = position_ids[None]
    position_ids = position_ids[-3:] if len(position_ids) > 2 else position_ids[-1:]
    return position_ids[:, row % position_ids.shape[1]][:, columns]


def grid_of(frames: Tensor, positions: Tensor) -> Tensor:
    """(n, 3) step in time, 0, 1, ..., row and column.

    They are those of the positions, rows and columns counted from the first of the frame. Where positions do not tell,
    the steps are the frames, and each is taken for a square, row by row.

    Args:
        frames: (n,) int64 the frame of each token, ascending.
        positions: (A, n) of `rows_of_positions`.
    """
    told = len(positions) == 3 and not torch.equal(positions[1], positions[2])
    frame = (positions[0] if told else frames).unique_consecutive(return_inverse=True)[1]
    sizes = torch.bincount(frame)
    if told:
        place = positions[1:].long()  # times of some models are fractions
        first = place.new_full((2, len(sizes)), torch.iinfo(place.dtype).max)
        first = first.scatter_reduce(1, frame.expand_as(place), place, "amin")
        return torch.stack([frame, *(place - first[:, frame])], 1)
    within = torch.arange(len(frame), device=frame.device) - F.pad(sizes.cumsum(0)[:-1], (1, 0))[frame]
    side = sizes.double().sqrt().long().clamp(min=1)[frame]
    return torch.stack([frame, within // side, within % side], 1)


def rotary_features(language_model: Any, positions: Tensor) -> Tensor | None:
    """(n, E) cosines and sines of the model's rotary angles at positions (A, n); None where it has no rotary embedding
    of its own."""
    rotary = getattr(language_model, "rotary_emb", None)
    if rotary is None:
        return None
    options = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = language_model.config.layer_types
        options["layer_type"] = "full_attention" if "full_attention" in kinds else kinds[0]
    float32 = torch.zeros(1, 1, 1, device=positions.device)
    angles = rotary(float32, positions[:, None] if len(positions) == 3 else positions, **options)
    return torch.cat([part.reshape(positions.shape[1], -1) for part in angles], 1).float()
