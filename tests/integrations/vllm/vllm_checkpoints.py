"""Tiny random checkpoints of the other backbones, with processors, as vLLM and transformers load them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from videoanchor_triton.app import demo

hf: Any = transformers  # whose constructors take more than their signatures say
TAGS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "image_token": "<image>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<{{ part['type'] }}>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SIDE = 28  # of a frame that goes into the towers of InternVL and LLaVA
CLIP_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 7,
}


def _tokenizer() -> Any:
    tokenizer = demo._make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS.values())})
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=TAGS,
    )


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **{"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad},
        **more,
    }


def _save(model_class: Any, config: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                gain = 2.0 if "lm_head" in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)


def _as_published(folder: Path) -> None:
    """LLaVA's checkpoints on the hub have a level in the names of their towers that transformers 5 leaves out."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    renamed = {name if inner in name else name.replace(tower, inner): weight for name, weight in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"vision_{which}_token_id": f"vision_{which}" for which in ("start", "end")}
    return {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def qwen2_vl(folder: Path) -> None:
    tokenizer = demo._make_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = hf.Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope), vision_config=vision, **_qwen_ids(tokenizer)
    )
    _save(hf.Qwen2VLForConditionalGeneration, config, folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 128 * 48 * 28 * 28}
    hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=size),
        chat_template=demo.CHAT_TEMPLATE,
    ).save_pretrained(folder)


def qwen3_vl(folder: Path) -> None:
    """With deepstack: the tower's output has further levels beside the embedding."""
    tokenizer = demo._make_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision = {
        **{"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 16},
        **{"out_hidden_size": 128, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]},
    }
    text = _text(tokenizer, head_dim=32, rope_parameters=rope)
    _save(
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer)),
        folder,
    )
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 128 * 48 * 32 * 32}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # vLLM takes the images' also for videos
    hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size, patch_size=16, **half),
        tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(size=size, patch_size=16, **half),
        chat_template=demo.CHAT_TEMPLATE,
    ).save_pretrained(folder)


def internvl(folder: Path) -> None:
    tokenizer = _tokenizer()
    vision = {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": [SIDE, SIDE], "patch_size": [7, 7]},
    }
    config = hf.InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    _save(hf.InternVLForConditionalGeneration, config, folder)
    size = {"height": SIDE, "width": SIDE}
    hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
    ).save_pretrained(folder)


def llava_onevision(folder: Path) -> None:
    tokenizer = _tokenizer()
    config = hf.LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config={"model_type": "siglip_vision_model", **CLIP_VISION, "vision_use_head": False},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[SIDE, SIDE]],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    _save(hf.LlavaOnevisionForConditionalGeneration, config, folder)
    _as_published(folder)
    size = {"height": SIDE, "width": SIDE}
    hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def llava_next_video(folder: Path) -> None:
    tokenizer, side, patch = _tokenizer(), 36, 6  # vLLM divides by side // patch^2
    config = hf.LlavaNextVideoConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config={"model_type": "clip_vision_model", **CLIP_VISION, "image_size": side, "patch_size": patch},
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[side, side]],
        spatial_pool_stride=2,
        spatial_pool_mode="average",
        image_seq_length=36,
        video_seq_length=9,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    _save(hf.LlavaNextVideoForConditionalGeneration, config, folder)
    _as_published(folder)
    size = {"height": side, "width": side}
    hf.LlavaNextVideoProcessor(
        image_processor=hf.LlavaNextImageProcessor(size=size, crop_size=size, image_grid_pinpoints=[[side, side]]),
        tokenizer=tokenizer,
        video_processor=hf.LlavaNextVideoVideoProcessor(size=size, crop_size=size),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
