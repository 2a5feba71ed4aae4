"""What the conversion of one kind of checkpoint consists of, and what the kinds have in common."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import InputError
from .tokenizer import SourceTokenizer

Split = Callable[[torch.Tensor], dict[str, torch.Tensor]]

_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.position_ids)")
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "tie_word_embeddings"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class Plan:
    """The conversion of one checkpoint.

    Args:
        source: kind of checkpoint, for the report.
        files: what to write beside the weights, by name: text, or content for JSON.
        renames: pattern and replacement, each applied to a tensor's name with `re.sub` in this order, as transformers
            does with `key_mapping`.
        splits: by a part of the new name, what makes several tensors of one; its keys take the place of `*` in the
            name.
        rows: by new name, a row of the tensor and the source's tensor that is written there.
        notes: what differs from the original, one sentence each.
    """

    source: str
    files: dict[str, Any]
    renames: Mapping[str, str]
    splits: Mapping[str, Split]
    rows: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def convert(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that the tensor `key` becomes, by name: one, several of a fused one, none for a buffer.

        Raises:
            InputError: when a fused tensor does not split.
        """
        if _BUFFERS.fullmatch(key):
            return {}
        name = key
        for pattern, replacement in self.renames.items():
            name = re.sub(pattern, replacement, name)
        if name == "lm_head.weight" and self.files["config.json"]["tie_word_embeddings"]:
            return {}
        split = next((split for part, split in self.splits.items() if part in name), None)
        if split is None:
            return {name: tensor}
        try:
            return {name.replace("*", part): piece for part, piece in split(tensor).items()}
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{key}: shape {tuple(tensor.shape)} does not fit config.json") from error


def text_config(model_type: str, original: dict[str, Any]) -> dict[str, Any]:
    """The entries of a decoder's config that transformers' Llama, Qwen2 and Qwen3 take."""
    config = {key: original[key] for key in _TEXT_KEYS if original.get(key) is not None}
    scaling = config.get("rope_scaling")
    if scaling is not None and "type" in scaling:  # the older spelling
        config["rope_scaling"] = {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k != "type"}}
    return {"model_type": model_type, **config, "tie_word_embeddings": bool(config.get("tie_word_embeddings"))}


def require(entries: dict[str, Any], **known: Collection[Any]) -> None:
    """Refuses a config whose entries are there and not among the known ones.

    Raises:
        InputError: naming the entry.
    """
    for name, values in known.items():
        if name in entries and entries[name] not in values:
            raise InputError(
                f"config.json: {name} = {entries[name]!r} cannot be converted; known are {', '.join(map(repr, values))}"
            )


def checkpoint_files(
    family: str,
    config: dict[str, Any],
    tokenizer: SourceTokenizer,
    tokens: dict[str, str],
    template: str,
    size: int,
    mean: list[float],
    std: list[float],
    images: dict[str, Any],
    processor: dict[str, Any],
) -> dict[str, Any]:
    """The files beside the weights; what is a default of the class, in transformers 4.57 and 5, is left out.

    Args:
        family: what the names of the classes start with.
        tokens: named tokens that the processor asks the tokenizer for.
        size, mean, std: of images and frames, square, whose channels are normalised.
        images: settings of the image processor.
        processor: settings of the processor.
    """
    pixels = {"size": {"height": size, "width": size}, "image_mean": mean, "image_std": std}
    end, named = tokenizer.id_of("<|im_end|>"), {"processor_class": f"{family}Processor"}
    return {
        "config.json": {"architectures": [f"{family}ForConditionalGeneration"], **config},
        "generation_config.json": {"eos_token_id": end, "pad_token_id": end},
        "preprocessor_config.json": {**pixels, **images, **named},
        "video_preprocessor_config.json": {"video_processor_type": f"{family}VideoProcessor", **pixels, **named},
        "processor_config.json": {**processor, **named},
        "tokenizer_config.json": {**tokenizer.settings(), "extra_special_tokens": tokens, **named},
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        "chat_template.jinja": template,
    }


def chat_template(system: str, end: str, image: str) -> str:
    """ChatML in Jinja: a line `image` for each image and `<video>` for each video, the turns ended by `end`."""
    end = end.replace("\n", "\\n")
    return (
        "{% if messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\\n{system}{end}' }}}}"
        "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{{{{ '{image}\\n' }}}}"
        "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        f"{{% endif %}}{{{{ '{end}' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
