"""The protocol card of an evaluation: what its numbers depend on, in sections that `protocol` compares."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..token_sampling import TokenSampling
from .paired import SEED
from .questions import Question
from .settings import Setting
from .thumbnails import Thumbnails

RESOLUTION = (
    *("size", "crop_size", "min_pixels", "max_pixels", "max_video_tokens", "patch_size", "merge_size"),
    *("temporal_patch_size", "do_resize", "do_center_crop", "crop_to_patches", "min_patches", "max_patches"),
    "resample",
)
"""Of a processor of videos, what says how large the model sees a frame."""
GENERATION = ("repetition_penalty", "no_repeat_ngram_size", "num_beams")
"""Of a checkpoint's own settings, what changes replies without sampling."""


def checkpoint_card(
    model: Any, processor: Any, max_pixels: int, max_new_tokens: int, drawn: TokenSampling | None = None
) -> dict[str, Any]:
    """The sections that a loaded checkpoint decides.

    Args:
        model, processor: of transformers.
        max_pixels: to which frames are scaled down before the processor sees them.
        max_new_tokens: of a reply.
        drawn: see `pipeline.answer`.

    Returns:
        "class", "resolution", "chat_template_sha256", "generation": text, numbers and mappings of them.
    """
    frames = getattr(processor, "video_processor", None) or getattr(processor, "image_processor", None)
    about = frames.to_dict() if frames is not None else {}
    seen = {f"processor_{name}": about[name] for name in RESOLUTION if about.get(name) is not None}
    own = model.generation_config.to_dict()
    template = getattr(processor, "chat_template", None)
    return {
        "class": type(model).__name__,
        "resolution": {"max_frame_pixels": max_pixels, **json.loads(json.dumps(seen, default=str))},
        "chat_template_sha256": None if template is None else _sha256(template),
        "generation": {
            "max_new_tokens": max_new_tokens,
            **({"do_sample": False} if drawn is None else {**drawn.options(), "seed": drawn.seed}),
            **{name: own[name] for name in GENERATION if own.get(name) is not None},
        },
    }


def protocol_card(
    facts: Mapping[str, Any], checkpoint: Mapping[str, Any], settings: Sequence[Setting]
) -> dict[str, Any]:
    """The card of an evaluation.

    Args:
        facts: of a `Session`.
        checkpoint: see `checkpoint_card`.
        settings: those that were asked; "settings" has the frames and the gate of each by name.
    """
    run = facts["run"]
    device, _, dtype = facts["device"].rpartition(", ")
    return {
        "model": run["model"],
        "revision": facts["revision"],
        "class": checkpoint["class"],
        "dtype": dtype,
        "device": device,
        "date": facts["date"],
        "versions": facts["versions"],
        "questions": {
            "file": facts["questions"],
            "sha256": facts["questions_sha256"],
            "n": facts["n_questions"],
            "n_videos": facts["n_videos"],
        },
        "frames": {name: _value(run[name]) for name in ("fps", "sampling", "fit", "strict")},
        "resolution": checkpoint["resolution"],
        "prompt": {
            **{"asked": run["prompt"], "templates": facts["templates"], "sha256": _sha256(facts["templates"])},
            "systems": facts["systems"],
        },
        "chat_template_sha256": checkpoint["chat_template_sha256"],
        "generation": checkpoint["generation"],
        "seeds": {"bootstrap": SEED},
        "settings": {setting.name: _setting(setting) for setting in settings},
    }


def _sha256(value: Any) -> str:
    """Of a text in UTF-8, or of other values as JSON with sorted keys."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _value(text: str) -> Any:
    """Of a setting's `run`, which holds text."""
    return {"None": None, "True": True, "False": False}.get(text, text)


def _setting(setting: Setting) -> dict[str, Any]:
    config = setting.config.to_dict()
    del config["memory_budget"]  # says how much is free, not what is computed
    return {"max_frames": setting.max_frames, **config}


def card_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card has beside the facts that reports give anyway; prompts in one line."""
    prompt = {**card["prompt"], "templates": [text.replace("\n", "\\n") for text in card["prompt"]["templates"]]}
    if not prompt.get("systems"):
        prompt.pop("systems", None)
    names = ("class", "frames", "resolution", "chat_template_sha256", "generation", "seeds")
    return {"prompt": prompt, **{name: card[name] for name in names}}


def card_columns(card: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a CSV: mappings as JSON."""
    facts = {**card_facts(card), "versions": card["versions"]}
    found = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value
        for name, value in facts.items()
    }
    return {**found, "prompt_sha256": card["prompt"]["sha256"]}


def answered(
    questions: Sequence[Question],
    videos: Sequence[str],
    settings: Sequence[Setting],
    records: Mapping[str, Any],
    thumbnails: Thumbnails,
) -> list[dict[str, Any]]:
    """Each question with its replies by setting: what was read from them, its score and the name of a strip of frames,
    or why there is none.

    Args:
        videos: see `videos_of`.
        records: of the log of replies.
    """
    found = []
    for question, video in zip(questions, videos, strict=True):
        replies = {}
        for setting in settings:
            record = records.get(setting.key(question), {})
            if (reply := record.get("reply")) is not None:
                score = question.score(reply)
                of_reply = {"reply": reply, "read": question.read(reply), "score": score or 0.0}
                replies[setting.name] = {**of_reply, "frames": thumbnails.name(question, setting)}
            elif "error" in record:
                replies[setting.name] = {"error": record["error"]}
        found.append(
            {
                "id": question.id,
                "video": str(video),
                "type": question.type,
                "question": question.text,
                "options": list(question.options),
                "metric": question.metric,
                "answer": question.answer,
                "prompt": question.prompt(),
                "system": question.system,
                "replies": replies,
            }
        )
    return found
