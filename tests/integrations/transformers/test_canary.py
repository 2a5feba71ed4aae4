"""Names of transformers that the package uses and that its documentation does not promise. A release that moves one
fails here, by name. The list is complete: the package's own sources are searched for more."""

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import transformers
from transformers import DynamicCache, StaticCache

import videoanchor_triton
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

PACKAGE = Path(videoanchor_triton.__file__).parent
AREAS = ("integrations", "app")

IMPORTED = {
    ("transformers.convert_slow_tokenizer", "Qwen2Converter"): "how text is split where a checkpoint has only its BPE",
    ("transformers.convert_slow_tokenizer", "generate_merges"): "merges of a SentencePiece model",
    ("transformers.convert_slow_tokenizer", "import_protobuf"): "the schema of a SentencePiece model",
    ("transformers.distributed.configuration_utils", "DistributedConfig"): "loading a part on each process",
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"): "vision towers under our name",
    ("transformers.masking_utils", "causal_mask_function"): "knowing a plain causal mask",
    ("transformers.masking_utils", "sdpa_mask"): "masks that are not plain",
    ("transformers.models.auto", "modeling_auto"): "the class of each model type",
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING"): "default token ids",
    ("transformers.models.auto.configuration_auto", "model_type_to_module_name"): "the source of each model type",
    ("transformers.utils", "import_utils"): "how lmms-eval's videos are read",
    ("transformers.utils", "logging"): "what is said once",
    ("transformers.utils.hub", "cached_file"): "headers of weights",
    ("transformers.video_utils", "VideoMetadata"): "the times of frames",
    ("transformers.video_utils", "load_video"): "lmms-eval's frames",
}
"""Imports from below the top of transformers, and what for."""

ATTRIBUTES = {
    "modeling_utils": "registration waits for this module to be imported",
    "modeling_utils.PreTrainedModel._supports_sdpa": "decoders whose attention is more than softmax(QK)V",
    "modeling_utils.PreTrainedModel.set_attn_implementation": "enable and disable",
    "configuration_utils.PretrainedConfig._attn_implementation": "the attention that a decoder runs",
    "configuration_utils.PretrainedConfig.sub_configs": "the name of the decoder's config in its model's",
    "models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "the class of each model type",
    "cache_utils.Cache.is_compileable": "static caches, whose length only the device knows",
    "cache_utils.Cache.get_seq_length": "how many positions are filled",
    "cache_utils.Cache.update": "caches that grow where the gate is off",
    "cache_utils.Cache.reset": "emptied caches",
    "cache_utils.Cache.crop": "shortened caches",
    "cache_utils.Cache.reorder_cache": "rows of scores",
    "cache_utils.Cache.batch_select_indices": "rows of scores",
    "cache_utils.Cache.batch_repeat_interleave": "rows of scores",
}
"""Attributes below `transformers`, and what for."""

if tiny.V5:  # merged tokens need them, and 5's way of encoding pixels
    ATTRIBUTES |= {
        "GenerationMixin._expand_inputs_for_generation": "where a prompt is cut (keep)",
        "GenerationMixin._prepare_generated_length": "lengths of the prompt as it was given (keep)",
        "GenerationMixin._prepare_position_ids_for_generation": "positions of a second turn (keep)",
    }

PRIVATE = {"_attn_implementation", "_device_mesh", "_supports_sdpa"}
OF_TORCH = {"_modules"}
OF_VLLM = {"_k_scale", "_v_scale"}
OF_ARGPARSE = {"_AppendAction", "_SubParsersAction", "_actions"}


def trees() -> Iterator[ast.AST]:
    for path in (path for area in AREAS for path in (PACKAGE / area).resolve().rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("module", "name"), IMPORTED, ids=".".join)
def test_imported_name_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), IMPORTED[module, name]


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attribute_is_there(path: str) -> None:
    parent, _, name = path.rpartition(".")
    here: Any = importlib.import_module("transformers")
    for part in filter(None, parent.split(".")):
        here = getattr(here, part)
    assert hasattr(here, name) or name in getattr(here, "__annotations__", {}), ATTRIBUTES[path]


def test_every_import_is_listed() -> None:
    found = {
        (node.module, name.name)
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("transformers.")
        for name in node.names
    }
    assert found == set(IMPORTED)


def test_every_private_attribute_is_listed() -> None:
    """Attributes with an underscore that the package does not define itself."""
    used, own = set(), set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            (used if isinstance(node.ctx, ast.Load) else own).add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            used |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    private = {name for name in used - own if isinstance(name, str) and name[:1] == "_" and name[:2] != "__"}
    assert private - {"_exit", "_replace", "_asdict"} == PRIVATE | OF_TORCH | OF_VLLM | OF_ARGPARSE


def test_private_attributes_are_where_they_were() -> None:
    model = transformers.PreTrainedModel
    found = hasattr(model, "_device_mesh") or "_device_mesh" in inspect.getsource(sys.modules[model.__module__])
    assert found, "the processes of tensor parallelism"
    assert all(hasattr(argparse, name) or hasattr(argparse.ArgumentParser(), name) for name in OF_ARGPARSE)
    assert PRIVATE - {"_device_mesh"} <= {path.rpartition(".")[2] for path in ATTRIBUTES}


def test_caches_have_layers() -> None:
    config = transformers.Qwen2Config(
        num_hidden_layers=2, sliding_window=4, use_sliding_window=True, max_window_layers=1
    )
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        layers: list[Any] = cache.layers
        assert [layer.is_sliding for layer in layers] == [False, True]


@pytest.mark.parametrize("name", tiny.BACKBONES)
def test_multimodal_models_have_what_enable_looks_for(name: str) -> None:
    with torch.device("meta"):
        base: Any = find_multimodal_model(tiny.build(name))
    for method in ("get_placeholder_mask", "get_image_features"):
        assert callable(getattr(base, method)), method
    source = inspect.getsource(type(base))
    assert "def get_placeholder_mask(" in source
    assert "self.language_model = " in source
    if tiny.V5:
        assert "mm_encoder_outputs" in inspect.signature(base.forward).parameters, "features made before the prefill"


def test_what_a_mask_function_is_given() -> None:
    names = inspect.signature(importlib.import_module("transformers.masking_utils").sdpa_mask).parameters
    queries = {"q_length", "q_offset", "device"} if tiny.V5 else {"cache_position"}
    assert queries | {"batch_size", "kv_length", "mask_function", "attention_mask", "local_size"} <= set(names)
    assert "allow_is_causal_skip" in names


@pytest.mark.skipif(not tiny.V5, reason="4.57 returns features bare")
def test_features_come_as_pooler_output() -> None:
    model = tiny.build("internvl")
    with torch.no_grad():
        output = model.model.get_image_features(pixel_values=tiny.inputs("internvl", [["V"]])["pixel_values"])
    assert output["pooler_output"].ndim == 3
