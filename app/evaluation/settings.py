"""Ways of answering the questions of an evaluation: the gate, with one thing changed at a time, and none."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from ...anchor.config import UNGATED, VideoAnchorConfig
from ...integrations.errors import InputError
from ..batch.worker import CONFIG_COLUMNS
from .questions import Question, digest

ABLATIONS = {
    "control": "permuted,uniform",
    "scorer": "ssc,kmeans,uniform",
    "score": "published,size,row_sum",
    "clusters": "8,16,24,32",
    "terms": "K,V,KV",
    "frames": "8,16,32",
    "keep": "0.5,0.25,0.1",
    "group": "ward,farthest,random",
    "merge": "counts,mean,drop",
}
"""What can be varied, and its usual values."""


@dataclass(frozen=True)
class Setting:
    """One way of answering.

    Args:
        name: how reports name it.
        config: the gate; alphas of 0 for none.
        max_frames: of each video.
        run: whatever else replies depend on: checkpoint, precision, sampling, length of the answer.
    """

    name: str
    config: VideoAnchorConfig
    max_frames: int
    run: tuple[tuple[str, str], ...] = ()

    def key(self, question: Question) -> str:
        """32 hexadecimal digits that differ where the reply may."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "memory_budget"}
        video = [question.video_name, question.fingerprint]
        prompt = question.prompt() if question.system is None else [question.system, question.prompt()]
        return digest(video, prompt, config, self.max_frames, self.run, version("videoanchor-triton"))

    def columns(self) -> dict[str, Any]:
        """What tells it from others in a table, named as in the results of a batch."""
        config = self.config.to_dict()
        run = {name: None if value == "None" else value for name, value in self.run}
        return {**run, "max_frames": self.max_frames, **{name: config[name] for name in CONFIG_COLUMNS}}

    def at(self, **strengths: float) -> "Setting":
        """The same with other strengths, which are its name."""
        name = ", ".join(f"{name} {str(float(value)).removesuffix('.0')}" for name, value in strengths.items())
        return replace(self, name=name, config=replace(self.config, **strengths))

    def baseline(self) -> "Setting":
        """The same frames and checkpoint with all alphas 0. Scores are uniform: without a gate nobody looks at them."""
        return replace(self, name=f"baseline, {self.max_frames} frames", config=UNGATED)


def sweep(setting: Setting, strengths: Mapping[str, Sequence[float]]) -> list[Setting]:
    """`setting` with each combination of strengths.

    Args:
        setting: what is varied.
        strengths: values by the name of the strength: "alpha_k", "alpha_v", "alpha_q".

    Returns:
        `setting` alone where no strength has several values; else no two alike, and none that has no gate.

    Raises:
        InputError: a strength is out of its range.
    """
    if all(len(values) == 1 for values in strengths.values()):
        return [setting]
    try:
        found = [
            setting.at(**dict(zip(strengths, point, strict=True))) for point in itertools.product(*strengths.values())
        ]
    except ValueError as error:
        raise InputError(str(error)) from error
    configs = {one.config: one for one in found}
    return [one for config, one in configs.items() if config.alpha_k or config.alpha_v or config.merges]


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
        for value in map(str.strip, (values or ABLATIONS[name]).split(",")):
            try:
                varied = _varied(replace(setting, name=f"{name} {value}"), name, value)
            except (ValueError, TypeError) as error:
                raise InputError(f"--ablate {text}: {value}: {error}") from error
            found.setdefault((varied.config, varied.max_frames), varied)
    return list(found.values())


def _varied(setting: Setting, name: str, value: str) -> Setting:
    changes: dict[str, Any]
    match name:
        case "control":
            if value not in ("permuted", "uniform"):
                raise ValueError("expected permuted or uniform")
            own = "cross_frame_permuted" if setting.config.looks_at_frames else "permuted"
            changes = {"scorer": "uniform", "score": "published"} if value == "uniform" else {"score": own}
        case "scorer":
            changes = {"scorer": value, "score": setting.config.score if value in ("ssc", "knn") else "published"}
        case "score":
            changes = {"scorer": "knn" if setting.config.scorer == "knn" else "ssc", "score": value}
        case "clusters":
            changes = {"n_clusters": value if value == "auto" else int(value)}
        case "keep":
            changes = {"keep": int(value) if value.isdigit() else float(value)}
        case "group" | "merge":
            if not setting.config.merges:
                raise ValueError("all visual tokens are kept: give --keep as well")
            changes = {name: value}
        case "terms":
            changes = _without_others(setting.config, value.upper())
        case _:
            if int(value) < 1:
                raise ValueError("expected 1 or more")
            return replace(setting, max_frames=int(value))
    return replace(setting, config=replace(setting.config, **changes))


def _without_others(config: VideoAnchorConfig, terms: str) -> dict[str, float]:
    """Strengths of 0 for all but `terms`."""
    if not terms or not {*terms} <= {*"QKV"}:
        raise ValueError("expected letters of Q, K and V")
    if not any(getattr(config, f"alpha_{term.lower()}") for term in terms):
        raise ValueError(f"the strength of {terms} is 0 in the setting that is varied")
    return {f"alpha_{term.lower()}": 0.0 for term in "QKV" if term not in terms}
