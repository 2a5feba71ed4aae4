"""What lmms-eval leaves with --log_samples: DATE_samples_TASK.jsonl for each task, and DATE_results.json."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....integrations.errors import InputError
from .plain import json_lines
from .result import ANSWERS, SCORES, TYPES, Answered, Result, by_id, first_of, number_of, options_of, text_of, video_of

HARNESS = "lmms-eval"
_NAME = re.compile(r"(?P<date>.+?)_samples_(?P<task>.+)\.jsonl$")
_NO_METRIC = frozenset(
    {"doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "token_counts", "input_media"}
    | {"doc_hash", "prompt_hash", "target_hash", "per_sample_metrics"}
)
_FRAMES = ("max_num_frames", "num_frames", "max_frames_num", "max_frames", "nframes")
_RESOLUTION = ("min_pixels", "max_pixels", "total_pixels", "max_image_size", "image_size", "max_num_tiles")
_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_PROMPT = ("pre_prompt", "post_prompt", "mca_post_prompt", "na_post_prompt", "format")


def is_sample(row: Mapping[str, Any]) -> bool:
    """Whether a line may be one of lmms-eval's samples."""
    return {"doc_id", "target"} <= row.keys()


def find_samples(folder: Path) -> list[Path]:
    """The files of one run below a folder, a task each.

    Raises:
        InputError: there are several of one task.
    """
    found = sorted(path for path in folder.rglob("*_samples_*.jsonl") if _NAME.match(path.name))
    by_task = defaultdict(list)
    for path in found:
        by_task[_named(path)["task"]].append(path)
    for task, paths in by_task.items():
        if len(paths) > 1:
            raise InputError(f"{folder} holds {len(paths)} runs of {task}: give the samples file of one, {paths[-1]}")
    return found


def _named(path: Path) -> dict[str, str]:
    found = _NAME.match(path.name)
    return found.groupdict() if found else {"date": "", "task": path.stem}


def read_lmms_eval(files: list[Path], source: Path, metric: str | None = None) -> Result:
    """
    Args:
        files: see `find_samples`.
        source: what the user gave.
        metric: which of several scores; None where there is one, or all are the same.

    Raises:
        InputError: a line is no sample; its score is not to be found, or it has several.
    """
    rows = []
    for path in files:
        task = _named(path)["task"]
        for sample in json_lines(path):
            if not is_sample(sample):
                raise InputError(f"{path}: no samples of lmms-eval: expected doc_id and target in each line")
            rows.append(_answered(sample, f"{task}/" if len(files) > 1 else "", task, path, metric))
    return Result(str(source), HARNESS, f"{HARNESS}'s", by_id(rows, source), _card(files))


def _answered(sample: dict[str, Any], prefix: str, task: str, path: Path, metric: str | None) -> Answered:
    name = f"{prefix}{text_of(sample['doc_id'])}"
    scores = _scores(sample)
    if metric is not None:
        scores = {metric: scores[metric]} if metric in scores else {}
    if len({*scores.values()}) != 1:
        names = ", ".join(scores) or "none"
        chosen = "" if metric is None else f" {metric!r}"
        raise InputError(
            f"{path}, doc_id {sample['doc_id']}: expected one score{chosen}, got {names}: give --metric NAME"
        )
    known: dict[str, Any] = {}
    for part in (sample.get("doc"), *(value for key, value in sample.items() if key not in _NO_METRIC)):
        known |= part if isinstance(part, dict) else {}
    reply = sample.get("filtered_resps")
    while isinstance(reply, list):
        reply = reply[0] if reply else None
    kind = text_of(first_of(known, TYPES))
    return Answered(
        id=name,
        score=next(iter(scores.values())),
        video=video_of(known),
        type=kind if kind is not None else task if prefix else "all",
        question=text_of(known.get("question")),
        options=options_of(known),
        answer=text_of(first_of({**known, "target": sample["target"]}, ("target", *ANSWERS))),
        prompt=sample["input"] if isinstance(sample.get("input"), str) else None,
        reply=reply if isinstance(reply, str) else None,
    )


def _scores(sample: Mapping[str, Any]) -> dict[str, float]:
    """By metric. Where a metric keeps an object, the score in it; without one, whether its answer is the right one."""
    found = {}
    for name, value in sample.items():
        if name in _NO_METRIC:
            continue
        number = number_of(value) if not isinstance(value, str) else None
        if isinstance(value, dict):
            number = number_of(first_of(value, SCORES))
            if number is None and {"pred_answer", "answer"} <= value.keys():
                number = float(str(value["pred_answer"]).strip().lower() == str(value["answer"]).strip().lower())
        if number is not None:
            found[name] = number
    return found


def _card(files: list[Path]) -> dict[str, Any]:
    """From the results beside the samples; empty where they are not there."""
    about: dict[str, Any] = {}
    for path in files:
        results = path.with_name(f"{_named(path)['date']}_results.json")
        if results.is_file():
            try:
                about = json.loads(results.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{results} cannot be read ({error}): repair it, or move it away") from error
    if not about:
        return {}
    config = about.get("config") or {}
    arguments = _arguments(config.get("model_args"))
    tasks = [(about.get("configs") or {}).get(_named(path)["task"]) or {} for path in files]
    task = tasks[0]
    wording = task.get("lmms_eval_specific_kwargs") or {}
    wording = wording.get("default", wording) if isinstance(wording, dict) else {}
    frames: dict[str, Any] = {}
    if (limit := first_of(arguments, _FRAMES)) is not None:
        frames["max_frames"] = limit
    frames |= _some(arguments, ("fps",))
    generation = {**(task.get("generation_kwargs") or {}), **_arguments(config.get("gen_kwargs"))}
    sections = {
        "frames": frames,
        "resolution": _some(arguments, _RESOLUTION),
        "prompt": _some(wording, _PROMPT),
        "generation": {name: value for name, value in generation.items() if name != "until"},
        "seeds": _some(config, _SEEDS),
    }
    facts = {
        "model": about.get("model_name") or first_of(arguments, ("pretrained", "model", "model_version")),
        "class": config.get("model"),
        "tasks": ", ".join(_named(path)["task"] for path in files),
        "model_args": {name: value for name, value in arguments.items() if name not in (*_FRAMES, *_RESOLUTION, "fps")},
        "versions": _some({"lmms-eval": about.get("lmms_eval_version")}, ("lmms-eval",)),
        "date": about.get("date"),
    }
    return {name: value for name, value in {**facts, **sections}.items() if value}


def _some(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _arguments(given: Any) -> dict[str, Any]:
    """Of "a=1,b=x": numbers as such."""
    if isinstance(given, dict):
        return given
    found: dict[str, Any] = {}
    for part in str(given or "").split(","):
        name, equals, value = part.partition("=")
        if equals:
            number = number_of(value)
            found[name.strip()] = value if number is None else int(number) if number.is_integer() else number
    return found
