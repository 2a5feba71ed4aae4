"""All-Angles-Bench ("Seeing from Another Perspective", arXiv 2504.15280): several views of a scene and a question with
three options; most questions have a twin that asks the same in other words or from another view."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videoanchor_triton.integrations.lmms_eval.metrics import choice_letter
from videoanchor_triton.integrations.lmms_eval.standard_errors import Parts, metric_list

LETTERS = ("A", "B", "C")
CATEGORIES = (
    *("attribute_identification", "camera_pose_estimation", "counting"),
    *("manipulation", "relative_direction", "relative_distance"),
)


def _folder() -> Path:
    folder = Path(os.environ.get("ALL_ANGLES_BENCH", ""))
    if not (folder / "data.json").is_file():
        raise ValueError(
            "the environment variable ALL_ANGLES_BENCH: expected a folder with the data set "
            "ch-chenyu/All-Angles-Bench, its data.json and its images, got "
            f"{os.environ.get('ALL_ANGLES_BENCH')!r}"
        )
    return folder


DATA_FILE = str(_folder() / "data.json")


def only_egohumans(dataset: Any) -> Any:
    """The questions whose images come with the data set; those from Ego-Exo4D need its licence."""
    kept = dataset.filter(lambda doc: "egohumans" in doc["sourced_dataset"].lower())
    if not len(kept):
        found = sorted(set(dataset["sourced_dataset"]))
        raise ValueError(f"{DATA_FILE}: no question from EgoHumans, sourced_dataset is one of {found}")
    return kept


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The views, as PIL images in their order: questions name them View 1, View 2, ...

    Raises:
        FileNotFoundError: an image is not there.
    """
    from PIL import Image

    return [Image.open(_folder() / path).convert("RGB") for path in doc["image_path"]]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The question, its options, and what to answer with."""
    options = "\n".join(f"{letter}. {doc[letter]}" for letter in LETTERS)
    return f"Question: {doc['question']}\nOptions:\n{options}\n{lmms_eval_specific_kwargs['post_prompt']}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """1 or 0 for all questions and for the question's category, with the scene; and what the pairs are worked out from.

    Raises:
        ValueError: the question has another answer than a letter, or another category than the six.
    """
    if doc["answer"] not in LETTERS or doc["category"] not in CATEGORIES:
        raise ValueError(
            f"{DATA_FILE}, question {doc['index']}: expected an answer among {LETTERS} and a category among "
            f"{CATEGORIES}, got {doc['answer']!r} and {doc['category']!r}"
        )
    correct = float(choice_letter(results[0], [str(doc[letter]) for letter in LETTERS]) == doc["answer"])
    item = {"score": correct, "term": correct, "type": doc["category"], "scene": doc["folder"]}
    twin = {"index": str(doc["index"]), "pair_idx": str(doc["pair_idx"]), "correct": correct}
    own = {"accuracy": item, doc["category"]: dict(item)}
    return {**own, "pairs_both_correct": twin, "pairs_inconsistent": twin}


def _pairs(items: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each question and its twin: how many of the two were right."""
    correct = {item["index"]: item["correct"] for item in items}
    pairs = {frozenset((item["index"], item["pair_idx"])) for item in items if item["pair_idx"] in correct}
    return [sum(correct[index] for index in pair) for pair in pairs if len(pair) == 2]


def pairs_both_correct(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of pairs with two right answers (CC in the paper); NaN where there is no pair."""
    pairs = _pairs(items)
    return pairs.count(2.0) / len(pairs) if pairs else float("nan")


def pairs_inconsistent(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of pairs with one right and one wrong answer (IC in the paper); NaN where there is no pair."""
    pairs = _pairs(items)
    return pairs.count(1.0) / len(pairs) if pairs else float("nan")


_PARTS: dict[str, Parts | None] = {"accuracy": None, **{name: [(name,)] for name in CATEGORIES}}
METRICS = [
    *metric_list(_PARTS, {}),
    {"metric": "pairs_both_correct", "aggregation": pairs_both_correct, "higher_is_better": True},
    {"metric": "pairs_inconsistent", "aggregation": pairs_inconsistent, "higher_is_better": False},
]
