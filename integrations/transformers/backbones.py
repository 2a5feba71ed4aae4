"""The backbones: which classes of transformers the gate fits, which of them and of their decoders the test suite runs
on, and at which tokens they put visual features."""

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from .attention import DECODERS_WITH_SINKS

VIDEO_AT_IMAGE_TOKENS = frozenset({"glm4v", "glm4v_moe", "glm46v", "glm_ocr"})
"""Model types that put the features of videos, too, at image tokens. Their video token never receives any."""

_DECODERS_BEYOND_SDPA = DECODERS_WITH_SINKS | {"gemma2", "vaultgemma"}
"""Types of decoders for which transformers rules out SDPA, and which are right here: sinks and soft-capping."""

_IN_BOTH_DIRECTIONS = frozenset({"gemma3"})
"""Model types whose tokens of an image see each other in both directions; Gemma 4's by its config."""

_LINEAR = "its linear-attention layers have no softmax and stay ungated"
_CONVOLUTIONS = "its convolution layers stay ungated"


@dataclass(frozen=True)
class Tested:
    """A class that the test suite compares with a dense gate.

    Args:
        name: the model family.
        decoders: text model types that are tested, where the checkpoint chooses the decoder. Empty where the class has
            one of its own.
        checkpoints: examples on the Hugging Face Hub.
        since: the first major version of transformers in which the class is tested.
        preset: name for `VideoAnchorConfig.preset` where strengths are published.
        note: what a user should know.
    """

    name: str
    checkpoints: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()
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
        decoders=("qwen2", "llama", "qwen3", "qwen3_moe", "gpt_oss"),
    ),
    "LlavaOnevisionForConditionalGeneration": Tested(
        "LLaVA-OneVision", ("llava-hf/llava-onevision-qwen2-7b-ov-hf",), decoders=("qwen2",)
    ),
    "LlavaNextVideoForConditionalGeneration": Tested(
        "LLaVA-NeXT-Video", ("llava-hf/LLaVA-NeXT-Video-7B-hf",), decoders=("llama", "mistral", "qwen2")
    ),
    "VideoLlavaForConditionalGeneration": Tested(
        "Video-LLaVA", ("LanguageBind/Video-LLaVA-7B-hf",), decoders=("llama",)
    ),
    "Qwen3_5ForConditionalGeneration": Tested("Qwen3.5", note=_LINEAR),
    "Qwen3_5MoeForConditionalGeneration": Tested("Qwen3.5 MoE", note=_LINEAR),
    "Qwen2_5OmniThinkerForConditionalGeneration": Tested("Qwen2.5-Omni thinker", ("Qwen/Qwen2.5-Omni-7B",), since=5),
    "Qwen3OmniMoeThinkerForConditionalGeneration": Tested(
        "Qwen3-Omni thinker", ("Qwen/Qwen3-Omni-30B-A3B-Instruct",), since=5
    ),
    "Glm4vForConditionalGeneration": Tested("GLM-4.1V", ("zai-org/GLM-4.1V-9B-Thinking",)),
    "Glm4vMoeForConditionalGeneration": Tested("GLM-4.5V", ("zai-org/GLM-4.5V",)),
    "Glm46VForConditionalGeneration": Tested("GLM-4.6V", decoders=("glm4v_text",)),
    "GlmOcrForConditionalGeneration": Tested("GLM-OCR"),
    "Ernie4_5_VLMoeForConditionalGeneration": Tested("ERNIE-4.5-VL", ("baidu/ERNIE-4.5-VL-28B-A3B-PT",)),
    "Exaone4_5_ForConditionalGeneration": Tested("EXAONE 4.5", decoders=("exaone4",)),
    "VideoLlama3ForConditionalGeneration": Tested(
        "VideoLLaMA 3", ("lkhl/VideoLLaMA3-2B-Image-HF",), decoders=("qwen2",)
    ),
    "HyperCLOVAXVisionV2ForConditionalGeneration": Tested("HyperCLOVA X Vision V2", decoders=("hyperclovax",)),
    "CohereCompassForConditionalGeneration": Tested("Cohere Compass"),
    "Lfm3VlForConditionalGeneration": Tested("LFM3-VL", note=_CONVOLUTIONS, decoders=("lfm2",)),
    "Gemma4ForConditionalGeneration": Tested("Gemma 4"),
    "MuseGlimmerForConditionalGeneration": Tested("Muse Glimmer"),
    "LlavaForConditionalGeneration": Tested(
        "LLaVA", ("llava-hf/llava-1.5-7b-hf",), decoders=("llama", "mistral", "qwen2")
    ),
    "LlavaNextForConditionalGeneration": Tested(
        "LLaVA-NeXT", ("llava-hf/llava-v1.6-mistral-7b-hf",), decoders=("mistral", "llama", "qwen2")
    ),
    "VipLlavaForConditionalGeneration": Tested("ViP-LLaVA", ("llava-hf/vip-llava-7b-hf",), decoders=("llama",)),
    "Mistral3ForConditionalGeneration": Tested(
        "Mistral 3", ("mistralai/Mistral-Small-3.1-24B-Instruct-2503",), decoders=("mistral", "ministral3")
    ),
    "AyaVisionForConditionalGeneration": Tested("Aya Vision", ("CohereLabs/aya-vision-8b",), decoders=("cohere2",)),
    "Cohere2VisionForConditionalGeneration": Tested(
        "Command A Vision", ("CohereLabs/command-a-vision-07-2025",), decoders=("cohere2",)
    ),
    "Gemma3ForConditionalGeneration": Tested(
        "Gemma 3", ("google/gemma-3-4b-it",), note="transformers gives it a mask of query x key length"
    ),
    "Lfm2VlForConditionalGeneration": Tested(
        "LFM2-VL", ("LiquidAI/LFM2-VL-1.6B",), since=5, note=_CONVOLUTIONS, decoders=("lfm2",)
    ),
    "Ovis2ForConditionalGeneration": Tested("Ovis2", ("thisisiron/Ovis2-2B-hf",), decoders=("qwen2",)),
    "AriaForConditionalGeneration": Tested("Aria", ("rhymes-ai/Aria",)),
    "DeepseekVLForConditionalGeneration": Tested(
        "DeepSeek-VL", ("deepseek-community/deepseek-vl-1.3b-chat",), decoders=("llama",)
    ),
    "GotOcr2ForConditionalGeneration": Tested("GOT-OCR2", ("stepfun-ai/GOT-OCR-2.0-hf",), decoders=("qwen2",)),
    "JanusForConditionalGeneration": Tested("Janus", ("deepseek-community/Janus-Pro-1B",), decoders=("llama",)),
    "QianfanOCRForConditionalGeneration": Tested("Qianfan-OCR", decoders=("qwen3",)),
    "LightOnOcrForConditionalGeneration": Tested("LightOnOCR", ("lightonai/LightOnOCR-1B-1025",), decoders=("qwen3",)),
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


