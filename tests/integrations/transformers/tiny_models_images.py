"""The table of tiny backbones that take images only: a video is an image for each frame."""

from collections.abc import Callable
from typing import Any

from tiny_models_media import (
    FRAME_END,
    FRAME_START,
    IMAGE,
    VOCABULARY,
    cropped_images,
    flat_patches,
    image_media,
    large_images,
    masked_images,
    sized_images,
    square_patches,
)
from tiny_models_table import (
    CLIP,
    IMAGE_VISION,
    QWEN_IDS,
    SIGLIP,
    UNSIZED_VISION,
    Backbone,
    Options,
    internvl,
    llava,
)

PIXTRAL = {"model_type": "pixtral", **IMAGE_VISION}


def _of_parts(text_type: str, vision: Options, **options: Any) -> Callable[[Options], Options]:
    """A vision tower, a projector and a language model of this type, as the later classes name the image token."""

    def config(text: Options) -> Options:
        text = {"model_type": text_type, "head_dim": 16, **text}
        return {"text_config": text, "vision_config": vision, "image_token_id": IMAGE, **options}

    return config


def _gemma3(text: Options) -> Options:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "text_config": {
            **text,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": layers,
        },
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "boi_token_index": FRAME_START,
        "eoi_token_index": FRAME_END,
    }


def _lfm2_vl(text: Options) -> Options:
    return {
        "text_config": {"model_type": "lfm2", **text, "layer_types": ["conv", "full_attention", "full_attention"]},
        "vision_config": {
            "model_type": "siglip2_vision_model",
            **UNSIZED_VISION,
            "num_patches": 16,
            "vision_use_head": False,
        },
        "image_token_id": IMAGE,
        "projector_hidden_size": 64,
    }


def _ovis2(text: Options) -> Options:
    return {
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": {**IMAGE_VISION, "vocab_size": 40},
        "image_token_id": IMAGE,
        "visual_indicator_token_ids": [180, 181, 182, 183, 184],
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
    }


def _paddleocr_vl(text: Options) -> Options:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**text, "head_dim": 16, "rope_parameters": rope}
    return {"text_config": text, "vision_config": {**IMAGE_VISION, "spatial_merge_size": 2}, **QWEN_IDS}


def _aria(text: Options) -> Options:
    text = {"model_type": "aria_text", **text, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return {
        "text_config": text,
        "vision_config": {"model_type": "idefics3_vision", **IMAGE_VISION},
        "image_token_index": IMAGE,
        "projector_patch_to_query_dict": {16: 4},
    }


def _got_ocr2(text: Options) -> Options:
    vision = {**IMAGE_VISION, "output_channels": 16, "image_size": 64, "window_size": 4, "global_attn_indexes": [1]}
    return {
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": {**vision, "mlp_dim": 48},
        "image_token_index": IMAGE,
        "image_seq_length": 1,
    }


def _janus(text: Options) -> Options:
    codebook = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
    }
    return {
        "text_config": {"model_type": "llama", **text},
        "vision_config": {**IMAGE_VISION, "projection_dim": 64, "num_image_tokens": 16},
        "vq_config": codebook,
        "image_token_id": IMAGE,
    }


IMAGE_TABLE: dict[str, Backbone] = {
    "llava": Backbone("LlavaForConditionalGeneration", llava("llama", CLIP), image_media(16)),
    "llava_next": Backbone(
        "LlavaNextForConditionalGeneration",
        llava("mistral", CLIP, image_grid_pinpoints=[[16, 16]]),
        image_media(36, cropped_images),
    ),
    "vipllava": Backbone(
        "VipLlavaForConditionalGeneration",
        llava("llama", CLIP, vision_feature_layer=[-2, -1], vision_feature_layers=[-2, -1]),
        image_media(16),
    ),
    "mistral3": Backbone("Mistral3ForConditionalGeneration", llava("mistral", PIXTRAL), image_media(4, sized_images)),
    "aya_vision": Backbone("AyaVisionForConditionalGeneration", llava("cohere2", SIGLIP), image_media(4)),
    "cohere2_vision": Backbone(
        "Cohere2VisionForConditionalGeneration",
        _of_parts("cohere2", SIGLIP, alignment_intermediate_size=64),
        image_media(4),
    ),
    "gemma3": Backbone(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        image_media(4, token_types={"token_type_ids": {IMAGE: 1}}),
        own_mask=True,
    ),
    # 4.57 hands the attention's mask to the convolutions, which misread one of two dimensions.
    "lfm2_vl": Backbone("Lfm2VlForConditionalGeneration", _lfm2_vl, image_media(4, flat_patches), since=5),
    "ovis2": Backbone("Ovis2ForConditionalGeneration", _ovis2, image_media(16)),
    "aria": Backbone("AriaForConditionalGeneration", _aria, image_media(4, masked_images)),
    "deepseek_vl": Backbone("DeepseekVLForConditionalGeneration", _of_parts("llama", SIGLIP), image_media(16)),
    "got_ocr2": Backbone("GotOcr2ForConditionalGeneration", _got_ocr2, image_media(16, large_images)),
    "janus": Backbone("JanusForConditionalGeneration", _janus, image_media(16)),
    "qianfan_ocr": Backbone("QianfanOCRForConditionalGeneration", internvl("qwen3", head_dim=16), image_media(4)),
    "lighton_ocr": Backbone(
        "LightOnOcrForConditionalGeneration", _of_parts("qwen3", PIXTRAL), image_media(4, sized_images)
    ),
    "paddleocr_vl": Backbone(
        "PaddleOCRVLForConditionalGeneration",
        _paddleocr_vl,
        image_media(4, square_patches, {"mm_token_type_ids": {IMAGE: 1}}),
    ),
}
