"""LLaVA-Video (`llava_qwen`): SigLIP, an MLP, Qwen2, and a newline vector among the visual tokens.

Architecture: https://github.com/LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py. transformers' LLaVA-OneVision has one
newline at the end of a video; LLaVA-Video with `mm_newline_position` "grid" has one at the end of each row of each
frame. The vector is therefore also written to an unused row of the embedding, as the token `<video_newline>`, and
`insert_grid_newlines` puts that token into a prompt.
"""

import math
from itertools import groupby
from typing import Any

import torch

from ...errors import InputError
from .plan import Plan, chat_template, checkpoint_files, require, text_config
from .tokenizer import SourceTokenizer

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
    }
}

_RENAMES = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.vision_model.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(layers|embed_tokens|norm)\.": r"model.language_model.\1.",
}


def plan(config: dict[str, Any], tokenizer: SourceTokenizer) -> Plan:
    """How to convert a `llava_qwen` checkpoint.

    Raises:
        InputError: when the architecture is one that LlavaOnevisionForConditionalGeneration does not have.
        KeyError: when config.json lacks a needed entry.
    """
    require(config, mm_vision_tower=VISION_TOWERS, mm_projector_type=["mlp2x_gelu"], mm_vision_select_feature=["patch"])
    require(
        config, mm_patch_merge_type=["spatial_unpad"], mm_spatial_pool_mode=["bilinear"], mm_spatial_pool_stride=[2]
    )
    require(config, mm_resampler_type=[None], add_faster_video=[False], use_pos_skipping=[False])
    require(config, mm_newline_position=["grid", "one_token"])
    aspect = config.get("image_aspect_ratio", "anyres_max_9")
    if not aspect.startswith("anyres_max_"):
        raise InputError(f"config.json: image_aspect_ratio = {aspect!r} cannot be converted; known is anyres_max_N")
    vision, text = VISION_TOWERS[config["mm_vision_tower"]], text_config("qwen2", config)
    tied, grid = text["tie_word_embeddings"], config.get("mm_newline_position") == "grid"
    if grid and tied:
        raise InputError("config.json: tied embeddings leave no row for the newline of mm_newline_position grid")
    n_known = tokenizer.backend.get_vocab_size()
    new_tokens = ["<image>", "<video>"] + ([NEWLINE] if grid else [])
    ids = {token: tokenizer.add(token) for token in new_tokens}
    if max(ids.values()) >= text["vocab_size"]:
        raise InputError(
            f"the embedding of {text['vocab_size']} rows has no room for {', '.join(new_tokens)} after {n_known} tokens"
        )
    n_layers = vision["num_hidden_layers"]
    new_config = {
        "model_type": "llava_onevision",
        "dtype": config.get("torch_dtype") or "bfloat16",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            "num_hidden_layers": n_layers + 1,
            "vision_use_head": False,
        },
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        **({"video_newline_token_index": ids[NEWLINE]} if grid else {}),
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "vision_aspect_ratio": aspect,
        "vision_feature_layer": -2,
        "tie_word_embeddings": tied,
    }
    files = checkpoint_files(
        "LlavaOnevision",
        new_config,
        tokenizer,
        tokens={"image_token": "<image>", "video_token": "<video>"},
        template=chat_template("You are a helpful assistant.", "<|im_end|>\n", image="<image>"),
        size=vision["image_size"],
        mean=[0.5] * 3,
        std=[0.5] * 3,
        images={
            "image_processor_type": "LlavaOnevisionImageProcessorFast",
            "image_grid_pinpoints": config["image_grid_pinpoints"],
        },
        processor={
            "num_image_tokens": (vision["image_size"] // vision["patch_size"]) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": aspect,
        },
    )

    def add_zeros(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The original takes the features before the tower's last norm. transformers 4.57 hands them out normed where
        they are the last (issue 40964), so a layer of zeros follows, whose output is not used."""
        return {str(n_layers - 1): tensor, str(n_layers): torch.zeros_like(tensor)}

    return Plan(
        "llava_qwen",
        files,
        renames={**_RENAMES, rf"\.encoder\.layers\.{n_layers - 1}\.": ".encoder.layers.*."},
        splits={".encoder.layers.*": add_zeros},
        rows={"model.language_model.embed_tokens.weight": (ids[NEWLINE], "model.image_newline")} if grid else {},
        notes=(_GRID_NOTE,) if grid else (),
    )


_GRID_NOTE = (
    "the original puts a newline after each row of each frame, transformers' processor one after the whole video: "
    "`videoanchor run` does as the original; in code of your own pass the processor's output through "
    "videoanchor_triton.integrations.transformers.convert.llava.insert_grid_newlines"
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
    video = config.video_token_index
    columns = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    prompts: list[list[int]] = []
    for row in input_ids.tolist():
        prompts.append([])
        for token, run in groupby(row):
            n = len(list(run))
            n_rows, rest = divmod(n - 1, columns)
            if token == video and rest:
                raise ValueError(f"input_ids: {n} video tokens are not rows of {columns} and a newline")
            rows = ([video] * columns + [newline]) * n_rows
            prompts[-1] += [*rows[:-1], video] if token == video else [token] * n
    if len(set(map(len, prompts))) > 1:
        raise ValueError("input_ids: the prompts of a batch must have the same number of frames: pass one at a time")
    return torch.tensor(prompts, dtype=input_ids.dtype, device=input_ids.device)
