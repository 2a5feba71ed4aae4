"""The table of tiny backbones that take videos, and InternVL. A row serves every transformers that has its class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiny_models_media import (
    FRAME_END,
    FRAME_START,
    IMAGE,
    PATCHES,
    PATCHES_AND_SECONDS,
    PATCHES_AT_IMAGE_TOKENS,
    PATCHES_BY_FRAME,
    PATCHES_MERGED_IN_TIME,
    PATCHES_UNTYPED,
    PATCHES_WITH_MERGE_SIZE,
    PATCHES_WITH_POSITIONS,
    V5,
    VIDEO,
    VIDEO_FRAMES,
    VIDEO_FRAMES_AND_NEWLINE,
    VIDEO_FRAMES_UNPOOLED,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Media,
    image_media,
)

Options = dict[str, Any]


@dataclass(frozen=True)
class Backbone:
    """One row.

    Args:
        model: name of the class in transformers.
        config: from the text model's common options to the options of the class's config.
        media: a video as it takes it.
        since: the first major version of transformers that it is tested on.
        own_mask: transformers gives it a mask of query x key length of its own (images seen in both directions).
    """

    model: str
    config: Callable[[Options], Options]
    media: Media
    since: int = 4
    own_mask: bool = False


IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS = {**IDS, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
GLM_IDS = {
    **IDS,
    "image_start_token_id": FRAME_START,
    "image_end_token_id": FRAME_END,
    "video_start_token_id": VISION_START,
    "video_end_token_id": VISION_END,
}
PATCH_VISION: Options = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
IMAGE_VISION: Options = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
UNSIZED_VISION = {key: value for key, value in IMAGE_VISION.items() if key != "image_size"}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **IMAGE_VISION}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **IMAGE_VISION, "num_hidden_layers": 3}
POSITIONS_AND_DEEPSTACK = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
EXPERTS: Options = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS: Options = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "num_mel_bins": 8,
    "output_dim": 64,
}


def _mrope(text: Options, **rope: Any) -> Options:
    """The text options with a rotary embedding over time, height and width."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], **rope}
    if V5:
        return {**text, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    return {**text, "rope_scaling": {"type": "default", **rope}, "rope_theta": 10000.0}


def _qwen2_vl(text: Options) -> Options:
    vision = {**PATCH_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return {"text_config": _mrope(text), "vision_config": vision, **QWEN_IDS}


def _qwen2_5_vl(text: Options) -> Options:
    vision = {**PATCH_VISION, **WINDOWS, "tokens_per_second": 1}
    return {"text_config": _mrope(text), "vision_config": vision, **QWEN_IDS}


def _qwen3_vl(text: Options) -> Options:
    vision = {**PATCH_VISION, **POSITIONS_AND_DEEPSTACK, "depth": 3}
    text = {"head_dim": 16, **_mrope(text, mrope_interleaved=True)}
    return {"text_config": text, "vision_config": vision, **QWEN_IDS}


def _qwen3_5(text: Options) -> Options:
    text = {"head_dim": 16, **_mrope(text, mrope_interleaved=True, partial_rotary_factor=1.0), **LINEAR_ATTENTION}
    return {"text_config": text, "vision_config": {**PATCH_VISION, "num_position_embeddings": 64}, **QWEN_IDS}


def _qwen2_5_omni(text: Options) -> Options:
    return {
        "text_config": _mrope(text),
        "vision_config": {**PATCH_VISION, **WINDOWS},
        "audio_config": AUDIO,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "audio_token_index": 196,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def _qwen3_omni(text: Options) -> Options:
    audio = {**AUDIO, "downsample_hidden_size": 8}
    return {**_qwen3_vl({**text, **EXPERTS}), "audio_config": audio, "audio_token_id": 196, "audio_start_token_id": 197}


def internvl(text_type: str, **text_options: Any) -> Callable[[Options], Options]:
    """InternVL with a language model of this type."""

    def config(text: Options) -> Options:
        return {
            "text_config": {"model_type": text_type, **text_options, **text},
            "vision_config": {**IMAGE_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        }

    return config


def llava(text_type: str, vision: Options, **options: Any) -> Callable[[Options], Options]:
    """LLaVA and what was made after it: a vision tower, a projector and a language model of this type."""

    def config(text: Options) -> Options:
        text = {"model_type": text_type, **text}
        return {"text_config": text, "vision_config": vision, "image_token_index": IMAGE, **options}

    return config


def _glm(text_type: str | None = None, **text_options: Any) -> Callable[[Options], Options]:
    def config(text: Options) -> Options:
        text = {"partial_rotary_factor": 1.0, **_mrope(text), **text_options}
        vision = {**PATCH_VISION, "image_size": 16}
        if text_type:
            text, vision = {"model_type": text_type, **text}, {"model_type": "glm4v_vision", **vision}
        return {"text_config": text, "vision_config": vision, **GLM_IDS}

    return config


def _ernie(text: Options) -> Options:
    text = {
        **_mrope(text, mrope_section=[3, 3, 2]),
        "moe_intermediate_size": [32, 32],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    }
    return {"text_config": text, "vision_config": {**PATCH_VISION, "temporal_merge_size": 2}, **GLM_IDS}


def _exaone(text: Options) -> Options:
    text = {"model_type": "exaone4", **text, **SLIDING, "sliding_window_pattern": None}
    return {"text_config": text, "vision_config": {**PATCH_VISION, **WINDOWS, "num_key_value_heads": 1}, **IDS}


def _video_llama_3(text: Options) -> Options:
    return {"text_config": {"model_type": "qwen2", **text}, "vision_config": UNSIZED_VISION, **IDS}


def _hyperclovax(text: Options) -> Options:
    text = {"model_type": "hyperclovax", **text}
    return {"text_config": text, "vision_config": {"model_type": "qwen2_5_vl_vision", **PATCH_VISION, **WINDOWS}, **IDS}


def _cohere_compass(text: Options) -> Options:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**text, **SLIDING, "rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    return {"text_config": text, "vision_config": {**PATCH_VISION, **POSITIONS_AND_DEEPSTACK}, **QWEN_IDS}


def _lfm3_vl(text: Options) -> Options:
    text = {"model_type": "lfm2", **text, "layer_types": ["conv", "full_attention", "full_attention"]}
    vision = {**UNSIZED_VISION, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    return {"text_config": text, "vision_config": vision, "projector_hidden_size": 64, **QWEN_IDS}


def gemma4(text: Options) -> Options:
    text = {
        **text,
        **SLIDING,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    }
    vision = {**UNSIZED_VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2}
    vision["position_embedding_size"] = 64
    return {"text_config": text, "vision_config": vision, "audio_config": None, **IDS}


def _muse_glimmer(text: Options) -> Options:
    vision = {**UNSIZED_VISION, "pos_emb_height": 4, "pos_emb_width": 4, "patch_temporal": 2, "merge_size": 2}
    text = {"head_dim": 16, **text, **SLIDING}
    return {"text_config": text, "vision_config": vision, "out_hidden_size": 128, "projector_hidden_size": 64, **IDS}


PINPOINTS = {"image_grid_pinpoints": [[16, 16]], "video_token_index": VIDEO}

VIDEO_TABLE: dict[str, Backbone] = {
    "qwen2_5_vl": Backbone("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, PATCHES),
    "internvl": Backbone("InternVLForConditionalGeneration", internvl("qwen2"), image_media(4)),
    "llava_onevision": Backbone(
        "LlavaOnevisionForConditionalGeneration", llava("qwen2", SIGLIP, **PINPOINTS), VIDEO_FRAMES_AND_NEWLINE
    ),
    "qwen3_vl": Backbone("Qwen3VLForConditionalGeneration", _qwen3_vl, PATCHES_BY_FRAME),
    "qwen2_vl": Backbone("Qwen2VLForConditionalGeneration", _qwen2_vl, PATCHES),
    "qwen3_vl_moe": Backbone(
        "Qwen3VLMoeForConditionalGeneration", lambda text: _qwen3_vl({**text, **EXPERTS}), PATCHES_BY_FRAME
    ),
    "llava_next_video": Backbone(
        "LlavaNextVideoForConditionalGeneration", llava("llama", CLIP, **PINPOINTS), VIDEO_FRAMES
    ),
    "video_llava": Backbone(
        "VideoLlavaForConditionalGeneration", llava("llama", CLIP, video_token_index=VIDEO), VIDEO_FRAMES_UNPOOLED
    ),
    "qwen3_5": Backbone("Qwen3_5ForConditionalGeneration", _qwen3_5, PATCHES_BY_FRAME),
    "qwen3_5_moe": Backbone(
        "Qwen3_5MoeForConditionalGeneration",
        lambda text: _qwen3_5({**text, **EXPERTS, "shared_expert_intermediate_size": 32}),
        PATCHES_BY_FRAME,
    ),
    "qwen2_5_omni": Backbone("Qwen2_5OmniThinkerForConditionalGeneration", _qwen2_5_omni, PATCHES_AND_SECONDS, since=5),
    "qwen3_omni_moe": Backbone(
        "Qwen3OmniMoeThinkerForConditionalGeneration", _qwen3_omni, PATCHES_AND_SECONDS, since=5
    ),
    "glm4v": Backbone("Glm4vForConditionalGeneration", _glm(), PATCHES_AT_IMAGE_TOKENS),
    "glm4v_moe": Backbone(
        "Glm4vMoeForConditionalGeneration", _glm(**ROUTED_EXPERTS, head_dim=16), PATCHES_AT_IMAGE_TOKENS
    ),
    "glm46v": Backbone("Glm46VForConditionalGeneration", _glm("glm4v_text"), PATCHES_AT_IMAGE_TOKENS),
    "glm_ocr": Backbone("GlmOcrForConditionalGeneration", _glm(), PATCHES_AT_IMAGE_TOKENS),
    "ernie4_5_vl_moe": Backbone("Ernie4_5_VLMoeForConditionalGeneration", _ernie, PATCHES_MERGED_IN_TIME),
    "exaone4_5": Backbone("Exaone4_5_ForConditionalGeneration", _exaone, PATCHES_UNTYPED),
    "video_llama_3": Backbone("VideoLlama3ForConditionalGeneration", _video_llama_3, PATCHES_WITH_MERGE_SIZE),
    "hyperclovax": Backbone("HyperCLOVAXVisionV2ForConditionalGeneration", _hyperclovax, PATCHES_UNTYPED),
    "cohere_compass": Backbone("CohereCompassForConditionalGeneration", _cohere_compass, PATCHES_BY_FRAME),
    "lfm3_vl": Backbone("Lfm3VlForConditionalGeneration", _lfm3_vl, PATCHES_UNTYPED),
    "gemma4": Backbone("Gemma4ForConditionalGeneration", gemma4, PATCHES_WITH_POSITIONS),
    "muse_glimmer": Backbone("MuseGlimmerForConditionalGeneration", _muse_glimmer, PATCHES_UNTYPED),
}
