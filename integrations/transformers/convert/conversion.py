"""Checkpoints in the format of their own repositories, written again in transformers' format.

InternVL2 / 2.5 / 3 (`internvl_chat`) becomes InternVLForConditionalGeneration, LLaVA-Video (`llava_qwen`) becomes
LlavaOnevisionForConditionalGeneration: the same weights under other names. Reads safetensors only, never a pickle,
and runs no code of the checkpoint.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
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

_PLANS = {"internvl_chat": internvl.plan, "llava_qwen": llava.plan}
CONVERTED = frozenset(_PLANS)
"""The `model_type` of what can be converted."""


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
    _check_out(out, n_bytes)
    extra = plan.extra_tensors(_reader(shards))
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_weights(folder, plan, shards, extra, progress)
        for name, content in plan.files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(plan.chat_template, encoding="utf-8")
        plan.tokenizer.save(str(folder / "tokenizer.json"))
        _set_modes(folder)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    architecture = plan.files["config.json"]["architectures"][0]
    return ConvertedCheckpoint(out, plan.source, architecture, n_tensors, n_bytes, len(shards), plan.notes)


def _set_modes(folder: Path) -> None:
    """Those of any new file and folder: safetensors and mkdtemp let the owner alone read."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.iterdir():
        file.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)


def _plan(source: Path) -> Plan:
    if not (source / "config.json").is_file():
        raise InputError(
            f"{source}: no config.json there; give the folder of a checkpoint, downloaded for example with "
            "`hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B`"
        )
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{source / 'config.json'} is not a JSON object: download it again") from error
    if model_type not in _PLANS:
        raise InputError(
            f"{source}: model_type {model_type!r} is not one that is converted ({', '.join(_PLANS)}); a checkpoint in "
            "transformers' own format needs no conversion: pass it to `videoanchor run --model`"
        )
    try:
        return _PLANS[model_type](config, read_tokenizer(source))
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{source / 'config.json'}: no entry {error}, which the conversion needs") from error
    except (TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{source / 'config.json'} is not as expected ({error}): download it again") from error


def _shards(source: Path) -> dict[Path, list[str]]:
    """The safetensors files and the names of the tensors in each, in the order of the files."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{index} holds no weight_map: download it again") from error
        names = sorted(set(places.values()))
    elif (source / "model.safetensors").is_file():
        places, names = {}, ["model.safetensors"]
    elif any(source.glob("*.bin")) or any(source.glob("*.pt*")):
        raise InputError(
            f"{source} holds pickled weights (.bin, .pt), which can run code when they are opened and are not read: "
            "get the safetensors version of the checkpoint"
        )
    else:
        raise InputError(
            f"{source}: no model.safetensors and no model.safetensors.index.json: the download is not whole"
        )
    shards: dict[Path, list[str]] = {}
    for name in names:
        path = source / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{index} lists {name}, which is not in {source}: the download is not whole")
        with _open(path) as file:
            shards[path] = sorted(file.keys())
    absent = places.keys() - {key for keys in shards.values() for key in keys}
    if absent:
        raise InputError(f"{index} lists tensors that no shard holds ({_some(absent)}): download the checkpoint again")
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): the file is damaged or cut short, download it again"
        ) from error


def _reader(shards: dict[Path, list[str]]) -> Callable[[str], torch.Tensor]:
    def read(key: str) -> torch.Tensor:
        path = next(path for path, keys in shards.items() if key in keys)
        with _open(path) as file:
            return file.get_tensor(key)

    return read


def _check(plan: Plan, shards: dict[Path, list[str]]) -> tuple[int, int]:
    """Converts the shapes alone and compares them with the class that will load them. Returns tensors and bytes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    options = deepcopy(plan.files["config.json"])  # transformers 5 writes into what it gets
    try:
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"transformers builds no model from this config.json: {error}") from error
    expected = {_spelling(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in plan.tied:
        expected.pop(name, None)
    found: dict[str, tuple[int, ...]] = {}
    n_bytes = 0
    for path, keys in shards.items():
        with _open(path) as file:
            for key in keys:
                part = file.get_slice(key)
                shape, size = tuple(part.get_shape()), _BYTES.get(part.get_dtype())
                if size is None:
                    raise InputError(f"{path}: {key} is stored as {part.get_dtype()}; expected F32, F16 or BF16")
                for name, tensor in _converted(plan, key, torch.empty(shape, device="meta")):
                    found[_spelling(name)] = tuple(tensor.shape)
                    n_bytes += tensor.numel() * size
    if missing := expected.keys() - found.keys():
        raise InputError(f"the checkpoint lacks {len(missing)} of {len(expected)} tensors ({_some(missing)})")
    if extra := found.keys() - expected.keys():
        raise InputError(f"the checkpoint holds {len(extra)} tensors that its config has no place for ({_some(extra)})")
    for name, shape in expected.items():
        if found[name] != shape:
            raise InputError(f"{name}: config.json asks for shape {shape}, the checkpoint holds {found[name]}")
    return len(found), n_bytes


_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def _spelling(name: str) -> str:
    """transformers 5 leaves the level `vision_model` out; both read the name of 4.57, which is written."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _converted(plan: Plan, key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from plan.rename(key, tensor)
    except RuntimeError as error:  # a fused tensor that does not split
        raise InputError(f"{key}: shape {tuple(tensor.shape)} does not fit config.json") from error


def _check_out(out: Path, n_bytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: there is something already; give a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes:
        raise InputError(f"--out {out}: {n_bytes / 2**30:.1f} GiB to write and {free / 2**30:.1f} GiB free")


def _write_weights(
    folder: Path,
    plan: Plan,
    shards: dict[Path, list[str]],
    extra: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    progress: Progress | None,
) -> None:
    places: dict[str, str] = {}
    total = 0
    for number, (path, keys) in enumerate(shards.items(), start=1):
        if progress is not None:
            progress("weights", number - 1, len(shards))
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with _open(path) as file:
            for key in keys:
                for new, tensor in _converted(plan, key, file.get_tensor(key)):
                    tensors[new] = extra[new](tensor) if new in extra else tensor.contiguous()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
