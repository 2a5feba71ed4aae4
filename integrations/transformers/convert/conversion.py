"""Checkpoints in the format of their own repositories, written again in transformers' format.

InternVL2 / 2.5 / 3 (`internvl_chat`) becomes InternVLForConditionalGeneration, LLaVA-Video (`llava_qwen`) becomes
LlavaOnevisionForConditionalGeneration: the same weights under other names. Reads safetensors only, never a pickle,
and runs no code of the checkpoint.

transformers 5 can rename weights while it loads them (`conversion_mapping`), and 4.57.1 cannot. To load that way and
save again takes the memory of the whole checkpoint (1,458 MiB for 1,446, here 395, 5.23.0), and 4.57.1 reads the RoPE
base of the saved config as its default, without a word.
"""

import json
import secrets
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import InputError
from . import internvl, llava
from .plan import Plan
from .tokenizer import read_tokenizer

Progress = Callable[[str, int, int], None]
Shards = dict[Path, dict[str, torch.Tensor]]

_PLANS = {"internvl_chat": internvl.plan, "llava_qwen": llava.plan}
CONVERTED = frozenset(_PLANS)
"""The `model_type` of what can be converted."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WRONG = (TypeError, AttributeError, ValueError, LookupError, ZeroDivisionError, RuntimeError)  # config.json's entries


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What `convert_checkpoint` wrote.

    Args:
        source: kind of checkpoint that was read, such as "internvl_chat (InternLM2ForCausalLM)".
        architecture: the transformers class that loads `out`.
        n_tensors, n_bytes, n_shards: of the weights written.
        notes: what differs from the original, one sentence each.
    """

    out: Path
    source: str
    architecture: str
    n_tensors: int
    n_bytes: int
    n_shards: int
    notes: tuple[str, ...]


def convert_checkpoint(source: Path, out: Path, *, progress: Progress | None = None) -> ConvertedCheckpoint:
    """Writes the checkpoint in folder `source` to folder `out` in transformers' format.

    Every weight is checked by name and shape against the transformers class before the first is written. Weights pass
    through memory one shard at a time. `out` appears when all of it is written, and not at all if anything fails.

    Args:
        source: folder with config.json, the tokenizer's files and safetensors weights (one file, or shards and
            `model.safetensors.index.json`).
        out: folder that does not exist yet, or an empty one.
        progress: called with ("weights", shards done, shards in all).

    Raises:
        InputError: when `source` is not a checkpoint that can be converted, with the reason, or `out` holds anything.
    """
    plan = _plan(source)
    shards = _shards(source)
    n_tensors, n_bytes = _check(plan, shards)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: there is something already; give a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < n_bytes:
        raise InputError(f"--out {out}: {n_bytes / 2**30:.1f} GiB to write and {free / 2**30:.1f} GiB free")
    folder = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    folder.mkdir()
    try:
        for name, content in plan.files.items():
            _write_text(folder / name, content)
        places = _write_weights(folder, plan, shards, progress)
        if len(shards) > 1:
            index = {"metadata": {"total_size": n_bytes}, "weight_map": places}
            _write_text(folder / "model.safetensors.index.json", index)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    architecture = plan.files["config.json"]["architectures"][0]
    return ConvertedCheckpoint(out, plan.source, architecture, n_tensors, n_bytes, len(shards), plan.notes)


def _plan(source: Path) -> Plan:
    if not (source / "config.json").is_file():
        raise InputError(
            f"{source}: no config.json there; give the folder of a checkpoint, downloaded for example with "
            "`hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B`"
        )
    config = _json(source / "config.json")
    model_type = config.get("model_type")
    if model_type not in _PLANS:
        raise InputError(
            f"{source}: model_type {model_type!r} is not one that is converted ({', '.join(_PLANS)}); a checkpoint in "
            "transformers' own format needs no conversion: pass it to `videoanchor run --model`"
        )
    tokenizer = read_tokenizer(source, _json(source / "tokenizer_config.json"), _json(source / "added_tokens.json"))
    try:
        return _PLANS[model_type](config, tokenizer)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{source / 'config.json'}: no entry {error}, which the conversion needs") from error
    except _WRONG as error:
        raise InputError(f"{source / 'config.json'} is not as expected ({error}): download it again") from error


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object: download it again")
    return content


