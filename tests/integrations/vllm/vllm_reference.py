"""What a request must be answered, by transformers: with a gate written here densely from the paper's formula, by
`va.enable`, and without a gate. Each item of media is scored by itself, as in a server."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.masking_utils import eager_mask
from vllm_media import ALPHA_K, ALPHA_V, Request, by_norm, metadata

import videoanchor_triton as va

_scores: dict[str, Tensor | None] = {"of prompt": None}


def _dense(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    """softmax(scale Q K^T + log gamma_K + mask) (gamma_V V); keys after the prompt have a score of 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        logits = logits + mask[..., : k.shape[2]]
    if (scores := _scores["of prompt"]) is not None and module.is_causal:
        every = torch.zeros(k.shape[2])
        every[: len(scores)] = scores[: k.shape[2]]
        logits = logits + torch.log(1 + ALPHA_K * every)
        v = v * (1 + ALPHA_V * every)[:, None]
    return (logits.softmax(-1) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_gate_of_test", _dense)
AttentionMaskInterface.register("dense_gate_of_test", eager_mask)


class Greedy(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


class Reference:
    """A checkpoint in fp32."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.model.config
        names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
        self.visual = torch.tensor([getattr(config, name) for name in names if hasattr(config, name)])

    @torch.no_grad()
    def answer(self, request: Request, ids: Sequence[int], n: int, how: str) -> Greedy:
        """Greedy tokens and their logprobs.

        Args:
            ids: of the prompt, as vLLM made them.
            how: "dense", "enable" or "ungated".
        """
        inputs = self._inputs(request, ids)
        place = torch.isin(inputs["input_ids"][0], self.visual)
        scores = torch.zeros(place.shape)
        if place.any():
            scores[place] = torch.cat([by_norm(item) for item in self._items(inputs)])
        if how != "dense":
            with self._gated(scores, how == "enable"):
                return self._greedy(inputs, n)
        self.model.set_attn_implementation({"text_config": "dense_gate_of_test"})
        _scores["of prompt"] = scores
        try:
            return self._greedy(inputs, n)
        finally:
            _scores["of prompt"] = None
            self.model.set_attn_implementation({"text_config": "sdpa"})

    @contextmanager
    def _gated(self, scores: Tensor, gated: bool) -> Iterator[None]:
        if not gated:
            yield
            return
        config = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer="uniform")
        with va.enable(self.model, config) as handle, handle.use_scores(scores[None]):
            yield

    def _inputs(self, request: Request, ids: Sequence[int]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if request.videos:
            given = {
                "videos": [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in request.videos],
                "video_metadata": [metadata(clip) for clip in request.videos],
                "do_sample_frames": False,
            }
            if self.model.config.model_type.startswith("qwen"):
                given["fps"] = 2.0
        if request.images:
            given["images"] = list(request.images)
        inputs = dict(self.processor(text=[request.prompt], return_tensors="pt", **given))
        inputs["input_ids"] = torch.tensor([list(ids)])
        if self.model.config.model_type == "internvl":  # vLLM has tokens for videos there
            video = self.processor.tokenizer.convert_tokens_to_ids("<video>")
            inputs["input_ids"][inputs["input_ids"] == video] = self.model.config.image_token_id
        return inputs

    def _items(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The embeddings of each item, in the order of the prompt, taken from what goes into the decoder."""
        merged: list[Tensor] = []
        hook = self.model.base_model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: merged.append(kwargs["inputs_embeds"][0].clone()), with_kwargs=True
        )
        self.model(**inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
        hook.remove()
        place = torch.isin(inputs["input_ids"][0], self.visual)
        return list(merged[0][place].split(self._lengths(inputs)))

    def _lengths(self, inputs: dict[str, Any]) -> list[int]:
        """Visual tokens of each item, in the order of the prompt."""
        grids = {kind: iter(inputs.get(f"{kind}_grid_thw", ())) for kind in ("video", "image")}
        place = torch.isin(inputs["input_ids"][0], self.visual)
        if all(f"{kind}_grid_thw" not in inputs for kind in grids):
            return [int(place.sum())]
        merge = self.model.config.vision_config.spatial_merge_size
        ids, lengths, i = inputs["input_ids"][0], [], 0
        while i < len(ids):
            if not place[i]:
                i += 1
                continue
            kind = "video" if ids[i] == self.model.config.video_token_id else "image"
            lengths.append(int(next(grids[kind]).prod()) // merge**2)
            taken = 0
            while taken < lengths[-1]:  # Qwen3-VL has text between the frames
                taken += int(place[i])
                i += 1
        return lengths

    def _greedy(self, inputs: dict[str, Any], n: int) -> Greedy:
        positions = self._positions(inputs)
        dropped = {"attention_mask", "second_per_grid_ts", "mm_token_type_ids"} if positions is not None else set()
        step = {name: value for name, value in inputs.items() if name not in dropped}
        cache, tokens, logprobs = None, [], []
        for _ in range(n):
            given = {} if positions is None else {"position_ids": positions}
            out = self.model(**step, **given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            row = torch.log_softmax(out.logits[0, -1].double(), -1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
            step = {"input_ids": torch.tensor([[tokens[-1]]])}
            if positions is not None:
                positions = positions.max().reshape(1, 1, 1).expand(3, 1, 1) + 1
        return Greedy(tokens, logprobs)

    def _positions(self, inputs: dict[str, Any]) -> Tensor | None:
        """(3, 1, T) M-RoPE positions by vLLM's rule, that text goes on after the largest of the three axes, which
        transformers has not in every version; None for models with one axis."""
        config = self.model.config
        rope = getattr(config.text_config, "rope_parameters", None) or {}
        if "mrope_section" not in rope:
            return None
        merge = config.vision_config.spatial_merge_size
        per_second = getattr(config.vision_config, "tokens_per_second", None)
        blocks: dict[int, list[tuple[tuple[int, int, int], float]]]
        blocks = {config.video_token_id: [], config.image_token_id: []}
        for n, (t, h, w) in enumerate(inputs.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.int64)).tolist()):
            if config.model_type.startswith("qwen3"):  # each frame by itself, a timestamp before it
                blocks[config.video_token_id] += [((1, h // merge, w // merge), 1.0)] * t
            else:
                factor = 1.0 if per_second is None else float(inputs["second_per_grid_ts"][n]) * per_second
                blocks[config.video_token_id].append(((t, h // merge, w // merge), factor))
        for t, h, w in inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.int64)).tolist():
            blocks[config.image_token_id].append(((t, h // merge, w // merge), 1.0))
        ids, rows, start, i = inputs["input_ids"][0].tolist(), [], 0, 0
        while i < len(ids):
            if ids[i] in blocks:
                shape, factor = blocks[ids[i]].pop(0)
                grid = np.indices(shape).astype(float)
                grid[0] = (grid[0] * factor).astype(np.int64)
                block = grid.reshape(3, -1).astype(np.int64) + start
            else:
                block = np.full((3, 1), start)
            rows.append(block)
            i += block.shape[1]
            start = int(block.max()) + 1
        return torch.from_numpy(np.concatenate(rows, 1))[:, None]
