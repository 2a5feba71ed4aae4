"""What a vision tower made of the same pixels, for questions that follow one another."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..integrations.transformers.visual_tokens import find_multimodal_model

_KEPT = 2
"""Calls that are remembered: of a prompt's videos and of its images."""


@contextmanager
def shared_vision(model: nn.Module) -> Iterator[None]:
    """Within the block, the vision tower of `model` is not computed again for the pixels of its last two calls: what it
    returned then is returned, to the bit. Inputs are compared by content.

    Args:
        model: of transformers, with videos or images; without gradients.
    """
    tower = tower_of(model)
    before, forward = tower.__dict__.get("forward"), tower.forward
    calls = deque[tuple[list[Any], Any, list[Any], Any]](maxlen=_KEPT)

    def remembered(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        for known, shape, output, form in calls:
            if shape == tree and all(map(_same, known, leaves)):
                return tree_unflatten(output, form)  # anew: models put into it what they make of it
        output, form = tree_flatten(forward(*args, **kwargs))
        calls.append((leaves, tree, output, form))
        return tree_unflatten(output, form)

    tower.forward = remembered
    try:
        yield
    finally:
        del tower.forward
        if before is not None:  # of accelerate, which moves weights between devices
            tower.forward = before


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower of a multimodal model."""
    base = find_multimodal_model(model)
    return getattr(base, "visual", None) or base.vision_tower  # pyright: ignore[reportReturnType]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    return (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape) and torch.equal(one, other)
