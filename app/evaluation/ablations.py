"""Settings of an evaluation with one thing changed at a time."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ...integrations.errors import InputError
from .evaluate import Setting


def ablations(setting: Setting, wanted: Iterable[str]) -> list[Setting]:
    """`setting` with one thing changed at a time, as in the ablations of the paper (arXiv 2509.25151).

    Args:
        setting: what is varied.
        wanted: texts NAME=VALUE,VALUE,... or NAME alone for its usual values; see `ABLATIONS`.

    Returns:
        `setting` first, then the others; no two alike.

    Raises:
        InputError: a name or a value is unknown, or the setting has nothing of that kind to vary.
    """
    found = {(setting.config, setting.max_frames): setting}
    for text in wanted:
        name, _, values = text.partition("=")
        if name not in ABLATIONS:
            raise InputError(f"--ablate {text}: expected one of {', '.join(ABLATIONS)}, got {name!r}")
        usual, vary = ABLATIONS[name]
        for value in (values or usual).split(","):
            try:
                varied = replace(vary(setting, value.strip()), name=f"{name} {value.strip()}")
            except (ValueError, TypeError) as error:
                raise InputError(f"--ablate {text}: {value.strip()}: {error}") from error
            found.setdefault((varied.config, varied.max_frames), varied)
    return list(found.values())


def _with_config(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, config=replace(setting.config, **changes))


def _with_terms(setting: Setting, letters: str) -> Setting:
    if not letters or not {*letters.upper()} <= {*"QKV"}:
        raise ValueError("expected letters of Q, K and V")
    config = setting.config
    off = {f"alpha_{term}": 0.0 for term in "qkv" if term.upper() not in letters.upper()}
    if not any(getattr(config, f"alpha_{term.lower()}") for term in letters):
        raise ValueError(f"the strength of {letters} is 0 in the setting that is varied")
    return replace(setting, config=replace(config, **off))


def _with_frames(setting: Setting, count: str) -> Setting:
    if int(count) < 1:
        raise ValueError("expected 1 or more")
    return replace(setting, max_frames=int(count))


def _with_scorer(setting: Setting, scorer: str) -> Setting:
    return _with_config(setting, scorer=scorer, score=setting.config.score if scorer == "ssc" else "published")


ABLATIONS: dict[str, tuple[str, Callable[[Setting, str], Setting]]] = {
    "scorer": ("ssc,kmeans,uniform", _with_scorer),
    "score": ("published,size,row_sum", lambda setting, value: _with_config(setting, scorer="ssc", score=value)),
    "clusters": (
        "8,16,24,32",
        lambda setting, value: _with_config(setting, n_clusters=value if value == "auto" else int(value)),
    ),
    "terms": ("K,V,KV", _with_terms),
    "frames": ("8,16,32", _with_frames),
}
"""What can be varied: its usual values, and how."""
