"""InternVL2, 2.5 and 3 of OpenGVLab (`internvl_chat`): InternViT, pixel shuffle, an MLP and a decoder.

Architecture: https://github.com/OpenGVLab/InternVL, internvl_chat/internvl/model. The decoder InternLM2 is Llama with
q, k, v fused by KV group and other names (arXiv 2403.17297, section 2.2).
"""

from typing import Any

import torch

from .plan import Plan, Split, chat_template, checkpoint_files, require, text_config
from .tokenizer import SourceTokenizer

_DECODERS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_VISION_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")

# System prompt and what ends a turn, by the name of the template in config.json (conversation.py beside the weights).
_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
_TEMPLATES = {
    "internlm2-chat": (_SYSTEM_2, "<|im_end|>"),
    "Hermes-2": (_SYSTEM_2, "<|im_end|>"),
    "internvl2_5": (_SYSTEM_2_5, "<|im_end|>\n"),
}

_RENAMES = {
    r"^vision_model\.": "model.vision_tower.",
    r"\.class_embedding$": ".cls_token",
    r"\.position_embedding$": ".position_embeddings",
    r"\.patch_embedding\.": ".patch_embeddings.projection.",
    r"\.encoder\.layers\.": ".encoder.layer.",
    r"\.ls([12])$": r".lambda_\1",
    r"\.attn\.qkv\.": ".attention.*_proj.",
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.([qk]_norm)\.": r".attention.\1.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"^mlp1\.0\.": "model.multi_modal_projector.layer_norm.",
    r"^mlp1\.1\.": "model.multi_modal_projector.linear_1.",
    r"^mlp1\.3\.": "model.multi_modal_projector.linear_2.",
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.(lm_head|output)\.": "lm_head.",
}
_INTERNLM2_RENAMES = {
    r"\.tok_embeddings\.": ".embed_tokens.",
    r"\.attention\.wqkv\.": ".self_attn.*_proj.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}


def plan(config: dict[str, Any], tokenizer: SourceTokenizer) -> Plan:
    """How to convert an `internvl_chat` checkpoint.

    Raises:
        InputError: when the architecture is one that InternVLForConditionalGeneration does not have.
        KeyError: when config.json lacks a needed entry.
    """
    vision, text = config["vision_config"], config["llm_config"]
    decoder, template = text["architectures"][0], config["template"]
    require({"decoder": decoder}, decoder=_DECODERS)
    require(config, template=_TEMPLATES, select_layer=[-1], use_backbone_lora=[0], use_llm_lora=[0])
    require(config, force_image_size=[vision["image_size"]])
    require(text, rope_pos_id_version=["default"])
    # ps_version v1 leaves rows and columns swapped, which transformers does not do; it is what the original defaults to
    require({"ps_version": "v1", **config}, ps_version=["v2"])
    if vision.get("qk_normalization"):
        require(vision, layer_norm_eps=[1e-6])
    new_text, renames = text_config(_DECODERS[decoder], text), _RENAMES
    splits: dict[str, Split] = {".attention.*": lambda qkv: dict(zip("qkv", qkv.chunk(3), strict=True))}
    if decoder == "InternLM2ForCausalLM":
        new_text["attention_bias"] = bool(text["bias"])
        renames = {**_RENAMES, **_INTERNLM2_RENAMES}
        splits[".self_attn.*"] = _group_split(text)
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    for token in special.values():
        tokenizer.id_of(token)
    tokenizer.add("<video>")  # stands in the template only: the processor replaces it before the text is tokenised
    n_tokens = int(vision["image_size"] // vision["patch_size"] * config["downsample_ratio"]) ** 2
    new_config = {
        "model_type": "internvl",
        "dtype": config.get("torch_dtype") or text.get("torch_dtype") or "bfloat16",
        "text_config": new_text,
        "vision_config": {
            "model_type": "internvl_vision",
            **{key: vision[key] for key in _VISION_KEYS},
            "num_channels": vision.get("num_channels", 3),
            "hidden_act": vision.get("hidden_act", "gelu"),
            "norm_type": vision.get("norm_type", "rms_norm"),
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "image_size": [vision["image_size"]] * 2,
            "patch_size": [vision["patch_size"]] * 2,
            "use_mean_pooling": True,  # no norm after the last layer
        },
        "image_token_id": tokenizer.id_of("<IMG_CONTEXT>"),
        "image_seq_length": n_tokens,
        "downsample_ratio": config["downsample_ratio"],
        "tie_word_embeddings": new_text["tie_word_embeddings"],
    }
    files = checkpoint_files(
        "InternVL",
        new_config,
        tokenizer,
        tokens={**special, "video_token": "<video>"},
        template=chat_template(*_TEMPLATES[template], image="<IMG_CONTEXT>"),
        size=vision["image_size"],
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        images={
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_to_patches": bool(config.get("dynamic_image_size")),
            "min_patches": config.get("min_dynamic_patch", 1),
            "max_patches": config.get("max_dynamic_patch", 12),
        },
        processor={"image_seq_length": n_tokens},
    )
    return Plan(f"internvl_chat ({decoder})", files, renames, splits)


def _group_split(text: dict[str, Any]) -> Split:
    n_heads, n_kv = text["num_attention_heads"], text["num_key_value_heads"]
    head_dim = text["hidden_size"] // n_heads

    def split(fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """(n_kv * (n_heads / n_kv + 2) * head_dim, ...): the queries of a KV head, its key, its value."""
        groups = fused.unflatten(0, (n_kv, n_heads // n_kv + 2, head_dim))
        parts = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}
        return {name: part.flatten(0, 2) for name, part in parts.items()}

    return split
