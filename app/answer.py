"""What asking a model about videos and images gives."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..anchor.scores import AnchorResult
from .token_grid import TokenGrid

OUTPUT_LIMIT = 1.2
"""A gate that makes the attention's output this much larger, or smaller, is warned of. On questions like those of its
training every gate beyond it cost the model whose truth is known answers: docs/room-scans.md."""


@dataclass(frozen=True)
class GateEffect:
    """How far the gate moved an answer, by its first token.

    Args:
        token: the likeliest one with the gate: the first of the answer, but for beams.
        probability: that the model gives it, with the gate.
        probability_without: the same without a gate.
        token_without: the likeliest one without a gate.
        output_size: the root mean square of the attention's output over the prompt with the gate, over that without,
            of the layer where it is furthest from 1; of a model split over processes, of the heads of the first.
    """

    token: str
    probability: float
    probability_without: float
    token_without: str
    output_size: float


def output_warning(sizes: Sequence[float]) -> str | None:
    """One sentence where the `output_size` of an answer is beyond `OUTPUT_LIMIT`, else None."""
    beyond = [size for size in sizes if not 1 / OUTPUT_LIMIT <= size <= OUTPUT_LIMIT]
    if not beyond:
        return None
    most = max(beyond, key=lambda size: max(size, 1 / size))
    where = "" if len(sizes) == 1 else f"in {len(beyond)} of {len(sizes)} answers "
    return (
        f"{where}the gate makes the attention's output {most:.2f} times as large, which the model was not trained for: "
        "compare with `videoanchor eval` before you trust it, or lower alpha_v"
    )


@dataclass(frozen=True, eq=False)
class Answer:
    """What `ask` returns.

    Args:
        text: as generated.
        n_prompt_tokens, n_visual_tokens, n_generated_tokens: counts.
        grids: where the visual tokens of each video and image lie, in the order of the prompt.
        anchor: scores and labels of all visual tokens, in the order of the prompt.
        seconds: by stage: decode_video and load_model (of `ask`), vision, ssc, prefill, decode, decode_per_token,
            generate (all of the call).
        device: the name of the GPU that holds the model's first layers, or "cpu".
        peak_memory_bytes: of the allocators of all GPUs together; None on a CPU.
        gate_effect: how far the gate moved it; None where nobody asked.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> from videoanchor_triton.app.token_grid import TokenGrid
        >>> grids = [TokenGrid(t=2, h=3, w=4), TokenGrid(t=1, h=3, w=4)]
        >>> anchor = va.AnchorResult(scores=torch.rand(36), labels=torch.zeros(36, dtype=torch.int64))
        >>> answer = va.Answer("left", 40, 36, 1, grids, anchor, {}, "cpu", None)
        >>> parts = answer.anchor.scores.split([grid.n_tokens for grid in answer.grids])
        >>> grids[0].arrange(parts[0].numpy()).shape  # (time, row, column)
        (2, 3, 4)

    See Also:
        ask: returns it.
    """

    text: str
    n_prompt_tokens: int
    n_visual_tokens: int
    n_generated_tokens: int
    grids: list[TokenGrid]
    anchor: AnchorResult
    seconds: dict[str, float]
    device: str
    peak_memory_bytes: int | None
    gate_effect: GateEffect | None = None

    @property
    def grid(self) -> TokenGrid:
        """Of the only video.

        Raises:
            ValueError: there are several.
        """
        if len(self.grids) != 1:
            raise ValueError(f"grid: the prompt has {len(self.grids)} videos and images; use grids")
        return self.grids[0]
