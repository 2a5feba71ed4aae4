"""What `videoanchor eval` has left."""

import json
from pathlib import Path
from typing import Any

from ....integrations.errors import InputError
from ..thumbnails import strip_path
from .result import OURS, Answered, Result, by_id, number_of, text_of

HARNESS = "videoanchor eval"


def is_own(record: Any) -> bool:
    """Whether `eval` may have written it."""
    return isinstance(record, dict) and {"settings", "results"} <= record.keys()


def read_own(path: Path, setting: str | None = None) -> Result:
    """
    Args:
        path: an eval.json.
        setting: whose replies; None for "gate", or the only one with a gate.

    Raises:
        InputError: it is no such file, or of a version that left replies out of it; it has no such setting.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not {"card", "answered"} <= record.keys():
        raise InputError(f"{path} is of a version that kept no replies in it: run the same videoanchor eval again")
    if setting is None:
        gates = [name for name in record["settings"] if not name.startswith("baseline")]
        if "gate" not in gates and len(gates) != 1:
            names = ", ".join(map(repr, record["settings"]))
            raise InputError(f"{path} has several settings: choose one by --setting-a or --setting-b from {names}")
        setting = "gate" if "gate" in gates else gates[0]
    if setting not in record["settings"]:
        raise InputError(f"{path} has no setting {setting!r}: give one of {', '.join(map(repr, record['settings']))}")
    return result_of(record, setting, str(path))


def result_of(record: dict[str, Any], setting: str, source: str) -> Result:
    """One setting of what eval.json holds.

    Raises:
        InputError: it has no question.
    """
    rows = by_id((_answered(one, setting, Path(source)) for one in record["answered"]), source)
    return Result(source, HARNESS, OURS, rows, _card(record["card"], setting), setting)


def _answered(question: dict[str, Any], setting: str, source: Path) -> Answered:
    reply = question["replies"].get(setting, {"error": "not asked: the run stopped before"})
    return Answered(
        id=str(question["id"]),
        score=number_of(reply.get("score")),
        video=text_of(question["video"]),
        type=str(question["type"]),
        question=text_of(question["question"]),
        options=tuple(map(str, question["options"])),
        metric=text_of(question["metric"]),
        answer=text_of(question["answer"]),
        prompt=text_of(question["prompt"]),
        reply=None if reply.get("reply") is None else str(reply["reply"]),
        read=None if reply.get("read") is None else str(reply["read"]),
        error=text_of(reply.get("error")),
        frames=strip_path(source, text_of(reply.get("frames"))),
    )


def _card(card: dict[str, Any], setting: str) -> dict[str, Any]:
    """Of one setting: its frames and its gate are in places of their own."""
    chosen = dict(card["settings"][setting])
    common = {name: value for name, value in card.items() if name != "settings"}
    frames = {**common.get("frames", {}), "max_frames": chosen.pop("max_frames")}
    seeds = {**common.get("seeds", {}), "scores": chosen.pop("random_state")}
    return {**common, "frames": frames, "seeds": seeds, "gate": chosen}
