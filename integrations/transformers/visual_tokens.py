"""Where a prompt has visual tokens, and what stands there in the decoder's input."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...anchor.config import VideoAnchorConfig
from .backbones import visual_token_ids


def find_multimodal_model(model: nn.Module) -> PreTrainedModel:
    """The module that merges visual features into the embeddings and owns `language_model`.

    Raises:
        ValueError: when the model has no such module, or no image or video token.
    """
    for module in model.modules():
        if not (isinstance(module, PreTrainedModel) and hasattr(module, "get_placeholder_mask")):
            continue
        if "language_model" in module._modules and visual_token_ids(module.config):
            return module
    raise ValueError(
        f"{type(model).__name__} has no visual tokens that VideoAnchor could score: expected a transformers model with "
        "get_placeholder_mask, a language_model and an image or video token, such as "
        "Qwen2_5_VLForConditionalGeneration, InternVLForConditionalGeneration or LlavaOnevisionForConditionalGeneration"
    )


class VisualTokens:
    """The visual tokens of prompts of one model.

    Args:
        base: of `find_multimodal_model`.
        config: says which of them are scored.
    """

    def __init__(self, base: PreTrainedModel, config: VideoAnchorConfig) -> None:
        self._base, self._config = base, config

    def positions(
        self, modalities: Collection[str], input_ids: Tensor | None, embeds: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The tokens that are scored where features of these modalities are given: (B, M) True at them, and for each
        row their columns, (n,) int64. The host waits for the device once, and once more for several rows; what is
        indexed by the columns waits no more.

        Raises:
            ValueError: there are none.
        """
        scored = {*modalities}
        if "video" in scored:
            scored.add("newline")
            if self._config.arithmetic == "authors":
                scored.discard("image")  # their code scores the video only where a prompt has both
        tokens = [token for name, token in visual_token_ids(self._base.config).items() if name in scored]
        visual = self._placeholders(tokens, input_ids, embeds)
        columns = visual.nonzero()[:, 1]
        if not len(columns):
            raise ValueError(
                f"got features of {' and '.join(sorted(modalities))}, and no token of theirs in the prompt: expected "
                f"one of {tokens}, by which VideoAnchor knows what is visual"
            )
        return visual, [columns] if len(visual) == 1 else [*columns.split(visual.sum(1).tolist())]

    def of_videos(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
        """(B, M) True at the tokens of videos, where the score looks at frames."""
        if not self._config.looks_at_frames:
            return None
        tokens = [token for name, token in visual_token_ids(self._base.config).items() if name != "image"]
        return self._placeholders(tokens, input_ids, embeds)

    def check_cut(self, ids: Tensor, encoded: Mapping[str, Any]) -> None:
        """
        Raises:
            NotImplementedError: transformers does not hand all of these features out by chunk.
        """
        for modality, output in encoded.items():
            token = getattr(self._base.config, f"{modality}_token_id")  # by which generate() cuts them
            if int((ids == token).sum()) != len(feature_rows(output)):
                raise NotImplementedError(
                    f"{type(self._base).__name__} puts its {modality} features elsewhere than at token {token}, by "
                    "which transformers cuts them into chunks, and would lose them: leave prefill_chunk_size out"
                )

    def merged(self, ids: Tensor, encoded: Mapping[str, Any]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The visual tokens (n, D) of each row of a prompt, as the model will merge them, and their `positions`.

        Args:
            ids: (B, M) the token ids of the whole prompt.
            encoded: of each modality, what `get_image_features` or `get_video_features` returned.
        """
        features = {modality: feature_rows(output) for modality, output in encoded.items()}
        visual, columns = self.positions(features, ids, None)
        chosen = torch.cat([row[places] for row, places in zip(ids, columns, strict=True)])
        merged: Tensor = self._base.get_input_embeddings()(chosen).detach().clone()
        for modality, token in visual_token_ids(self._base.config).items():
            if modality in features:  # an index by a mask would wait for the device
                merged.masked_scatter_((chosen == token)[:, None], features[modality].to(merged))
        return [*merged.split([len(places) for places in columns])], visual, columns

    def _placeholders(self, tokens: list[int], input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """(B, M) True at these tokens, known by id or by embedding."""
        if embeds is None:
            if input_ids is None:
                raise ValueError("expected input_ids or inputs_embeds beside the pixels, got neither")
            return torch.isin(input_ids, _on_device(tokens, input_ids.device))
        placeholders = self._base.get_input_embeddings()(_on_device(tokens, embeds.device))
        return (embeds[:, :, None] == placeholders).all(-1).any(-1)


def _on_device(ids: list[int], device: torch.device) -> Tensor:
    """(n,) int64, written by the device: a copy of the list would wait for it."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([none, *(torch.full((1,), token, device=device) for token in ids)])


def feature_rows(output: Any) -> Tensor:
    """(n, D) of all images or videos, from what get_image_features or get_video_features returns in generate()."""
    return torch.cat([part.flatten(0, -2) for part in output["pooler_output"]])
