"""A prompt as the caller gave it, and the short one that takes its place where tokens were merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...anchor.grouping import Groups, Merge
from .cache_scores import Merged

_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_MARK = "videoanchor_merged"


@dataclass(frozen=True, eq=False)
class LongPrompt:
    """A prompt within generate(), before it is shortened. B rows, L positions with those that the cache stands for.

    Args:
        ids: (B, L), or (B, M) the new ones alone.
        position_ids: (B or 1, L), or (A, B or 1, L).
        mask: (B, L), or None where all is seen.
        past: positions in the cache.
        merged: what they stand for; None: each for itself.
        pad: the id of padding.
        encoded: of each modality, what its encoder returned.

    Raises:
        ValueError: mask and positions do not cover the cache.
    """

    ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    past: int
    merged: Merged | None
    pad: int
    encoded: Mapping[str, Any]

    def __post_init__(self) -> None:
        only_new = self.ids.shape[1] != self.length
        if self.start + (self.ids.shape[1] if only_new else 1) > self.length or (
            only_new and self.start + self.ids.shape[1] != self.length
        ):
            raise ValueError(
                f"keep: the cache stands for {self.start} positions of the prompt, and {self.ids.shape[1]} ids and "
                f"positions for {self.length} were given: give all ids, or new ones with the attention_mask of all"
            )

    @property
    def length(self) -> int:
        """L."""
        return self.position_ids.shape[-1]

    @property
    def start(self) -> int:
        """Positions that the cache stands for."""
        return self.past + (0 if self.merged is None else self.merged.removed)

    @property
    def new_ids(self) -> Tensor:
        """(B, M)."""
        return self.ids[:, self.start - self.length :]

    @property
    def new_mask(self) -> Tensor:
        """(B, M) bool, False at padding."""
        return self._whole_mask()[:, self.start :]

    def _whole_mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask.bool()
        return torch.ones(len(self.ids), self.length, dtype=torch.bool, device=self.ids.device)

    def _cached_places(self) -> Tensor:
        """(B, past) the position of each cache position in the prompt, -1 for padding that it does not have."""
        known = torch.zeros(len(self.ids), 0, dtype=torch.int64, device=self.ids.device)
        if self.merged is not None:
            known = self.merged.places.to(self.ids.device)
            if len(known) != len(self.ids):
                raise ValueError(f"the cache holds {len(known)} rows, and the prompt has {len(self.ids)}")
        later = torch.arange(known.shape[1], self.past, device=known.device) + self.start - self.past
        return torch.cat([known, later.expand(len(known), -1)], 1)

    def shortened(self, stay: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any], Tensor]:
        """
        Args:
            stay: (B, M) which of the new positions stay.
            kwargs: of the prompt.

        Returns:
            the ids, the keywords, and where each new position of the short prompt stands in the new part of the long
            one, (B, W), -1 for padding, which is on the left.
        """
        width = int(stay.sum(1).amax())
        places = stay.byte().argsort(stable=True, dim=1)[:, stay.shape[1] - width :]
        places = places.where(stay.gather(1, places), -1)
        everywhere = torch.cat([self._cached_places(), torch.where(places >= 0, places + self.start, -1)], 1)
        real, at = everywhere >= 0, everywhere.clamp(min=0)
        short = dict(kwargs)
        mask = (self._whole_mask().gather(1, at) & real).long()
        positions = self.position_ids.expand(*self.position_ids.shape[:-2], len(at), -1)
        new_positions = positions.gather(-1, at.expand(*positions.shape[:-1], -1)).where(real, 0)
        if len(positions) == 4 and positions.ndim == 3:  # of text, by which packed sequences are told apart: no gaps
            new_positions[0] = (mask.cumsum(-1) - 1).clamp(min=0)
        short.update(attention_mask=mask, position_ids=new_positions)
        for name in _TYPES:
            if (types := kwargs.get(name)) is not None:
                types = F.pad(types, (self.length - types.shape[1], 0))
                short[name] = types.gather(1, at).where(real, 0)
        only_new = self.ids.shape[1] != self.length
        ids = self.new_ids.gather(1, places.clamp(min=0)) if only_new else self.ids.gather(1, at)
        return ids.where(places >= 0 if only_new else real, self.pad), short, places


class MergedFeatures(NamedTuple):
    """Features of groups.

    Attributes:
        output: what the encoder returned.
        rows: of each layer of features (those merged into the embeddings, then deepstack's) one (k, D) for each row.
    """

    output: Any
    rows: list[Sequence[Tensor]]


def features_of_groups(output: Any, groups: Sequence[Groups], merge: Merge) -> MergedFeatures:
    """The features that stand for groups.

    Args:
        output: what an encoder returned for all rows of a prompt.
        groups: of each row, those of its tokens.
        merge: see `VideoAnchorConfig`.
    """
    sizes = [len(one.kept) for one in groups]
    first, n_before, member, kept = 0, 0, [], []
    for one in groups:
        member.append(one.member + first)
        kept.append(one.kept + n_before)
        first, n_before = first + len(one.kept), n_before + len(one.member)
    every = Groups(torch.cat(member), torch.cat(kept))
    layers = [output["pooler_output"], *(output.get("deepstack_features") or [])]
    whole_layers = (torch.cat([part.flatten(0, -2) for part in layer]) for layer in layers)
    return MergedFeatures(output, [every.reduced(x, merge).split(sizes) for x in whole_layers])


def repeated(features: MergedFeatures, n: int) -> Any:
    """What an encoder would return for these features, each row n times, side by side: in a list of one or a batch of
    one. It carries a mark, `is_short`."""

    def joined(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([row for row in rows for _ in range(n)])

    output, (pooled, *deepstack) = features
    as_tensor = isinstance(output["pooler_output"], Tensor)
    new: dict[str, Any] = {"pooler_output": joined(pooled)[None] if as_tensor else [joined(pooled)]}
    if deepstack:
        new["deepstack_features"] = [[joined(layer)] for layer in deepstack]
    merged = type(output)(**new)
    setattr(merged, _MARK, True)
    return merged


def is_short(output: Any) -> bool:
    """Whether these features are those of groups."""
    return getattr(output, _MARK, False)