def model_type_of(config: Any) -> str:
    """The model type of a multimodal config. Qwen's of transformers 4.57, once loaded, answer with their decoder's."""
    return getattr(type(config), "model_type", "") or config.model_type


def visual_token_ids(config: Any) -> dict[str, int]:
    """Ids of the visual tokens, as far as `config`, a multimodal model's, has them: "image" and "video", where features
    go, and "newline", which ends a row of a video frame (LLaVA-Video)."""
    ids = {modality: getattr(config, f"{modality}_token_id", None) for modality in ("image", "video")}
    ids["newline"] = getattr(config, "video_newline_token_index", None)
    if model_type_of(config) in VIDEO_AT_IMAGE_TOKENS:
        ids["video"] = ids["image"]
    return {modality: int(token) for modality, token in ids.items() if token is not None}


def check_decoder(base: transformers.PreTrainedModel) -> None:
    """Whether the gate fits the language model of `base`, a multimodal model.

    Raises:
        ValueError: its attention is more than softmax(QK)V, in a way that the gated attention does not know.

    Warns:
        UserWarning: no test compares this class with this decoder to a dense gate.
    """
    text: Any = base.language_model
    decoder = text.config.model_type
    if not text._supports_sdpa and decoder not in _DECODERS_BEYOND_SDPA:
        raise ValueError(
            f"{type(text).__name__} ({decoder}) needs more than softmax(QK)V in its attention, as transformers says by "
            f"_supports_sdpa = False: VideoAnchor cannot gate it; use a checkpoint with another decoder"
        )
    sparse = next((name for name, _ in text.named_modules() if name.endswith("indexer")), None)
    if sparse is not None:
        raise ValueError(
            f"{type(text).__name__} ({decoder}) attends to the keys that {sparse} picks: VideoAnchor cannot gate "
            f"sparse attention; use a checkpoint with another decoder"
        )
    if not _is_tested(model_type_of(base.config), decoder, own=_package(base) == _package(text)):
        warnings.warn(
            f"VideoAnchor was never compared with a dense gate on {type(base).__name__} with a decoder of type "
            f"{decoder!r}. See whether alpha_k = alpha_v = 0 gives what the plain model gives before you trust it; "
            f"`videoanchor info --backbones` lists what is tested.",
            stacklevel=3,
        )


