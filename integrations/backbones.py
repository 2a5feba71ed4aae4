"""The backbones: which classes of transformers the gate fits, which of them the test suite runs on, and at which tokens
they put visual features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

VIDEO_AT_IMAGE_TOKENS = frozenset({"glm4v", "glm4v_moe", "glm46v", "glm_ocr"})
"""Model types that put the features of videos, too, at image tokens. Their video token never receives any."""

_LINEAR = "its linear-attention layers have no softmax and stay ungated"
_CONVOLUTIONS = "its convolution layers stay ungated"


@dataclass(frozen=True)
class Tested:
    """A class that the test suite compares with a dense gate.

    Args:
        name: the model family.
        checkpoints: examples on the Hugging Face Hub.
        since: the first major version of transformers in which the class is tested.
        preset: name for `VideoAnchorConfig.preset` where strengths are published.
        note: what a user should know.
    """

    name: str
    checkpoints: tuple[str, ...] = ()
    since: int = 4
    preset: str | None = None
    note: str = ""


TESTED: dict[str, Tested] = {
    "Qwen2VLForConditionalGeneration": Tested("Qwen2-VL", ("Qwen/Qwen2-VL-7B-Instruct",)),
    "Qwen2_5_VLForConditionalGeneration": Tested("Qwen2.5-VL", ("Qwen/Qwen2.5-VL-7B-Instruct",)),
    "Qwen3VLForConditionalGeneration": Tested("Qwen3-VL", ("Qwen/Qwen3-VL-8B-Instruct",)),
    "Qwen3VLMoeForConditionalGeneration": Tested("Qwen3-VL MoE", ("Qwen/Qwen3-VL-30B-A3B-Instruct",)),
    "InternVLForConditionalGeneration": Tested(
        "InternVL 2, 2.5, 3, 3.5",
        ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF"),
        preset="internvl2-8b",
        note="the preset is InternVL2-8B's",
    ),
    "LlavaOnevisionForConditionalGeneration": Tested("LLaVA-OneVision", ("llava-hf/llava-onevision-qwen2-7b-ov-hf",)),
    "LlavaNextVideoForConditionalGeneration": Tested("LLaVA-NeXT-Video", ("llava-hf/LLaVA-NeXT-Video-7B-hf",)),
    "VideoLlavaForConditionalGeneration": Tested("Video-LLaVA", ("LanguageBind/Video-LLaVA-7B-hf",)),
    "Qwen3_5ForConditionalGeneration": Tested("Qwen3.5", note=_LINEAR),
    "Qwen3_5MoeForConditionalGeneration": Tested("Qwen3.5 MoE", note=_LINEAR),
    "Qwen2_5OmniThinkerForConditionalGeneration": Tested("Qwen2.5-Omni thinker", ("Qwen/Qwen2.5-Omni-7B",), since=5),
    "Qwen3OmniMoeThinkerForConditionalGeneration": Tested(
        "Qwen3-Omni thinker", ("Qwen/Qwen3-Omni-30B-A3B-Instruct",), since=5
    ),
    "Glm4vForConditionalGeneration": Tested("GLM-4.1V", ("zai-org/GLM-4.1V-9B-Thinking",)),
    "Glm4vMoeForConditionalGeneration": Tested("GLM-4.5V", ("zai-org/GLM-4.5V",)),
    "Glm46VForConditionalGeneration": Tested("GLM-4.6V"),
    "GlmOcrForConditionalGeneration": Tested("GLM-OCR"),
    "Ernie4_5_VLMoeForConditionalGeneration": Tested("ERNIE-4.5-VL", ("baidu/ERNIE-4.5-VL-28B-A3B-PT",)),
    "Exaone4_5_ForConditionalGeneration": Tested("EXAONE 4.5"),
    "VideoLlama3ForConditionalGeneration": Tested("VideoLLaMA 3", ("lkhl/VideoLLaMA3-2B-Image-HF",)),
    "HyperCLOVAXVisionV2ForConditionalGeneration": Tested("HyperCLOVA X Vision V2"),
    "CohereCompassForConditionalGeneration": Tested("Cohere Compass"),
    "Lfm3VlForConditionalGeneration": Tested("LFM3-VL", note=_CONVOLUTIONS),
    "Gemma4ForConditionalGeneration": Tested("Gemma 4"),
    "MuseGlimmerForConditionalGeneration": Tested("Muse Glimmer"),
    "LlavaForConditionalGeneration": Tested("LLaVA", ("llava-hf/llava-1.5-7b-hf",)),
    "LlavaNextForConditionalGeneration": Tested("LLaVA-NeXT", ("llava-hf/llava-v1.6-mistral-7b-hf",)),
    "VipLlavaForConditionalGeneration": Tested("ViP-LLaVA", ("llava-hf/vip-llava-7b-hf",)),
    "Mistral3ForConditionalGeneration": Tested("Mistral 3", ("mistralai/Mistral-Small-3.1-24B-Instruct-2503",)),
    "AyaVisionForConditionalGeneration": Tested("Aya Vision", ("CohereLabs/aya-vision-8b",)),
    "Cohere2VisionForConditionalGeneration": Tested("Command A Vision", ("CohereLabs/command-a-vision-07-2025",)),
    "Gemma3ForConditionalGeneration": Tested(
        "Gemma 3", ("google/gemma-3-4b-it",), note="transformers gives it a mask of query x key length"
    ),
    "Lfm2VlForConditionalGeneration": Tested("LFM2-VL", ("LiquidAI/LFM2-VL-1.6B",), since=5, note=_CONVOLUTIONS),
    "Ovis2ForConditionalGeneration": Tested("Ovis2", ("thisisiron/Ovis2-2B-hf",)),
    "AriaForConditionalGeneration": Tested("Aria", ("rhymes-ai/Aria",)),
    "DeepseekVLForConditionalGeneration": Tested("DeepSeek-VL", ("deepseek-community/deepseek-vl-1.3b-chat",)),
    "GotOcr2ForConditionalGeneration": Tested("GOT-OCR2", ("stepfun-ai/GOT-OCR-2.0-hf",)),
    "JanusForConditionalGeneration": Tested("Janus", ("deepseek-community/Janus-Pro-1B",)),
    "QianfanOCRForConditionalGeneration": Tested("Qianfan-OCR"),
    "LightOnOcrForConditionalGeneration": Tested("LightOnOCR", ("lightonai/LightOnOCR-1B-1025",)),
    "PaddleOCRVLForConditionalGeneration": Tested("PaddleOCR-VL", ("PaddlePaddle/PaddleOCR-VL",)),
}


@dataclass(frozen=True)
class InstalledBackbone:
    """A class of the installed transformers that `enable` takes.

    Args:
        name: the model family, or transformers' model type where it is not tested.
        model: the class.
        tested: whether the test suite runs on it.
        token_ids: visual token ids by modality in the default config; a checkpoint's own config decides. Empty where
            only checkpoints set them.
        tested_as: its row in `TESTED`.
    """

    name: str
    model: str
    tested: bool
    token_ids: dict[str, int]
    tested_as: Tested | None = None


def visual_token_ids(config: Any) -> dict[str, int]:
    """Ids of the visual tokens, as far as `config`, a multimodal model's, has them: "image" and "video", where features
    go, and "newline", which ends a row of a video frame (LLaVA-Video)."""
    ids = {modality: getattr(config, f"{modality}_token_id", None) for modality in ("image", "video")}
    ids["newline"] = getattr(config, "video_newline_token_index", None)
    if config.model_type in VIDEO_AT_IMAGE_TOKENS:
        ids["video"] = ids["image"]
    return {modality: int(token) for modality, token in ids.items() if token is not None}


def installed_backbones() -> list[InstalledBackbone]:
    """Every generating class of the installed transformers whose model has `get_placeholder_mask`, a `language_model`
    without an encoder of its own, and image or video tokens; those that the test suite runs on come first.

    The sources are read and the default configs made; no modeling code is imported.
    """
    major = int(transformers.__version__.split(".")[0])
    classes = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    classes |= getattr(modeling_auto, "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES", {})  # transformers 4.57: Video-LLaVA
    found = []
    for model_type, model in classes.items():
        if not _merges_into_a_language_model(model_type):
            continue
        config = CONFIG_MAPPING[model_type]()
        has_tokens = hasattr(config, "image_token_id") or hasattr(config, "video_token_id")
        if config.is_encoder_decoder or not has_tokens:
            continue
        row = TESTED.get(model)
        tested = row is not None and major >= row.since
        name = row.name if row is not None else model_type
        found.append(InstalledBackbone(name, model, tested, visual_token_ids(config), row if tested else None))
    order = list(TESTED)
    return sorted(found, key=lambda one: (not one.tested, order.index(one.model) if one.tested else one.name))


def _merges_into_a_language_model(model_type: str) -> bool:
    module = model_type_to_module_name(model_type)
    source = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    return source.exists() and any(
        "def get_placeholder_mask(" in body and "self.language_model = " in body
        for body in source.read_text(encoding="utf-8").split("\nclass ")
    )
