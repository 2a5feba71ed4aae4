"""InternVL2, 2.5 and 3 of OpenGVLab (`internvl_chat`): InternViT, pixel shuffle, an MLP and a decoder.

Architecture: https://github.com/OpenGVLab/InternVL, internvl_chat/internvl/model. The decoder InternLM2 is Llama with
q, k, v fused by KV group and other names (arXiv 2403.17297, section 2.2).
"""

from typing import Any

import torch

from ...errors import InputError
from .plan import Plan, Rule, pixel_settings, require, text_config
from .tokenizer import SourceTokenizer, tokenizer_files

_DECODERS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

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


def plan(config: dict[str, Any], tokenizer: SourceTokenizer) -> Plan:
    """How to convert an `internvl_chat` checkpoint.

    Raises:
        InputError: when the architecture is one that InternVLForConditionalGeneration does not have.
        KeyError: when config.json lacks a needed entry.
    """
    vision, text = config["vision_config"], config["llm_config"]
    decoder = text["architectures"][0]
    if decoder not in _DECODERS:
        raise InputError(f"the decoder {decoder} is not converted; known are {', '.join(_DECODERS)}")
    if config["template"] not in _TEMPLATES:
        raise InputError(f"the prompt template {config['template']!r} is not known; known are {', '.join(_TEMPLATES)}")
    if config.get("ps_version", "v1") != "v2":
        raise InputError("config.json: ps_version v1 leaves rows and columns swapped, which transformers does not do")
    require(config, select_layer=-1, force_image_size=vision["image_size"], use_backbone_lora=0, use_llm_lora=0)
    require(text, rope_pos_id_version="default")
    if vision.get("qk_normalization"):
        require(vision, layer_norm_eps=1e-6)
    new_text = text_config(_DECODERS[decoder], text)
    side = int(vision["image_size"] // vision["patch_size"] * config["downsample_ratio"])
    tied = new_text["tie_word_embeddings"]
    rules = _rules(text if decoder == "InternLM2ForCausalLM" else None)
    if decoder == "InternLM2ForCausalLM":
        new_text["attention_bias"] = bool(text["bias"])
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    for token in special.values():
        tokenizer.id_of(token)
    tokenizer.add("<video>")  # stands in the template only: the processor replaces it before the text is tokenised
    end = tokenizer.id_of("<|im_end|>")
    system, separator = _TEMPLATES[config["template"]]
    new_config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": config.get("torch_dtype") or text.get("torch_dtype") or "bfloat16",
        "text_config": new_text,
        "vision_config": _vision_config(vision),
        "image_token_id": tokenizer.id_of("<IMG_CONTEXT>"),
        "image_seq_length": side * side,
        "downsample_ratio": config["downsample_ratio"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
    }
    pixels = pixel_settings(vision["image_size"], _MEAN, _STD, "InternVLProcessor")
    tiles = {
        "crop_to_patches": bool(config.get("dynamic_image_size")),
        "min_patches": config.get("min_dynamic_patch", 1),
        "max_patches": config.get("max_dynamic_patch", 12),
    }
    files = {
        "config.json": new_config,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": end},
        "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessorFast", **pixels, **tiles},
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **pixels},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": side * side},
        **tokenizer_files(tokenizer, {**special, "video_token": "<video>"}, "InternVLProcessor"),
    }
    return Plan(
        source=f"internvl_chat ({decoder})",
        rules=rules,
        files=files,
        chat_template=_chat_template(system, separator),
        tokenizer=tokenizer.backend,
        tied=frozenset({"lm_head.weight"} if tied else ()),
    )


def _vision_config(vision: dict[str, Any]) -> dict[str, Any]:
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    return {
        "model_type": "internvl_vision",
        **{key: vision[key] for key in same},
        "num_channels": vision.get("num_channels", 3),
        "hidden_act": vision.get("hidden_act", "gelu"),
        "norm_type": vision.get("norm_type", "rms_norm"),
        "attention_bias": vision["qkv_bias"],
        "use_qk_norm": vision["qk_normalization"],
        "image_size": [vision["image_size"]] * 2,
        "patch_size": [vision["patch_size"]] * 2,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,  # no norm after the last layer
        "use_mask_token": False,
    }


