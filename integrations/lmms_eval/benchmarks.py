"""lmms-eval's own tasks for video benchmarks with standard errors by video: data, prompts and scores are its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import lmms_eval.tasks  # pyright: ignore[reportMissingImports]
from lmms_eval.api.task import ConfigurableMessagesTask  # pyright: ignore[reportMissingImports]
from lmms_eval.utils import load_yaml_config  # pyright: ignore[reportMissingImports]

from .standard_errors import Parts, metric_list

Doc = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What lmms-eval's standard errors need to know of a benchmark.

    Args:
        metrics: lmms-eval's metrics by name: of which parts, and these of which types, each is the mean of means; None
            for the mean over all questions.
        score: from the question after lmms-eval has scored it, and what it returned, the score in [0, 1].
        kind: of a question, its type as in `metrics`.
        video: of a question, what names its video; None where the data does not say.
        scales: of metrics that are not in [0, 1].
    """

    metrics: Mapping[str, Parts | None]
    score: Callable[[Doc, Doc], float]
    kind: Callable[[Doc], str]
    video: Callable[[Doc], str] | None
    scales: Mapping[str, float] = field(default_factory=dict)


def _first(*names: str) -> Callable[[Doc, Doc], float]:
    return lambda doc, _: next(float(doc[name]) for name in names if name in doc)


def _each(names: Sequence[str]) -> Parts:
    return [(name,) for name in names]


def _vsibench() -> Benchmark:
    direction = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]
    choices = ("obj_appearance_order", "object_rel_distance", "route_planning")
    numbers = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
    metrics: dict[str, Parts | None] = {"vsibench_overall": [*_each([*choices, *numbers]), direction]}
    metrics |= {f"{name}_accuracy": [(name,)] for name in choices} | {f"{name}_mra": [(name,)] for name in numbers}
    metrics["object_rel_direction_accuracy"] = [direction]
    return Benchmark(
        metrics,
        _first("accuracy", "MRA:.5:.95:.05"),
        kind=lambda doc: doc["question_type"],
        video=lambda doc: f"{doc['dataset']}/{doc['scene_name']}",
    )


def _revsi() -> Benchmark:
    own = import_module("lmms_eval.tasks.revsi.utils")
    several = {kind for kinds in own.COMPOSITE_METRICS.values() for kind in kinds}
    alone = [kind for kind in (*own.MCQ_QUESTION_TYPES, *own.NQ_QUESTION_TYPES) if kind not in several]
    metrics: dict[str, Parts | None] = {"overall_acc": [*own.COMPOSITE_METRICS.values(), *_each(alone)]}
    metrics |= {name: [kinds] for name, kinds in own.COMPOSITE_METRICS.items()}
    metrics |= {f"{name}_acc": [(name,)] for name in alone}
    return Benchmark(metrics, _first("acc"), kind=lambda doc: doc["question_type"], video=lambda doc: doc["scene_id"])


def _sparbench() -> Benchmark:
    own = import_module("lmms_eval.tasks.sparbench.utils")
    choices, numbers, special = own.MCA_QUESTION_TYPES, own.NA_QUESTION_TYPES, own.SPECIAL_QUESTION_TYPES
    middle = [kind for kind in own.Middle if kind not in special]  # lmms-eval leaves it out
    metrics: dict[str, Parts | None] = {"sparbench_score": _each([*choices, *numbers, *special])}
    metrics |= {f"{name}_accuracy": [(name,)] for name in choices} | {name: [(name,)] for name in numbers}
    metrics |= {f"{name}_vci_metric": [(name,)] for name in special}
    metrics |= {"high": _each(own.High), "middle": _each(middle), "low": _each(own.Low)}
    score = _first("accuracy", "MRA:.5:.95:.05", "vci_metric")
    return Benchmark(metrics, score, lambda doc: doc["task"], video=None, scales={"sparbench_score": 100})


def _videomme() -> Benchmark:
    name = "videomme_perception_score"
    return Benchmark(
        {name: None},
        score=lambda _, found: found[name]["score"],
        kind=lambda doc: doc["task_type"],
        video=lambda doc: doc["videoID"],
        scales={name: 100},
    )


def _mmsi_video() -> Benchmark:
    own = import_module("lmms_eval.tasks.mmsi_video.utils")
    metrics: dict[str, Parts | None] = {"overall_accuracy": None}
    metrics |= {name: [(name,)] for name in dict.fromkeys(own.CATEGORY_TO_METRIC.values())}
    return Benchmark(
        metrics,
        score=lambda _, found: found["overall_accuracy"]["score"],
        kind=lambda doc: own.CATEGORY_TO_METRIC.get(doc.get("type", doc.get("question_type", "")), "other"),
        video=lambda doc: "+".join(sorted(one["path"] for one in doc["video_list"])),
        scales=dict.fromkeys(metrics, 100),
    )


_BENCHMARKS = {
    "vsibench": _vsibench,
    "revsi": _revsi,
    "sparbench": _sparbench,
    "videomme": _videomme,
    "mmsi_video": _mmsi_video,
}


@cache
def benchmark(name: str) -> Benchmark:
    """Of the folder of lmms-eval's tasks with this name."""
    return _BENCHMARKS[name]()


class ByVideo(ConfigurableMessagesTask):
    """A task of lmms-eval with right standard errors: `Stderr_Clustered` by video, and `Stderr_CLT`, which takes
    questions as independent.

    Args:
        config: of the YAML that names this class; `own` is lmms-eval's YAML, FOLDER/NAME.yaml below its tasks, and the
            rest stands in place of what that says.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        rest = {name: value for name, value in config.items() if name not in ("class", "own")}
        path = Path(*lmms_eval.tasks.__path__) / config["own"]
        own = load_yaml_config(str(path))
        about, score_question = benchmark(path.parent.name), own["process_results"]

        def process_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
            scored = dict(doc)
            score, kind = about.score(scored, score_question(scored, results)), about.kind(doc)
            item = {"score": score, "term": score, "type": kind}
            if about.video is not None:
                item["video"] = about.video(doc)
            ours = about.metrics.items()
            return {name: dict(item) for name, parts in ours if parts is None or any(kind in part for part in parts)}

        measured = {"process_results": process_results, "metric_list": metric_list(about.metrics, about.scales)}
        clusters = {"score_key": "term", "cluster_key": None if about.video is None else "video"}
        super().__init__(config={**own, **rest, **measured, **clusters})
