"""The settings of `VideoAnchorConfig` among the arguments of `lmms-eval --model_args`."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...anchor.config import VideoAnchorConfig

_NAMES = frozenset(field.name for field in fields(VideoAnchorConfig))


def split_settings(arguments: Mapping[str, Any]) -> tuple[VideoAnchorConfig, dict[str, Any]]:
    """Takes the fields of `VideoAnchorConfig`, `preset` and `reproduce` out of the arguments of a model.

    Args:
        arguments: as lmms-eval parses `name=value,...`: bool, int, float or str. The word "none" stands for None.

    Returns:
        the settings; the arguments that are left, for lmms-eval's class.

    Raises:
        ValueError: alpha_k and alpha_v are not given and no preset either, or a setting is out of its range.
        TypeError: a setting is of the wrong type.
    """
    rest = dict(arguments)
    preset, reproduce = rest.pop("preset", None), rest.pop("reproduce", False)
    given: dict[str, Any] = {name: rest.pop(name) for name in arguments if name in _NAMES}
    given |= {name: None for name, value in given.items() if str(value).lower() == "none"}
    if preset is None and not {"alpha_k", "alpha_v"} <= given.keys():
        raise ValueError(
            "the strength of the gate is not known for this model: give alpha_k and alpha_v (0 and 0 for "
            "the baseline), or preset=internvl2-8b"
        )
    if not isinstance(reproduce, bool):
        raise TypeError(f"reproduce: expected True or False, got {reproduce!r}")
    config = VideoAnchorConfig(**given) if preset is None else VideoAnchorConfig.preset(preset, **given)
    return config.reproduce() if reproduce else config, rest
