"""What a checkpoint tells before its weights are loaded: config, processor, size, and where it would run."""

import json
import re
import shlex
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoProcessor,
    PretrainedConfig,
)
from transformers.utils.hub import cached_file

from ..integrations.errors import InputError
from ..integrations.transformers.convert.conversion import CONVERTED
from .machine import devices_of

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F4": 4}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OWN_CODE = "needs Python code of its own repository, which is never run: give a checkpoint in transformers' own format"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def check_dtype(dtype: str) -> None:
    """
    Raises:
        InputError: `dtype` is neither "auto" nor the name of a floating-point torch dtype.
    """
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise InputError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")


def check_splits(name_or_path: str, n: int, device: str = "auto") -> None:
    """Refuses a model that transformers cannot split among `n` processes, each with a GPU of its own or all on the CPU.

    Raises:
        InputError: there are fewer GPUs, one GPU is asked for, or the model has no plan or heads that `n` does not
            divide.
    """
    if device.startswith("cuda:"):
        raise InputError(f"device {device} and tensor parallel {n}: choose the GPUs by CUDA_VISIBLE_DEVICES instead")
    n_gpus = torch.cuda.device_count()
    if devices_of(device)[0].type == "cuda" and n > n_gpus:
        raise InputError(f"tensor parallel {n}: each process needs a GPU of its own, and {n_gpus} are visible")
    config = read_config(name_or_path)
    text: Any = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise InputError(
            f"model {name_or_path} ({config.model_type}) cannot be split: transformers has no tensor-parallel plan for "
            f"{text.model_type}"
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, heads, None)
        if count is not None and count % n:
            raise InputError(f"tensor parallel {n}: expected a divisor of {heads} {count} of {name_or_path}")


def read_config(name_or_path: str) -> PretrainedConfig:
    """The config of a video language model. Code that comes with a checkpoint is never run.

    Raises:
        InputError: there is no such checkpoint; it cannot be read, needs code of its own, or is of a model without
            visual tokens.
    """
    _check_format(name_or_path, _stored_config(name_or_path))
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise cannot_load(name_or_path, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"model {name_or_path} ({config.model_type}) has no visual tokens: give a checkpoint that takes video, "
            "in transformers' own format, such as Qwen2.5-VL, InternVL (-hf) or LLaVA-OneVision (-hf)"
        )
    return config


def revision_of(name_or_path: str) -> str | None:
    """The commit of a repository of the hub that is loaded here; None for a folder of one's own."""
    parts = _config_path(name_or_path).absolute().parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def _config_path(name_or_path: str) -> Path:
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder / "config.json"
    if folder.exists():
        raise InputError(f"model {name_or_path} is a file: give the folder of a checkpoint")
    if not _HUB_NAME.fullmatch(name_or_path):
        raise InputError(f"model {name_or_path}: no such folder, and the hub has no names like this: check the path")
    try:
        return Path(str(cached_file(name_or_path, "config.json")))
    except OSError as error:
        raise InputError(f"model {name_or_path}: {_why_not_there(name_or_path, error)}") from error


def _stored_config(name_or_path: str) -> dict[str, Any]:
    """What config.json holds."""
    path = _config_path(name_or_path)
    if not path.is_file():
        raise InputError(f"model {name_or_path}: no config.json in this folder: give the folder of a checkpoint")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"model {name_or_path}: config.json is no JSON object: get it again") from error


def _why_not_there(name: str, error: OSError) -> str:
    cause = error.__cause__
    if isinstance(cause, GatedRepoError):
        return f"access has to be asked for at https://huggingface.co/{name}, then log in with `hf auth login`"
    if isinstance(cause, RepositoryNotFoundError):
        return "no such folder here, and no such name on the hub (where it is private: `hf auth login`)"
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return "this repository of the hub has no config.json"
    if isinstance(cause, LocalEntryNotFoundError | HfHubHTTPError):
        return (
            "no such folder here, not downloaded before, and the hub cannot be reached: check the path or the network"
        )
    return first_line(error)


def _check_format(name_or_path: str, stored: dict[str, Any]) -> None:
    kind = stored.get("model_type")
    if kind in CONVERTED:
        folder = name_or_path.rstrip("/") if Path(name_or_path).is_dir() else Path(name_or_path).name
        first = "" if Path(name_or_path).is_dir() else f"hf download {name_or_path} --local-dir {folder} && "
        source, out = shlex.quote(folder), shlex.quote(f"{folder}-hf")
        raise InputError(
            f"model {name_or_path} ({kind}) is in a format of its own; write it in transformers' format, and give "
            f"that: {first}videoanchor convert {source} --out {out}"
        )
    if "auto_map" in stored and kind not in CONFIG_MAPPING:
        raise InputError(f"model {name_or_path} ({kind}) {_OWN_CODE}")
    if (Path(name_or_path) / "custom_generate").exists():  # transformers 4.57 runs it without asking
        raise InputError(
            f"model {name_or_path} has Python code of its own in custom_generate, which is never run: give a folder "
            "without that, for transformers' own way of generating"
        )
    if kernel := _kernel_of_the_hub(stored):
        raise InputError(f"model {name_or_path} asks for the attention {kernel}, code of the hub, which is never run")


def _kernel_of_the_hub(stored: Any) -> str | None:
    """What a config, or one within it, names as its attention, where that is a repository."""
    if not isinstance(stored, dict):
        return None
    for key, value in stored.items():
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            return value
        if kernel := _kernel_of_the_hub(value):
            return kernel
    return None


def cannot_load(name_or_path: str, error: BaseException) -> InputError:
    """The one line for what transformers has raised."""
    if "trust_remote_code" in str(error):
        return InputError(f"model {name_or_path} {_OWN_CODE}")
    return InputError(f"model {name_or_path} cannot be loaded: {first_line(error)}")


def read_processor(name_or_path: str) -> Any:
    """The processor of a video language model.

    Raises:
        InputError: it cannot be read, or has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise cannot_load(name_or_path, error) from error
    if not hasattr(processor, "apply_chat_template"):
        raise InputError(f"model {name_or_path} has no multimodal processor: expected one with a chat template")
    return processor


def weight_bytes(name_or_path: str, config: PretrainedConfig, dtype: str = "auto") -> int | None:
    """Bytes that the weights take once loaded, from the headers of the safetensors files; None where they cannot be
    read (another format, a name on the hub without a network).

    Args:
        dtype: of the loaded weights; "auto" is the config's, or else that of the file. Integers keep theirs.
    """
    try:
        counts = _parameter_counts(name_or_path)
    except (OSError, SafetensorError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    asked = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None)
    bits = {**_BITS, **{name: 8 * (asked or stored).itemsize for name, stored in _FLOATS.items()}}
    return sum(count * bits.get(stored, 8) for stored, count in counts.items()) // 8  # 8 bits: the kinds of float8


def _parameter_counts(name_or_path: str) -> dict[str, int]:
    """Parameters by safetensors' name of their dtype."""
    index = cached_file(name_or_path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else ["model.safetensors"]
    if Path(name_or_path).is_dir():
        files: list[Any] = [Path(name_or_path) / name for name in names]
    else:
        files = [try_to_load_from_cache(name_or_path, name) for name in names]
        if not all(isinstance(file, str) for file in files):
            return {str(key): n for key, n in get_safetensors_metadata(name_or_path).parameter_count.items()}
    counts: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_slice(key)
                counts[tensor.get_dtype()] = counts.get(tensor.get_dtype(), 0) + prod(tensor.get_shape())
    return counts
