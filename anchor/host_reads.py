"""What the host asks a device for. Each question waits until the device has done all that was queued: ask few."""

import torch
from torch import Tensor


def read(*numbers: Tensor) -> list[int]:
    """The values of 0-dim tensors of integers or booleans, in one transfer."""
    return torch.stack([number.long() for number in numbers]).tolist()


def places(mask: Tensor, count: int) -> Tensor:
    """(count,) int64, ascending: where `mask` (b,) is True, which is known to be in `count` places; nothing is read."""
    if len(mask) == 0:  # of which torch 2.9 makes an error on CUDA
        return mask.long()
    return mask.nonzero_static(size=count)[:, 0]
