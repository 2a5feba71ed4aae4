"""Whether two results were made alike: their cards side by side."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .readers.result import Result, text_of

SECTIONS = ("frames", "resolution", "prompt", "generation", "seeds")
"""Of a card, what changes scores without being the model: compared entry by entry."""


@dataclass(frozen=True)
class Protocol:
    """Two cards side by side.

    Attributes:
        flags: what differs and may be the reason of a difference of the scores: {"what", "a", "b"}.
        others: what else differs, such as the model, in the same form.
        unchecked: what could not be compared, and why.
    """

    flags: list[dict[str, Any]]
    others: list[dict[str, Any]]
    unchecked: list[str]


def compare_protocols(a: Result, b: Result) -> Protocol:
    """
    Args:
        a, b: of the same questions.
    """
    flags, unchecked = [], []
    if a.scoring != b.scoring:
        flags.append({"what": "scoring", "a": a.scoring, "b": b.scoring})
    prompts = _prompts(a, b)
    if prompts is not None:
        flags += prompts
    for section in SECTIONS:
        ours, theirs = a.card.get(section), b.card.get(section)
        whole = section != "prompt" or prompts is None
        if not whole and not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
            continue
        if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
            unchecked.append(f"{section}: {_who_lacks(ours, theirs)}")
            continue
        for name in dict.fromkeys([*ours, *theirs] if whole else ["systems"]):
            what = f"{section}.{name}"
            if name not in ours and name not in theirs:
                continue
            if name not in ours or name not in theirs:
                who, value = ("A", ours[name]) if name in ours else ("B", theirs[name])
                unchecked.append(f"{what}: only the card of {who} has it ({_short(value)})")
            elif not _same(ours[name], theirs[name]):
                flags.append({"what": what, "a": ours[name], "b": theirs[name]})
    return Protocol(flags, list(_others(a.card, b.card)), unchecked)


def _who_lacks(ours: Any, theirs: Any) -> str:
    if not isinstance(ours, Mapping) and not isinstance(theirs, Mapping):
        return "neither card says it"
    return f"the card of {'B' if isinstance(ours, Mapping) else 'A'} does not say it"


def _prompts(a: Result, b: Result) -> list[dict[str, Any]] | None:
    """The prompts themselves, question by question; None where a result lacks them."""
    pairs = [(row.prompt, b.rows[name].prompt) for name, row in a.rows.items()]
    if any(one is None or other is None for one, other in pairs):
        return None
    different = [(one, other) for one, other in pairs if one != other]
    if not different:
        return []
    one, other = different[0]
    return [{"what": f"prompt of {len(different)} of {len(pairs)} questions", "a": one, "b": other}]


def _others(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in dict.fromkeys([*ours, *theirs]):
        if name in (*SECTIONS, "date"):
            continue
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for key in dict.fromkeys([*one, *other]):
                if not _same(one.get(key), other.get(key)):
                    yield {"what": f"{name}.{key}", "a": one.get(key), "b": other.get(key)}
        elif name in ours and name in theirs and not _same(one, other):
            yield {"what": name, "a": one, "b": other}


def _same(one: Any, other: Any) -> bool:
    return one == other or (not isinstance(one, Mapping | list) and text_of(one) == text_of(other))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
