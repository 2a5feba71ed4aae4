"""The scores of the rows of a batch: equal rows once, and on one process of a tensor-parallel group."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..anchor.config import VideoAnchorConfig
from ..anchor.scores import AnchorResult, anchor_scores
from ..anchor.timing import Progress

AnchorScores = Callable[..., AnchorResult]
"""What scores the tokens of a row, by the signature of `anchor_scores`."""
Known = list[tuple[Tensor, Tensor | None, AnchorResult]]
"""Rows that have been scored, their frames, and their results."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element, integers of that size."""


def score_rows(
    rows: Sequence[Tensor],
    config: VideoAnchorConfig,
    known: Known,
    *,
    frames: Sequence[Tensor] | None = None,
    score: AnchorScores = anchor_scores,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[AnchorResult | None]:
    """Score the visual tokens of each row.

    Args:
        rows: for each row of the batch its visual tokens (n, D); rows without any give None.
        config: settings.
        frames: for each row the frame of each token, (n,) integers, for `score="cross_frame"`.
        known: rows that need no scoring again; those scored here are added. Equal rows share one result.
        score: what scores a row.
        progress: see `anchor_scores`.
        group: the processes that hold a part of the model each and see the same rows. The first one scores, the others
            receive its scores and labels; its report of the solver stays with it.

    Raises:
        RuntimeError: scoring failed on the first process of the group; it raises the cause.
    """
    results: list[AnchorResult | None] = []
    rows = [tokens.detach() for tokens in rows]
    keys = _keys([*(seen for seen, _, _ in known), *rows])
    alike: defaultdict[int, Known] = defaultdict(list)
    for key, entry in zip(keys, known, strict=False):
        alike[key].append(entry)
    for row, (key, tokens) in enumerate(zip(keys[len(known) :], rows, strict=True)):
        frame = None if frames is None else frames[row]
        found = next((result for seen, at, result in alike[key] if _equal(seen, tokens) and _equal(at, frame)), None)
        if found is None and len(tokens):
            found = _score(score, tokens, frame, config, progress, group)
            known.append((tokens, frame, found))
            alike[key].append(known[-1])
        results.append(found)
    return results


def _keys(rows: Sequence[Tensor]) -> list[int]:
    """A number for each row, the same for rows of the same bits: only such rows need to be compared. A sum of integers,
    which no order of addition changes; it waits for the device once for all rows."""
    sums = [row.view(_BITS[row.element_size()]).sum(dtype=torch.int64).to(rows[0].device) for row in rows]
    return torch.stack(sums).tolist() if sums else []


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _score(
    score: AnchorScores,
    tokens: Tensor,
    frames: Tensor | None,
    config: VideoAnchorConfig,
    progress: Progress | None,
    group: dist.ProcessGroup | None,
) -> AnchorResult:
    if group is None or dist.get_world_size(group) == 1:
        return score(tokens, config, frames=frames, progress=progress)
    first = dist.get_global_rank(group, 0)
    result, failure = None, None
    if dist.get_rank() == first:
        try:
            result = score(tokens, config, frames=frames, progress=progress)
        except Exception as error:  # the others are waiting
            failure = error
    # row 0: scores; row 1: labels, exact in float64; all -1 if scoring failed
    shared = torch.full((2, len(tokens)), -1.0, dtype=torch.float64, device=tokens.device)
    if result is not None:
        shared[0], shared[1] = result.scores, result.labels
    dist.broadcast(shared, first, group=group)
    if failure is not None:
        raise failure
    if bool((shared == -1).all()):
        raise RuntimeError(f"the visual tokens could not be scored: see the error of process {first}")
    return result or AnchorResult(shared[0].float(), shared[1].long())


def tensor_parallel_group(model: Any) -> dist.ProcessGroup | None:
    """The processes among which transformers' `tp_plan` has split a model, or None."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or not dist.is_initialized():
        return None
    if mesh.mesh_dim_names is None:  # transformers 4.57
        return mesh.get_group()
    return mesh["tp"].get_group() if "tp" in mesh.mesh_dim_names else None