def check_chunked_prefill(
    model: transformers.PreTrainedModel, base: transformers.PreTrainedModel, chunk_size: int
) -> None:
    """Whether transformers gives a prompt with visual features to `model`, with its multimodal part `base`, in chunks
    of `chunk_size` tokens and computes what it computes of the whole (compared on tiny models, 5.23).

    Raises:
        NotImplementedError: it does not, with or without a gate.
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError(
            f"chunked prefill (prefill_chunk_size) of a video: {type(model).__name__} of this transformers does not "
            "hand its features out by chunk; upgrade transformers, or leave prefill_chunk_size out"
        )
    language_model: Any = base.language_model
    text, kind, why = language_model.config, model_type_of(base.config), None
    if kind in VIDEO_AT_IMAGE_TOKENS:
        why = "drops its video"
    elif kind in _IN_BOTH_DIRECTIONS or getattr(text, "use_bidirectional_attention", None) == "vision":
        why = "hides the tokens of an image from each other that stand in different chunks"
    elif chunk_size == 1 and softmax_layers(text) < text.num_hidden_layers:
        why = "takes chunks of one token for decoding, and its layers without softmax take padding in"
    if why is not None:
        raise NotImplementedError(
            f"chunked prefill (prefill_chunk_size={chunk_size}) of a prompt with images or videos: transformers {why} "
            f"({kind}); leave prefill_chunk_size out"
        )


def softmax_layers(text_config: Any) -> int:
    """How many layers have attention with softmax, rather than linear attention or a convolution."""
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * text_config.num_hidden_layers
    return sum(kind.endswith("attention") and "linear" not in kind for kind in kinds)


def _is_tested(model_type: str, decoder: str, *, own: bool) -> bool:
    row = TESTED.get(_classes().get(model_type, ""))
    if row is None or _major() < row.since:
        return False
    return decoder in row.decoders if row.decoders else own


def _package(model: transformers.PreTrainedModel) -> str:
    return type(model).__module__.rpartition(".")[0]


def _major() -> int:
    return int(transformers.__version__.split(".")[0])


def _classes() -> dict[str, str]:
    """The generating class of each model type."""
    # transformers 4.57 has Video-LLaVA there
    further = getattr(modeling_auto, "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES", {})
    return {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **further}


def installed_backbones() -> list[InstalledBackbone]:
    """Every generating class of the installed transformers whose model has `get_placeholder_mask`, a `language_model`
    without an encoder of its own, and image or video tokens; those that the test suite runs on come first.

    The sources are read and the default configs made; no modeling code is imported.
    """
    found = []
    for model_type, model in _classes().items():
        if not _merges_into_a_language_model(model_type):
            continue
        config = CONFIG_MAPPING[model_type]()
        has_tokens = hasattr(config, "image_token_id") or hasattr(config, "video_token_id")
        if config.is_encoder_decoder or not has_tokens:
            continue
        row = TESTED.get(model)
        tested = row is not None and _major() >= row.since
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
