"""How large the attention's output is, layer by layer: what a gate changes although no weight has learned it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from ..integrations.transformers.attention import IMPLEMENTATION, attention_forward

Sizes = Mapping[int, float]
"""Of each layer, the sum of the squares of its attention's output."""


@contextmanager
def output_sizes() -> Iterator[Sizes]:
    """While this is open, the attention's output of each layer is measured, before its projection, over the prompts
    that pass; steps of one token are left out. Not for several threads at once."""
    sizes: defaultdict[int, float] = defaultdict(float)

    def measured(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        out, weights = attention_forward(module, query, *args, **options)
        if query.shape[2] > 1:
            sizes[getattr(module, "layer_idx", 0)] += float(out.double().square().sum())
        return out, weights

    AttentionInterface.register(IMPLEMENTATION, measured)
    try:
        yield sizes
    finally:
        AttentionInterface.register(IMPLEMENTATION, attention_forward)


def largest_change(with_gate: Sizes, without: Sizes) -> float:
    """The root mean square of the output with a gate over that without, of the layer where it is furthest from 1.

    Raises:
        ValueError: no attention was measured.
    """
    ratios = [(with_gate[layer] / without[layer]) ** 0.5 for layer in without]
    if not ratios:
        raise ValueError(f"no attention of {IMPLEMENTATION!r} ran: enable the gate first")
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
