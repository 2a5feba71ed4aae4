"""A Qwen2.5-VL of 1.1 million parameters with a vocabulary of the words of room scans, and its processor."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from videoanchor_triton.app.demo import CHAT_TEMPLATE, SPECIAL
from videoanchor_triton.app.evaluation.wording import VSI_BENCH, filled
from videoanchor_triton.app.room_scans import CELL, FPS, words

PATCH, MERGE = 8, 2
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "lm_head.weight")


def make_tokenizer() -> Any:
    """A word a token; a word that no room scan has is unknown."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    special = [f"<|{name}|>" for name in SPECIAL]
    asked = filled(VSI_BENCH["short"], "").lower().replace(".", " ").split()
    vocabulary = [*special, "<unk>", *words(), "user", "assistant", "system", *asked]
    ids = {word: n for n, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[?.]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=special,
        model_max_length=4096,
    )


def make_model(tokenizer: Any, hidden: int = 128, layers: int = 4) -> Any:
    """The model, randomly initialised from torch's generator."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 2,
        "hidden_size": hidden // 2,
        "intermediate_size": 3 * hidden // 2,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 1,
        "window_size": 128,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [0, 1],
        "tokens_per_second": FPS,
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():  # transformers' 0.02 is far too small for so narrow a model
        if "embed_tokens" in name:
            nn.init.normal_(weight)
        elif weight.ndim >= 2:
            gain = 0.3 if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
            nn.init.normal_(weight, 0, gain * weight[0].numel() ** -0.5)
    model.generation_config = hf.GenerationConfig(eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    return model


def make_processor(tokenizer: Any) -> Any:
    """Takes frames as they are: no resizing of what room scans show."""
    size = {"shortest_edge": 4 * CELL**2, "longest_edge": 4096 * CELL**2}
    shape = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 1, "size": size}
    return hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**shape),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(**shape),
        chat_template=CHAT_TEMPLATE,
    )


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes the checkpoint in bfloat16, in the form that transformers 4.57 and 5 both read."""
    model.to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        if rope := part.pop("rope_parameters", None):
            part["rope_theta"] = rope["rope_theta"]
            part["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["additional_special_tokens"] = words.pop("extra_special_tokens")
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=1) + "\n")
