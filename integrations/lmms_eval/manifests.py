"""What lmms-eval reads at every start, by the entry point of group `lmms_eval.models`: names only, nothing heavy."""

from typing import Any

_FOLDER = __name__.rpartition(".")[0]
_CLASS_PATHS = {
    "qwen2_5_vl_videoanchor": f"{_FOLDER}.qwen2_5_vl.Qwen25VLVideoAnchor",
    "internvl_videoanchor": f"{_FOLDER}.internvl.InternVLVideoAnchor",
    "llava_onevision_videoanchor": f"{_FOLDER}.llava_onevision.LlavaOnevisionVideoAnchor",
}


def manifests() -> list[Any]:
    """The `ModelManifest` of each model, for `lmms-eval --model`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    named = ((name, path, f"videoanchor_{name.removesuffix('_videoanchor')}") for name, path in _CLASS_PATHS.items())
    return [ModelManifest(model_id=name, chat_class_path=path, aliases=(other,)) for name, path, other in named]
