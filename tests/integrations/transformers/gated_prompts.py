"""Prompts, and the configurations of the gate that they run with."""

from typing import Any

import tiny_models as tiny
import torch
from dense_eager import ALPHA_K, ALPHA_V, pseudo_scores
from torch import Tensor

import videoanchor_triton as va

CONFIG = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores)
PREFILL = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores, decode="prefill")
ONE = [[3, 4, "V", 5, 6]]
TWO = [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]]


class Counting:
    """A scorer that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return pseudo_scores(tokens)


def counting_config() -> tuple[va.VideoAnchorConfig, Counting]:
    scorer = Counting()
    return va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=scorer), scorer


def text_after(batch: dict[str, Tensor], n: int = 3) -> dict[str, Any]:
    """A text step of n tokens after a prompt of one row."""
    length = batch["input_ids"].shape[1]
    step: dict[str, Any] = {"input_ids": torch.arange(20, 20 + n)[None], "use_cache": True}
    return step if tiny.V5 else {**step, "cache_position": torch.arange(length, length + n)}
