"""Tiny random backbones and prompts for them, built offline, for transformers 4.57 and 5.x.

A prompt is a list of text token ids and "V" for one video of `FRAMES` frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf

V5 = int(hf.__version__.split(".")[0]) >= 5
BACKBONES = ("qwen2_5_vl", "internvl", "llava_onevision")
FRAMES = 3
VOCABULARY, PAD, IMAGE, VIDEO, VISION_START, VISION_END = 200, 0, 190, 191, 192, 193
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
    model = {"qwen2_5_vl": _qwen2_5_vl, "internvl": _internvl, "llava_onevision": _llava_onevision}[name](text)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                width = 0.5 if "lm_head" in parameter_name else 0.15
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
            elif parameter_name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def _qwen2_5_vl(text: dict[str, Any]) -> Any:
    rope = {"mrope_section": [2, 3, 3]}
    if V5:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    else:
        text |= {"rope_scaling": {"type": "mrope", **rope}, "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "tokens_per_second": 1,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _internvl(text: dict[str, Any]) -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration(config)


def _llava_onevision(text: dict[str, Any]) -> Any:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _video_tokens(name: str) -> list[int]:
    if name == "qwen2_5_vl":
        return [VISION_START, *[VIDEO] * (FRAMES * 4), VISION_END]
    if name == "internvl":
        return [token for frame in range(FRAMES) for token in (30 + frame, *[IMAGE] * 4)]
    return [VIDEO] * (FRAMES * 4 + 1)


def inputs(name: str, prompts: Sequence[Prompt], *, seed: int = 5, left_pad: bool = True) -> dict[str, torch.Tensor]:
    """What generate() takes for a batch of prompts."""
    rows = [[t for part in prompt for t in (_video_tokens(name) if part == "V" else [int(part)])] for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left_pad else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    n_videos = sum(part == "V" for prompt in prompts for part in prompt)
    generator = torch.Generator().manual_seed(seed)
    if name == "qwen2_5_vl":
        if V5:
            batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if n_videos:
            batch["pixel_values_videos"] = torch.randn(n_videos * FRAMES * 16, 3 * 2 * 4 * 4, generator=generator)
            batch["video_grid_thw"] = torch.tensor([[FRAMES, 4, 4]] * n_videos)
    elif name == "internvl" and n_videos:
        batch["pixel_values"] = torch.randn(n_videos * FRAMES, 3, 16, 16, generator=generator)
    elif n_videos:
        batch["pixel_values_videos"] = torch.randn(n_videos, FRAMES, 3, 16, 16, generator=generator)
    return batch
