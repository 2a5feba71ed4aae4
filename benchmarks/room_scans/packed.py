"""All questions of a scan in one pass: the video once, then each question, which sees the video and itself only.

Logits are those of one prompt a question; a training step costs a tenth.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from videoanchor_triton.app.evaluation.wording import VSI_BENCH, filled
from videoanchor_triton.app.room_scans import CELL, FPS, HEIGHT, QUESTIONS, WIDTH, Asked, RoomScan

GRID = (2 * HEIGHT // CELL, 2 * WIDTH // CELL)
"""Rows and columns of patches of a frame."""
TOKENS = HEIGHT * WIDTH // CELL**2
"""Visual tokens of a frame."""
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Batch(NamedTuple):
    """B scans of T frames with Q questions each.

    Attributes:
        frames: (B, T, 32, 96, 3) uint8.
        ids: (B, L) int64 tokens of the layout.
        place: (B, Q) int64: whose logits are the answer's.
        answers: (B, Q) int64 tokens; -100 where a scan has no such question.
    """

    frames: torch.Tensor
    ids: torch.Tensor
    place: torch.Tensor
    answers: torch.Tensor


def patches(frames: torch.Tensor) -> torch.Tensor:
    """(B, T, 32, 96, 3) uint8 -> (B T, patches, 192), normalised and in the order of Qwen's processors."""
    x = (frames.float() / 255 - torch.tensor(_MEAN)) / torch.tensor(_STD)
    b, t, h, w, _ = x.shape
    x = x.reshape(b * t, h // 16, 2, 8, w // 16, 2, 8, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.reshape(b * t, h * w // 64, 192)


def see(visual: Any, x: torch.Tensor) -> torch.Tensor:
    """The vision tower on N frames of one size: (N, patches, 192) -> (N, 12, D); the numbers of `visual` itself, whose
    way of telling frames apart is slow for many small ones."""
    n, p, _ = x.shape
    h = F.linear(x, visual.patch_embed.proj.weight.flatten(1))
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    at = torch.stack([rows, columns], -1).reshape(GRID[0] // 2, 2, GRID[1] // 2, 2, 2).permute(0, 2, 1, 3, 4)
    cos, sin = (table.float() for table in visual.rotary_pos_emb(h[0], at.reshape(-1, 2)))

    def rotate(z: torch.Tensor) -> torch.Tensor:
        a, b = z.chunk(2, -1)
        return z * cos + torch.cat([-b, a], -1) * sin

    for block in visual.blocks:
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(h)).reshape(n, p, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v  # the fused one's backward is slow in bf16 on a CPU
        h = h + block.attn.proj(mixed.transpose(1, 2).reshape(n, p, -1))
        h = h + block.mlp(block.norm2(h))
    return visual.merger(h.reshape(n * p, -1)).reshape(n, p // 4, -1)


class Layout:
    """Where the video and the questions stand in the packed prompt of scans of equally many frames.

    Args:
        model: a model of `tiny_model.make_model`.
        n_frames: 1 for a picture.
        kinds: of questions.
        worded: as VSI-Bench asks.
        n_more: words that a question may have over and above those of `QUESTIONS`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        n_frames: int,
        kinds: Sequence[str] = tuple(QUESTIONS),
        worded: bool = False,
        n_more: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.n_frames, self.kinds, self.worded = model, tokenizer, n_frames, kinds, worded
        self._known: dict[str, list[int]] = {}
        self.tail = self._ids("<|im_end|> <|im_start|> assistant")
        medium = "image" if n_frames == 1 else "video"
        pad = tokenizer.convert_tokens_to_ids(f"<|{medium}_pad|>")
        self.n_visual = n_frames * TOKENS
        begin = self._ids("<|im_start|> user <|vision_start|>")
        prefix = torch.tensor([*begin, *[pad] * self.n_visual, *self._ids("<|vision_end|>")])
        self.first = len(begin)
        slots = [len(self._ids(self._text(self._longest(kind)))) + n_more + len(self.tail) + 1 for kind in kinds]
        total = len(prefix) + sum(slots)
        position, _ = model.model.get_rope_index(
            prefix[None],
            mm_token_type_ids=torch.where(prefix == pad, 1 if n_frames == 1 else 2, 0)[None],
            **{f"{medium}_grid_thw": torch.tensor([[n_frames, *GRID]])},
            **({} if n_frames == 1 else {"second_per_grid_ts": torch.tensor([1 / FPS])}),
        )
        visible = torch.zeros(total, total, dtype=torch.bool)
        visible[:, : len(prefix)] = True
        self.starts, positions, start = [], [position[:, 0]], len(prefix)
        for n in slots:
            visible[start : start + n, start : start + n] = True
            positions.append(position[:, 0, -1:] + 1 + torch.arange(n))
            self.starts.append(start)
            start += n
        self.bias = torch.zeros(1, 1, total, total).masked_fill(~visible.tril(), -1e9)
        self.position = torch.cat(positions, 1)[:, None]
        after = torch.arange(total) >= self.first + self.n_visual
        self.later = self.position + torch.where(after, position[:, 0, :-1].max() + 1 - position[0, 0, -1], 0)
        self.prefix = torch.zeros(total, dtype=torch.long)
        self.prefix[: len(prefix)] = prefix

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def _longest(self, kind: str) -> str:
        return QUESTIONS[kind].format(a="red square", b="red square")

    def _text(self, question: str) -> str:
        return filled(VSI_BENCH["short"], question) if self.worded else question

    def batch(self, scans: Sequence[RoomScan], asked: Sequence[Sequence[Asked]] | None = None) -> Batch:
        """The scans with their questions, of these kinds."""
        ids = self.prefix.repeat(len(scans), 1)
        place = torch.zeros(len(scans), len(self.kinds), dtype=torch.long)
        answers = torch.full_like(place, -100)
        for b, scan in enumerate(scans):
            for one in scan.questions() if asked is None else asked[b]:
                if one.kind in self.kinds:
                    n, answer = self.kinds.index(one.kind), self._ids(one.answer)[0]
                    row = [*self._ids(self._text(one.text)), *self.tail, answer]
                    ids[b, self.starts[n] : self.starts[n] + len(row)] = torch.tensor(row)
                    place[b, n], answers[b, n] = self.starts[n] + len(row) - 2, answer
        return Batch(torch.from_numpy(np.stack([scan.frames for scan in scans])), ids, place, answers)

    def see(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 32, 96, 3) uint8 -> the visual tokens (B, 12 T, D)."""
        visual = self.model.model.visual
        return see(visual, patches(frames).to(visual.merger.ln_q.weight.dtype)).reshape(len(frames), self.n_visual, -1)

    def hidden(
        self,
        seen: torch.Tensor,
        ids: torch.Tensor,
        later: bool = False,
        gamma_k: torch.Tensor | None = None,
        gamma_v: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The decoder's output.

        Args:
            seen: (B, 12 T, D) the visual tokens.
            ids: (B, L) of a `Batch`.
            later: text goes on after the last frame's position, as in transformers 4.57 and vLLM; else as in 5.
            gamma_k, gamma_v: (B, 12 T) gates of the visual tokens in every layer; needs eager attention.

        Returns:
            (B, L, D).
        """
        embeds = self.model.get_input_embeddings()(ids)
        end = self.first + self.n_visual
        embeds = torch.cat([embeds[:, : self.first], seen.to(embeds.dtype), embeds[:, end:]], 1)
        position, bias = self.later if later else self.position, self.bias
        if gamma_k is not None:
            bias = bias.repeat(len(ids), 1, 1, 1)
            bias[..., self.first : end] += gamma_k.log()[:, None, None]
        layers, hooks = self.model.model.language_model.layers, []
        if gamma_v is not None:
            gain = F.pad(gamma_v, (self.first, ids.shape[1] - end), value=1.0)[..., None]
            hooks = [
                layer.self_attn.v_proj.register_forward_hook(lambda *called: called[-1] * gain) for layer in layers
            ]
        try:
            return self.model.model.language_model(
                inputs_embeds=embeds,
                attention_mask={"full_attention": bias.to(embeds.dtype)},
                position_ids=position.expand(3, len(ids), -1),
                use_cache=False,
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, hidden: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """(B, Q, V) at the places (B, Q)."""
        return self.model.lm_head(hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])))

    @torch.no_grad()
    def right(self, batch: Batch) -> torch.Tensor:
        """(B, Q) float: 1 where the likeliest token is the answer, 0 where not, NaN where there is no question."""
        logits = self.logits(self.hidden(self.see(batch.frames), batch.ids), batch.place)
        return torch.where(batch.answers >= 0, (logits.argmax(-1) == batch.answers).float(), torch.nan)
