"""Further decoders of the classes in the other tables."""

from tiny_models_images import PIXTRAL
from tiny_models_media import PATCHES_WITH_POSITIONS, VIDEO_FRAMES, cropped_images, image_media, sized_images
from tiny_models_table import CLIP, EXPERTS, PINPOINTS, Backbone, Options, gemma4, internvl, llava

_CROPS = {"image_grid_pinpoints": [[16, 16]]}
_SINKS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def _gemma4_shared(text: Options) -> Options:
    """The last two layers take keys and values from the first two, as in the small Gemma 4."""
    config = gemma4(text)
    layers = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
    }
    return {**config, "text_config": {**config["text_config"], **layers}}


def _gemma4_vision(text: Options) -> Options:
    """The tokens of a frame see each other in both directions, as in the large Gemma 4."""
    return gemma4({**text, "use_bidirectional_attention": "vision"})


DECODER_TABLE: dict[str, Backbone] = {
    "internvl_llama": Backbone("InternVLForConditionalGeneration", internvl("llama"), image_media(4)),
    "internvl_qwen3": Backbone("InternVLForConditionalGeneration", internvl("qwen3", head_dim=16), image_media(4)),
    "internvl_qwen3_moe": Backbone(
        "InternVLForConditionalGeneration", internvl("qwen3_moe", head_dim=16, **EXPERTS), image_media(4)
    ),
    "internvl_gpt_oss": Backbone(
        "InternVLForConditionalGeneration",
        internvl("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_SINKS),
        image_media(4),
    ),
    "llava_next_video_mistral": Backbone(
        "LlavaNextVideoForConditionalGeneration", llava("mistral", CLIP, **PINPOINTS), VIDEO_FRAMES
    ),
    "llava_next_video_qwen2": Backbone(
        "LlavaNextVideoForConditionalGeneration", llava("qwen2", CLIP, **PINPOINTS), VIDEO_FRAMES
    ),
    "gemma4_shared": Backbone("Gemma4ForConditionalGeneration", _gemma4_shared, PATCHES_WITH_POSITIONS),
    "gemma4_vision": Backbone("Gemma4ForConditionalGeneration", _gemma4_vision, PATCHES_WITH_POSITIONS, own_mask=True),
    "llava_mistral": Backbone("LlavaForConditionalGeneration", llava("mistral", CLIP), image_media(16)),
    "llava_qwen2": Backbone("LlavaForConditionalGeneration", llava("qwen2", CLIP), image_media(16)),
    "llava_next_llama": Backbone(
        "LlavaNextForConditionalGeneration", llava("llama", CLIP, **_CROPS), image_media(36, cropped_images)
    ),
    "llava_next_qwen2": Backbone(
        "LlavaNextForConditionalGeneration", llava("qwen2", CLIP, **_CROPS), image_media(36, cropped_images)
    ),
    "mistral3_ministral3": Backbone(
        "Mistral3ForConditionalGeneration", llava("ministral3", PIXTRAL), image_media(4, sized_images), since=5
    ),
}
