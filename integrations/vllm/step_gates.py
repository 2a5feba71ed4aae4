"""The gate of one model in vLLM: the factors of the tokens of a step, the factor of each slot of the KV cache, and the
scores of an item of media."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...anchor.config import VideoAnchorConfig
from ...anchor.scores import anchor_scores
from ...kernels.gate_pages import GatePages, gate_pages

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's, whose handlers it takes
REPORT_EVERY = 10.0  # seconds


@dataclass
class ScoringCounts:
    """What a server has scored since it started.

    Attributes:
        items: videos and images.
        tokens: their tokens.
        seconds: which the engine spent on it, in all.
        slowest: of one item, in seconds.
        unscored: items, among those of `items`, that could not be scored and are served with a neutral gate.
    """

    items: int = 0
    tokens: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    unscored: int = 0


class StepGates:
    """Owned by the model, shared with the attention layers of its decoder.

    Args:
        config: strengths and scoring.
        max_tokens: of a step.
        device: the model's.

    Attributes:
        gamma_k, gamma_v: (max_tokens,) fp32, the factors of the tokens that run in this step, 1 for text. They stay
            where they are, so that a CUDA graph may read them.
        counts: see `ScoringCounts`.
    """

    def __init__(self, config: VideoAnchorConfig, max_tokens: int, device: torch.device) -> None:
        self.config = config
        self.gamma_k = torch.ones(max_tokens, dtype=torch.float32, device=device)
        self.gamma_v = torch.ones_like(self.gamma_k)
        self.counts = ScoringCounts()
        self._pages: dict[tuple[int, int, str], GatePages] = {}
        self._reported = time.monotonic()

    def set_step(self, n_tokens: int, visual: Tensor | None, scores: Sequence[Tensor]) -> None:
        """The factors of the next step.

        Args:
            visual: (n_tokens,) bool, where the scores go in their order; None if there are none.
            scores: parts (n,) fp32.
        """
        step_k, step_v = self.gamma_k[:n_tokens].fill_(1.0), self.gamma_v[:n_tokens].fill_(1.0)
        if visual is None or not scores:
            return
        place, together = visual.to(step_k.device, non_blocking=True), torch.cat(list(scores))
        step_k.masked_scatter_(place, together * self.config.alpha_k + 1.0)
        step_v.masked_scatter_(place, together * self.config.alpha_v + 1.0)

    def pages(self, n_blocks: int, block_size: int, form: str) -> GatePages:
        """The gates of a cache of (n_blocks, block_size) slots, the same for all its layers and heads.

        Raises:
            RuntimeError: they are not there yet, and a CUDA graph is being captured.
        """
        key = n_blocks, block_size, form
        if key not in self._pages:
            device = self.gamma_k.device
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "videoanchor: a CUDA graph is captured before any step ran: start vLLM with --enforce-eager"
                )
            self._pages = {kept: pages for kept, pages in self._pages.items() if kept[0] == n_blocks}  # of this cache
            self._pages[key] = gate_pages(n_blocks, block_size, device, form)
        return self._pages[key]

    def score(self, tokens: Tensor) -> Tensor:
        """(n, D) tokens of an item to (n,) fp32 scores in [0, 1]; 0 for all of them if they cannot be scored, since an
        exception would end the engine for everybody."""
        start = time.perf_counter()
        try:
            scores = anchor_scores(tokens.detach(), self.config).scores.to(tokens.device, torch.float32)
            if scores.shape != tokens.shape[:1] or not bool(((scores >= 0) & (scores <= 1)).all()):
                raise ValueError(f"expected ({len(tokens)},) scores in [0, 1] of the scorer, got {tuple(scores.shape)}")
        except Exception as error:
            self.counts.unscored += 1
            logger.warning("videoanchor: an item of %d tokens is served ungated: %s", len(tokens), error)
            scores = tokens.new_zeros(len(tokens), dtype=torch.float32)
        spent, counts = time.perf_counter() - start, self.counts
        counts.items += 1
        counts.tokens += len(tokens)
        counts.seconds += spent
        counts.slowest = max(counts.slowest, spent)
        self._report()
        return scores

    def _report(self) -> None:
        now = time.monotonic()
        if self.counts.items > 1 and now - self._reported < REPORT_EVERY:
            return
        self._reported = now
        c = self.counts
        text = "videoanchor: %d items of %d tokens scored in %.2f s, the slowest in %.3f s; %d could not be scored"
        logger.info(text, c.items, c.tokens, c.seconds, c.slowest, c.unscored)

    def summary(self) -> dict[str, Any]:
        """Settings and counts."""
        return {"settings": self.config.to_dict(), "scored": asdict(self.counts)}


def attach(embeddings: Tensor, scores: Tensor) -> Tensor:
    """(n, D) to (n, D + c): the bits of the fp32 scores as c further columns of the embeddings' own dtype (1 in fp32, 2
    in half precision), so that they travel wherever the encoder's output does, and come back exact."""
    bits = scores.float().contiguous().view(-1, 1).view(embeddings.dtype)
    return torch.cat([embeddings, bits], dim=1)


def detach(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D + c) to the embeddings (n, D) and the scores (n,) that `attach` put beside them."""
    columns = torch.float32.itemsize // embeddings.element_size()
    bits = embeddings[:, -columns:].contiguous()
    return embeddings[:, :-columns], bits.view(torch.float32).view(-1)
