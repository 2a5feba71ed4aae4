"""Tiny random backbones and prompts for them, built offline, for transformers 4.57 and 5.x.

A prompt is a list of text token ids and "V" for one video of `FRAMES` frames. The table of backbones is in
tiny_models_table.py, tiny_models_images.py and tiny_models_decoders.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from tiny_models_decoders import DECODER_TABLE
from tiny_models_images import IMAGE_TABLE
from tiny_models_media import FRAMES, IMAGE, PAD, V5, VIDEO, VISION_END, VISION_START, VOCABULARY
from tiny_models_table import VIDEO_TABLE

__all__ = [
    "ALL_BACKBONES",
    "BACKBONES",
    "CLASSES",
    "FRAMES",
    "IMAGE",
    "PAD",
    "SUPPRESSED",
    "TABLE",
    "V5",
    "VIDEO",
    "VOCABULARY",
]

TABLE = {**VIDEO_TABLE, **IMAGE_TABLE, **DECODER_TABLE}

BACKBONES = ("qwen2_5_vl", "internvl", "llava_onevision", "qwen3_vl")
"""Over these every way of generating is tested."""

ALL_BACKBONES = tuple(
    name for name, row in TABLE.items() if hasattr(hf, row.model) and int(hf.__version__.split(".")[0]) >= row.since
)
"""All that the installed transformers has: the generic test in test_backbones.py runs on them."""

CLASSES = tuple(name for name in ALL_BACKBONES if name not in DECODER_TABLE)
"""One of each class."""

SUPPRESSED = [PAD, IMAGE, VIDEO, VISION_START, VISION_END]

Prompt = Sequence[int | str]


def build(name: str, seed: int = 0, **text_options: Any) -> Any:
    """A model in fp32, in eval mode, with weights wide enough that attention is far from uniform."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        **text_options,
    }
    row = TABLE[name]
    model_class = getattr(hf, row.model)
    model = model_class(model_class.config_class(**row.config(text)))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                width = 0.5 if "lm_head" in parameter_name else 0.15
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
            elif parameter_name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3)
            elif parameter_name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def inputs(name: str, prompts: Sequence[Prompt], *, seed: int = 5, left_pad: bool = True) -> dict[str, torch.Tensor]:
    """What generate() takes for a batch of prompts."""
    media = TABLE[name].media
    rows = [[t for part in prompt for t in (media.tokens if part == "V" else [int(part)])] for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left_pad else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for key, types in media.token_types.items():
        batch[key] = torch.zeros_like(ids)
        for token, number in types.items():
            batch[key][ids == token] = number
    n_videos = sum(part == "V" for prompt in prompts for part in prompt)
    if n_videos:
        batch.update(media.pixels(n_videos, torch.Generator().manual_seed(seed)))
    return batch
