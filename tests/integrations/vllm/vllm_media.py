"""Clips and prompts that vLLM and the reference both get, and scorers that rounding cannot move to other clusters."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ALPHA_K, ALPHA_V = 9.5, 2.5
GATED = {"alpha_k": ALPHA_K, "alpha_v": ALPHA_V, "scorer": "vllm_media:by_norm"}
START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
VIDEO, IMAGE = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))


class Request(NamedTuple):
    """A prompt, and its media in their order."""

    prompt: str
    videos: tuple[np.ndarray, ...] = ()
    images: tuple[np.ndarray, ...] = ()

    def for_vllm(self) -> dict[str, Any]:
        media: dict[str, Any] = {}
        if self.videos:
            media["video"] = [(clip, metadata(clip) | {"do_sample_frames": False}) for clip in self.videos]
        if self.images:
            media["image"] = list(self.images)
        return {"prompt": self.prompt} | ({"multi_modal_data": media} if media else {})


def clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """(frames, height, width, 3) uint8: coloured waves that move, with noise."""
    rng = np.random.default_rng(seed)
    phase, across, down = rng.uniform(0, 6, (5, 3)), *rng.uniform(0.02, 0.12, (2, 5))
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    waves = np.stack([np.sin(across[k] * (x + 3 * t) + down[k] * y) for k in range(5)], -1)
    image = waves @ np.cos(phase) + np.sin(phase).sum(0) + rng.normal(0, 0.1, (frames, height, width, 3))
    return np.clip(127 + 40 * image, 0, 255).astype(np.uint8)


def metadata(video: np.ndarray) -> dict[str, Any]:
    n = len(video)
    return {"fps": 2.0, "total_num_frames": n, "duration": n / 2.0, "frames_indices": list(range(n))}


def by_norm(tokens: Tensor) -> Tensor:
    """Scores in [0, 1] that are smooth in the tokens."""
    norm = tokens.double().pow(2).sum(1)
    return ((norm - norm.min()) / (norm.max() - norm.min())).float()


def uniform(tokens: Tensor) -> Tensor:
    return tokens.new_full((len(tokens),), 0.5, dtype=torch.float32)


def failing(tokens: Tensor) -> Tensor:
    """Content that cannot be scored: items of 72 tokens."""
    if len(tokens) == 72:
        raise FloatingPointError("not these")
    return by_norm(tokens)


A, B, C = clip(0, 8, 112, 168), clip(1, 12, 84, 112), clip(2, 4, 140, 140)
PICTURE = clip(3, 1, 140, 196)[0]
QWEN = {
    "video A": Request(f"{START}{VIDEO}Which roof is nearer to the camera?{END}", (A,)),
    "text": Request(f"{START}Which side is the left one, and which the right one? Say it in a few words.{END}"),
    "video B": Request(f"{START}{'user ' * 30}{VIDEO}Where is the left one?{END}", (B,)),
    "image": Request(f"{START}{IMAGE}What is near?{END}", (), (PICTURE,)),
    "video A, other question": Request(f"{START}{VIDEO}Is the left one far?{END}", (A,)),
    "videos A and C": Request(f"{START}{VIDEO}and{VIDEO}Which one is nearer?{END}", (A, C)),
    "videos A and B": Request(f"{START}{VIDEO}and{VIDEO}Which one is nearer?{END}", (A, B)),
    "video A again": Request(f"{START}{VIDEO}Which roof is nearer to the camera?{END}", (A,)),
    "second turn": Request(
        f"{START}{VIDEO}Is the left one far?{END}No.<|im_end|>\n{START}And {IMAGE} now?{END}",
        (A,),
        (PICTURE,),
    ),
}
FEW = {name: QWEN[name] for name in ("video A", "text", "videos A and C")}
TEXT = {"text": QWEN["text"]}
TAGGED = {
    "video A": Request(f"{START}<video>Which roof is nearer?{END}", (A,)),
    "text": QWEN["text"],
    "video B": Request(f"{START}user user <video>Where is the left one?{END}", (B,)),
}
INTERNVL = {**TAGGED, "image": Request(f"{START}<IMG_CONTEXT>What is near?{END}", (), (PICTURE,))}
LLAVA = {**TAGGED, "image": Request(f"{START}<image>What is near?{END}", (), (PICTURE,))}
