"""The scores of the rows of a batch: equal rows once, and on one process of a tensor-parallel group."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...anchor.config import VideoAnchorConfig
from ...anchor.scores import AnchorResult, anchor_scores
from ...anchor.timing import Progress

AnchorScores = Callable[..., AnchorResult]
"""What scores the tokens of a row, by the signature of `anchor_scores`."""
Known = list[tuple[bytes, AnchorResult]]
"""Rows that have been scored, by the SHA-256 of their tokens and frames, and their results. The tokens are not kept."""
_ROWS = 1024  # of a tensor, hashed at a time


def score_rows(
    rows: Iterable[Tensor],
    config: VideoAnchorConfig,
    known: Known | None,
    *,
    frames: Sequence[Tensor] | None = None,
    score: AnchorScores = anchor_scores,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[AnchorResult | None]:
    """Score the visual tokens of each row.

    Args:
        rows: for each row of the batch its visual tokens (n, D); rows without any give None. One is held at a time.
        config: settings.
        frames: for each row the frame of each token, (n,) integers, for `score="cross_frame"`.
        known: rows that need no scoring again; those scored here are added. Equal rows share one result. None where
            there is nothing to compare: no digests are made.
        score: what scores a row.
        progress: see `anchor_scores`.
        group: the processes that hold a part of the model each and see the same rows. The first one scores, the others
            receive its scores and labels; its report of the solver stays with it.

    Raises:
        RuntimeError: scoring failed on the first process of the group; it raises the cause.
    """
    results: list[AnchorResult | None] = []
    for tokens in rows:
        frame = None if frames is None else frames[len(results)]
        if not len(tokens):
            results.append(None)
            continue
        key = b"" if known is None else _key(tokens, frame)
        found = next((result for seen, result in known or () if seen == key), None)
        if found is None:
            found = _score(score, tokens.detach(), frame, config, progress, group)
            if known is not None:
                known.append((key, found))
        results.append(found)
        del tokens  # before the next row is made
    return results


def _key(tokens: Tensor, frames: Tensor | None) -> bytes:
    digest = hashlib.sha256(str(tokens.device).encode())
    for tensor in (tokens, frames):
        if tensor is not None:
            add_to_digest(digest, tensor)
    return digest.digest()


def add_to_digest(digest: Any, tensor: Tensor) -> None:
    """Type, shape and every bit of a tensor, brought to the host in blocks."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for block in tensor.detach().split(_ROWS) if tensor.ndim else [tensor.detach()]:
        digest.update(block.cpu().contiguous().flatten().view(torch.uint8).numpy())


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
