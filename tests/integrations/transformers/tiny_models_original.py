"""Tiny random checkpoints in their original layout, and how conversions of them are looked at."""

import json
from pathlib import Path
from typing import Any

import original_models as original
import original_tokenizers
import pytest
import torch
import transformers as hf

from videoanchor_triton.integrations.errors import InputError
from videoanchor_triton.integrations.transformers.convert.conversion import convert_checkpoint

SIZE = original.IMAGE


def internvl(folder: Path, config: dict[str, Any] | None = None, n_shards: int = 1) -> Any:
    """Writes a tiny InternVL2 as published and returns the model."""
    config = config or original.internvl_config()
    folder.mkdir(parents=True)
    model: Any = original.randomise(original.InternVLChat(config))
    state = model.state_dict()
    if config["llm_config"]["tie_word_embeddings"]:
        del state["language_model.lm_head.weight"]
    original.write_weights(folder, state, n_shards)
    original.write_json(folder / "config.json", config)
    if config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]:
        original_tokenizers.write_internlm2_tokenizer(folder)
    else:
        original_tokenizers.write_qwen2_tokenizer(folder, internvl=True)
    return model


def llava(folder: Path, config: dict[str, Any], n_shards: int = 1) -> Any:
    folder.mkdir(parents=True)
    model: Any = original.randomise(original.LlavaVideo(config, original.TOWER))
    original.write_weights(folder, model.original_state(), n_shards)
    original.write_json(folder / "config.json", config)
    original_tokenizers.write_qwen2_tokenizer(folder, internvl=False)
    return model


def load(folder: Path) -> Any:
    options = {"output_loading_info": True, "attn_implementation": "eager"}
    loaded: Any = hf.AutoModelForImageTextToText.from_pretrained(folder, **options)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def pixels(n: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def refused(source: Path, out: Path, match: str) -> None:
    """InputError, and nothing left where the output would have been."""
    before = set(out.parent.iterdir())
    with pytest.raises(InputError, match=match):
        convert_checkpoint(source, out)
    assert set(out.parent.iterdir()) == before


def edit(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text())
    content.update(entries)
    path.write_text(json.dumps(content))
