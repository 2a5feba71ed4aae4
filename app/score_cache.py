"""Scores of visual tokens on disk, found again by the content of the tokens, the settings and this package's version.

An entry is one safetensors file of O(N) numbers; the N x N coefficients are never kept.
"""

import hashlib
import json
import logging
import os
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..anchor.config import VideoAnchorConfig
from ..anchor.scores import AnchorResult, anchor_scores
from ..anchor.timing import Progress
from ..integrations.transformers.scoring import add_to_digest
from .atomic_write import write_whole

_NOT_OF_THE_SCORES = {"alpha_k", "alpha_v", "alpha_q", "decode", "keep", "group", "merge"}
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors|\.writing-[0-9a-f]{16}\.safetensors")
_TENSORS = ("scores", "labels", "duality_gap")
_REPORT = ("n_iter", "residual", "converged", "eigengap", "in_gap")

logger = logging.getLogger(__name__)


class ScoreCache:
    """Results of `anchor_scores` in a folder, the least recently used removed when they take more than `max_bytes`.

    Several processes may use one folder at the same time. An entry that cannot be read, or whose content is not what
    was written, is computed again. Where nothing can be written, scores are computed and not kept.

    Args:
        folder: made when the first entry is written.
        max_bytes: of all entries together; 0 keeps none.

    Raises:
        ValueError: max_bytes is negative.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected 0 or more, got {max_bytes}")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.hits = self.misses = 0

    def anchor_scores(
        self,
        tokens: Tensor,
        config: VideoAnchorConfig,
        *,
        frames: Tensor | None = None,
        progress: Progress | None = None,
    ) -> AnchorResult:
        """`anchor_scores`, from the folder where it is there; its `seconds` are then empty.

        Args:
            tokens, config, frames, progress: see `anchor_scores`.

        Raises:
            ValueError: config.scorer is a function, whose results no setting tells apart; and what `anchor_scores`
                raises.
        """
        if callable(config.scorer):
            raise ValueError(f"config.scorer: expected a named scorer to cache, got the function {config.scorer!r}")
        path = self.folder / f"{cache_key(tokens, config, frames)}.safetensors"
        result = self._read(path, tokens)
        if result is not None:
            self.hits += 1
            return result
        self.misses += 1
        result = anchor_scores(tokens, config, frames=frames, progress=progress)
        try:
            self._write(path, result)
        except OSError as error:
            logger.warning("scores are not kept in %s: %s", self.folder, error)
        return result

    def _read(self, path: Path, tokens: Tensor) -> AnchorResult | None:
        try:
            with safe_open(path, framework="pt") as entry:
                metadata: dict[str, str] = entry.metadata() or {}
                tensors: dict[str, Tensor] = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
            report = json.loads(metadata["report"])
            if metadata["checksum"] != _checksum(tensors) or len(tensors["scores"]) != len(tokens):
                raise ValueError("the content is not what was written")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            logger.warning("cached scores are computed again: %s: %s", path, error)
            return None
        return AnchorResult(**{name: tensor.to(tokens.device) for name, tensor in tensors.items()}, **report)

    def _write(self, path: Path, result: AnchorResult) -> None:
        values = {name: getattr(result, name) for name in _TENSORS}
        tensors = {name: value.detach().cpu().contiguous() for name, value in values.items() if value is not None}
        report = {name: getattr(result, name) for name in _REPORT}
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"report": json.dumps(report), "checksum": _checksum(tensors)}
        write_whole(path, save(tensors, metadata))
        self._evict()

    def _evict(self) -> None:
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            if _ENTRY.fullmatch(path.name):
                try:
                    found = path.stat()
                except FileNotFoundError:  # another process was faster
                    continue
                entries.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def cache_key(tokens: Tensor, config: VideoAnchorConfig, frames: Tensor | None = None) -> str:
    """64 hexadecimal digits that differ where tokens, their precision, their frames, a setting of the scores or this
    package's version differ."""
    settings: dict[str, Any] = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in _NOT_OF_THE_SCORES
    }
    digest = hashlib.sha256(json.dumps([version("videoanchor-triton"), settings], sort_keys=True, default=str).encode())
    for tensor in (tokens, frames):
        if tensor is not None:
            add_to_digest(digest, tensor)
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        add_to_digest(digest, tensors[name])
    return digest.hexdigest()