def _rules(internlm2: dict[str, Any] | None) -> tuple[Rule, ...]:
    old, new = r"vision_model\.encoder\.layers\.(\d+)\.", r"model.vision_tower.encoder.layer.\1."
    tail = r"\.(weight|bias)"
    rules: list[Rule] = [
        (r"vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
        (r"vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
        (
            rf"vision_model\.embeddings\.patch_embedding{tail}",
            r"model.vision_tower.embeddings.patch_embeddings.projection.\1",
        ),
        (rf"{old}ls([12])", rf"{new}lambda_\2"),
        (rf"{old}attn\.qkv{tail}", rf"{new}attention.*_proj.\2", lambda t: dict(zip("qkv", t.chunk(3), strict=True))),
        (rf"{old}attn\.([qk]_norm\.weight)", rf"{new}attention.\2"),
        (rf"{old}attn\.proj{tail}", rf"{new}attention.projection_layer.\2"),
        (rf"{old}norm1{tail}", rf"{new}layernorm_before.\2"),
        (rf"{old}norm2{tail}", rf"{new}layernorm_after.\2"),
        (rf"{old}mlp\.(fc[12]){tail}", rf"{new}mlp.\2.\3"),
        (rf"mlp1\.0{tail}", r"model.multi_modal_projector.layer_norm.\1"),
        (rf"mlp1\.1{tail}", r"model.multi_modal_projector.linear_1.\1"),
        (rf"mlp1\.3{tail}", r"model.multi_modal_projector.linear_2.\1"),
    ]
    if internlm2 is None:
        return (
            *rules,
            (r"language_model\.model\.(.+)", r"model.language_model.\1"),
            (r"language_model\.lm_head\.weight", "lm_head.weight"),
        )
    old, new = r"language_model\.model\.layers\.(\d+)\.", r"model.language_model.layers.\1."
    n_heads, n_kv = internlm2["num_attention_heads"], internlm2["num_key_value_heads"]
    head_dim = internlm2["hidden_size"] // n_heads

    def split_groups(fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """(n_kv * (n_heads / n_kv + 2) * head_dim, ...): the queries of a KV head, its key, its value."""
        rest = fused.shape[1:]
        groups = fused.reshape(n_kv, n_heads // n_kv + 2, head_dim, *rest)
        parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
        return {name: part.reshape(-1, *rest) for name, part in parts.items()}

    return (
        *rules,
        (rf"{old}attention\.wqkv{tail}", rf"{new}self_attn.*_proj.\2", split_groups),
        (rf"{old}attention\.wo{tail}", rf"{new}self_attn.o_proj.\2"),
        (rf"{old}feed_forward\.w1\.weight", rf"{new}mlp.gate_proj.weight"),
        (rf"{old}feed_forward\.w2\.weight", rf"{new}mlp.down_proj.weight"),
        (rf"{old}feed_forward\.w3\.weight", rf"{new}mlp.up_proj.weight"),
        (rf"{old}attention_norm\.weight", rf"{new}input_layernorm.weight"),
        (rf"{old}ffn_norm\.weight", rf"{new}post_attention_layernorm.weight"),
        (r"language_model\.model\.tok_embeddings\.weight", "model.language_model.embed_tokens.weight"),
        (r"language_model\.model\.norm\.weight", "model.language_model.norm.weight"),
        (r"language_model\.output\.weight", "lm_head.weight"),
    )


def _chat_template(system: str, separator: str) -> str:
    end = separator.replace("\n", "\\n")
    return (
        "{% if messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\\n{system}{end}' }}}}"
        "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
        "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        f"{{% endif %}}{{{{ '{end}' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
