"""LLaVA-Video (`llava_qwen`): SigLIP, an MLP, Qwen2, and a newline vector among the visual tokens.

Architecture: https://github.com/LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py. transformers' LLaVA-OneVision has one
newline at the end of a video; LLaVA-Video with `mm_newline_position` "grid" has one at the end of each row of each
frame. The vector is therefore also written to an unused row of the embedding, as the token `<video_newline>`, and
`insert_grid_newlines` puts that token into a prompt.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from ...errors import InputError
from .plan import Patch, Plan, Rule, pixel_settings, require, text_config
from .tokenizer import SourceTokenizer, tokenizer_files

NEWLINE = "<video_newline>"
# The checkpoint names its vision tower and does not describe it. One layer fewer than SigLIP has: the original drops
# the last.
VISION_TOWERS = {
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
}


def plan(config: dict[str, Any], tokenizer: SourceTokenizer) -> Plan:
    """How to convert a `llava_qwen` checkpoint.

    Raises:
        InputError: when the architecture is one that LlavaOnevisionForConditionalGeneration does not have.
        KeyError: when config.json lacks a needed entry.
    """
    tower = config["mm_vision_tower"]
    if tower not in VISION_TOWERS:
        raise InputError(f"the vision tower {tower} is not known; known are {', '.join(VISION_TOWERS)}")
    require(
        config, mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch", mm_patch_merge_type="spatial_unpad"
    )
    require(config, mm_spatial_pool_mode="bilinear", mm_spatial_pool_stride=2, mm_resampler_type=None)
    require(config, add_faster_video=False, use_pos_skipping=False)
    newline = config.get("mm_newline_position", "one_token")
    if newline not in ("grid", "one_token"):
        raise InputError(
            f"config.json: mm_newline_position = {newline!r} cannot be converted: known are grid, one_token"
        )
    aspect = config.get("image_aspect_ratio", "anyres_max_9")
    if not aspect.startswith("anyres_max_"):
        raise InputError(f"config.json: image_aspect_ratio = {aspect!r} cannot be converted: anyres_max_N is")
    vision = VISION_TOWERS[tower]
    text = text_config("qwen2", config)
    tied = text["tie_word_embeddings"]
    if newline == "grid" and tied:
        raise InputError("config.json: tied embeddings leave no row for the newline of mm_newline_position grid")
    n_known = len(tokenizer)
    new_tokens = ["<image>", "<video>"] + ([NEWLINE] if newline == "grid" else [])
    ids = {token: tokenizer.add(token) for token in new_tokens}
    if max(ids.values()) >= text["vocab_size"]:
        raise InputError(
            f"the embedding of {text['vocab_size']} rows has no room for {', '.join(new_tokens)} after {n_known} tokens"
        )
    end = tokenizer.id_of("<|im_end|>")
    side = vision["image_size"] // vision["patch_size"]
    new_config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "dtype": config.get("torch_dtype") or "bfloat16",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            "num_hidden_layers": vision["num_hidden_layers"] + 1,
            "vision_use_head": False,
        },
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "vision_aspect_ratio": aspect,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": tied,
    }
    notes: tuple[str, ...] = ()
    if newline == "grid":
        new_config["video_newline_token_index"] = ids[NEWLINE]
        notes = (
            "the original puts a newline after each row of each frame, transformers' processor one after the whole "
            "video: `videoanchor run` does as the original; in code of your own pass the processor's output through "
            "videoanchor_triton.integrations.transformers.convert.llava.insert_grid_newlines",
        )
    pixels = pixel_settings(vision["image_size"], [0.5] * 3, [0.5] * 3, "LlavaOnevisionProcessor")
    files = {
        "config.json": new_config,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": end},
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessorFast",
            **pixels,
            "do_pad": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
        },
        "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels},
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": side * side,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": aspect,
            "image_token": "<image>",
            "video_token": "<video>",
        },
        **tokenizer_files(tokenizer, {"image_token": "<image>", "video_token": "<video>"}, "LlavaOnevisionProcessor"),
    }

    def patches(read: Callable[[str], torch.Tensor]) -> dict[str, Patch]:
        def write_newline(embedding: torch.Tensor) -> torch.Tensor:
            embedding[ids[NEWLINE]] = read("model.image_newline").to(embedding.dtype)
            return embedding

        return {"model.language_model.embed_tokens.weight": write_newline}

    return Plan(
        source="llava_qwen",
        rules=_rules(vision["num_hidden_layers"]),
        files=files,
        chat_template=_CHAT_TEMPLATE,
        tokenizer=tokenizer.backend,
        tied=frozenset({"lm_head.weight"} if tied else ()),
        notes=notes,
        patches=patches if newline == "grid" else None,
    )


def _rules(n_layers: int) -> tuple[Rule, ...]:
    """The original takes the features before the tower's last norm. transformers 4.57 hands them out normed where they
    are the last (issue 40964), so a layer of zeros follows, whose output is not used."""
    old, new = r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower.vision_model."

    def add_zeros(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {str(n_layers - 1): tensor, str(n_layers): torch.zeros_like(tensor)}

    return (
        (rf"{old}encoder\.layers\.{n_layers - 1}\.(.+)", rf"{new}encoder.layers.*.\1", add_zeros),
        (rf"{old}(.+)", rf"{new}\1"),
        (r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
        (r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
        (r"model\.image_newline", "model.image_newline"),
        (r"model\.((layers|embed_tokens|norm)\..+)", r"model.language_model.\1"),
        (r"lm_head\.weight", "lm_head.weight"),
    )


_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def insert_grid_newlines(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Puts `<video_newline>` after each row of each video frame, as LLaVA-Video has its prompts.

    The newline after the last row is the one that the model adds itself. A run of frames * rows * columns + 1 video
    tokens, as the processor writes it, becomes frames * rows * (columns + 1) tokens. As in the authors' code they are
    visual tokens to the gate.

    Args:
        input_ids: (batch, n) int64, without padding; rows must hold equally many newlines.
        config: of a model that `videoanchor convert` made from a checkpoint with `mm_newline_position` "grid".

    Returns:
        (batch, n + newlines) int64; its attention mask is all ones.

    Raises:
        ValueError: when the model has no such token, or a run of video tokens is not of whole rows.
    """
    newline = getattr(config, "video_newline_token_index", None)
    if newline is None:
        raise ValueError("config: no video_newline_token_index; this model places no newlines in a grid")
    columns = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    rows = [_with_newlines(row, config.video_token_index, newline, columns) for row in input_ids.tolist()]
    if len(set(map(len, rows))) > 1:
        raise ValueError("input_ids: the prompts of a batch must have the same number of frames: pass one at a time")
    return torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)


def _with_newlines(row: list[int], video: int, newline: int, columns: int) -> list[int]:
    result: list[int] = []
    run = 0
    for i, token in enumerate(row):
        result.append(token)
        run = run + 1 if token == video else 0
        last = run > 0 and row[i + 1 : i + 2] != [video]
        if last and run % columns != 1 % columns:
            raise ValueError(f"input_ids: {run} video tokens are not rows of {columns} and a newline")
        if run and run % columns == 0 and row[i + 2 : i + 3] == [video]:
            result.append(newline)
    return result