def _shards(source: Path) -> Shards:
    """The safetensors files in order, and the tensors of each without their data."""
    index, places, names = source / "model.safetensors.index.json", {}, ["model.safetensors"]
    if index.is_file():
        places = _json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InputError(f"{index} holds no weight_map: download it again")
        names = sorted(set(places.values()))
    elif not (source / "model.safetensors").is_file():
        if any(source.glob("*.bin")) or any(source.glob("*.pt*")):
            raise InputError(
                f"{source} holds pickled weights (.bin, .pt), which can run code when they are opened and are not "
                "read: get the safetensors version of the checkpoint"
            )
        raise InputError(
            f"{source}: no model.safetensors and no model.safetensors.index.json: the download is not whole"
        )
    shards: Shards = {}
    for path in (source / name for name in names):
        if path.parent != source or not path.is_file():
            raise InputError(f"{index} lists {path.name}, which is not in {source}: the download is not whole")
        with _open(path) as file:
            shards[path] = {key: _without_data(path, key, file.get_slice(key)) for key in sorted(file.keys())}
    if absent := places.keys() - {key for tensors in shards.values() for key in tensors}:
        raise InputError(f"{index} lists tensors that no shard holds ({_some(absent)}): download the checkpoint again")
    return shards


def _without_data(path: Path, key: str, part: Any) -> torch.Tensor:
    if part.get_dtype() not in _DTYPES:
        raise InputError(f"{path}: {key} is stored as {part.get_dtype()}; expected {', '.join(_DTYPES)}")
    return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): the file is damaged or cut short, download it again"
        ) from error


def _check(plan: Plan, shards: Shards) -> tuple[int, int]:
    """Converts the shapes alone and compares them with the class that will load them. Returns tensors and bytes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    options = deepcopy(plan.files["config.json"])  # transformers 5 writes into what it gets
    try:
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except _WRONG as error:
        raise InputError(f"transformers builds no model from this config.json: {error}") from error
    expected = {_spelling(name): tensor.shape for name, tensor in model.state_dict().items()}
    if options["tie_word_embeddings"]:
        expected.pop("lm_head.weight", None)
    found: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for key, tensor in (item for tensors in shards.values() for item in tensors.items()):
        new = {_spelling(name): converted for name, converted in plan.convert(key, tensor).items()}
        if new.keys() - expected.keys() or new.keys() & found.keys():
            unknown.append(key)
        found |= new
    if unknown:
        raise InputError(
            f"the checkpoint holds {len(unknown)} tensors that its config has no place for ({_some(unknown)})"
        )
    if missing := expected.keys() - found.keys():
        raise InputError(f"the checkpoint lacks {len(missing)} of {len(expected)} tensors ({_some(missing)})")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise InputError(
                f"{name}: config.json asks for shape {tuple(shape)}, the checkpoint holds {tuple(found[name].shape)}"
            )
    return len(found), sum(tensor.nbytes for tensor in found.values())


def _spelling(name: str) -> str:
    """transformers 5 leaves the level `vision_model` out; both read the name of 4.57, which is written."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _write_text(path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _write_weights(folder: Path, plan: Plan, shards: Shards, progress: Progress | None) -> dict[str, str]:
    """Writes a file a shard; returns the file of each tensor."""
    places: dict[str, str] = {}
    for number, (path, keys) in enumerate(shards.items(), start=1):
        if progress is not None:
            progress("weights", number - 1, len(shards))
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with _open(path) as file:
            for key in keys:
                converted = plan.convert(key, file.get_tensor(key))
                tensors |= {new: tensor.contiguous() for new, tensor in converted.items()}
        for new in tensors.keys() & plan.rows.keys():
            row, key = plan.rows[new]
            with _open(next(path for path, keys in shards.items() if key in keys)) as file:
                tensors[new][row] = file.get_tensor(key)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # safetensors lets the owner alone read
        places |= dict.fromkeys(tensors, name)
    return places
