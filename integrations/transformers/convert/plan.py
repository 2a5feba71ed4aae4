"""What the conversion of one kind of checkpoint consists of."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Callable[[torch.Tensor], dict[str, torch.Tensor]]
Rule = tuple[str, str] | tuple[str, str, Split]
Patch = Callable[[torch.Tensor], torch.Tensor]

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
        rules: (pattern of the whole name, new name), or with a third entry that makes several tensors of one; its keys
            take the place of `*` in the new name. Names that no rule takes are unknown.
        files: JSON files to write, by name.
        tied: tensors of the class that are another under a second name, and are not written.
        notes: what differs from the original.
        patches: given a reader of the source's tensors, changes to make to tensors by new name.
    """

    source: str
    rules: tuple[Rule, ...]
    files: dict[str, Any]
    chat_template: str
    tokenizer: "Tokenizer"
    tied: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    patches: Callable[[Callable[[str], torch.Tensor]], dict[str, Patch]] | None = None

    def rename(self, key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensor or tensors that `key` becomes.

        Raises:
            InputError: when no rule takes `key`.
        """
        if _BUFFERS.fullmatch(key):
            return
        for pattern, template, *split in self.rules:
            if match := re.fullmatch(pattern, key):
                name = match.expand(template)
                if name in self.tied:
                    return
                if split:
                    for part, piece in split[0](tensor).items():
                        yield name.replace("*", part), piece
                else:
                    yield name, tensor
                return
        raise InputError(f"unknown tensor {key}: this is not the architecture that config.json names")

    def extra_tensors(self, read: Callable[[str], torch.Tensor]) -> dict[str, Patch]:
        """Changes to tensors by their new name, once the source can be read."""
        return {} if self.patches is None else self.patches(read)


def pixel_settings(size: int, mean: list[float], std: list[float], processor: str) -> dict[str, Any]:
    """What image and video processors do to pixels, ready for JSON: to `size` x `size`, bicubic, normalised."""
    return {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": True,
        "processor_class": processor,
    }


def text_config(model_type: str, original: dict[str, Any]) -> dict[str, Any]:
    """The entries of a decoder's config that transformers' Llama, Qwen2 and Qwen3 take."""
    config = {key: original[key] for key in _TEXT_KEYS if original.get(key) is not None}
    scaling = config.get("rope_scaling")
    if scaling is not None and "type" in scaling:  # the older spelling
        config["rope_scaling"] = {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k != "type"}}
    return {"model_type": model_type, **config, "tie_word_embeddings": bool(config.get("tie_word_embeddings"))}


def require(entries: dict[str, Any], **expected: Any) -> None:
    """Refuses a config whose entries are there and not as expected.

    Raises:
        InputError: naming the entry.
    """
    for name, value in expected.items():
        if entries.get(name, value) != value:
            raise InputError(
                f"config.json: {name} = {entries[name]!r} cannot be converted: transformers' class has {value!r} only"
            )
