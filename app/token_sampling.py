"""How the tokens of an answer are drawn, where they are not the likeliest ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenSampling:
    """Draws each token; the same answer for the same seed, prompt, device and versions, whatever was asked before.

    Args:
        temperature: by which logits are divided, above 0.
        top_p: of the likeliest tokens, those that together have this probability, above 0 and at most 1; 1 for all.
        top_k: of so many of the likeliest tokens; 0 for all.
        seed: of each answer.

    Raises:
        ValueError: one is out of its range.

    Examples:
        >>> from videoanchor_triton.app.token_sampling import TokenSampling
        >>> TokenSampling(temperature=0.7, top_p=0.9).options()
        {'do_sample': True, 'temperature': 0.7, 'top_p': 0.9, 'top_k': 0}
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("temperature", 0 < self.temperature < math.inf, "a number above 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2^63"),
        ):
            if not right:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def options(self) -> dict[str, Any]:
        """Of `generate()`: all of them, as a checkpoint's own settings would stand for the others."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@contextmanager
def drawing(drawn: TokenSampling | None, gpus: list[torch.device]) -> Iterator[dict[str, Any]]:
    """The options of a `generate()` within the block, whose random numbers start at the seed; those outside go on as
    if nothing had been drawn.

    Args:
        drawn: None takes the likeliest token each time.
        gpus: that hold the model.
    """
    if drawn is None:
        yield {"do_sample": False}
        return
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(drawn.seed)
        yield drawn.options()
