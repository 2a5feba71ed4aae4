"""How questions are put to a model: as they stand, in VSI-Bench's words, or in those of a file."""

import re
from collections.abc import Mapping
from pathlib import Path

from ...integrations.errors import InputError

PLAIN = {"choice": "{question}\n{options}", "short": "{question}"}
"""The question, and its options by letter."""
VSI_BENCH = {
    "choice": "These are frames of a video.\n{question}\nOptions:\n{options}\n"
    "Answer with the option's letter from the given choices directly.",
    "short": "These are frames of a video.\n{question}\nPlease answer the question using a single word or phrase.",
}
"""As VSI-Bench asks (arXiv 2412.14171), with options and without."""
VSI_BENCH_TYPES = frozenset(
    {
        *("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation"),
        *("object_rel_distance", "object_rel_direction", "object_rel_direction_easy", "object_rel_direction_medium"),
        *("object_rel_direction_hard", "route_planning", "obj_appearance_order"),
    }
)
"""VSI-Bench's own types of questions."""
NAMED = {"plain": PLAIN, "vsi-bench": VSI_BENCH}
_ENTRY = re.compile(r"\{(question|options)\}")


def templates_of(prompt: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Templates with options ("choice") and without ("short"): for VSI-Bench's types of questions, and for others.

    Args:
        prompt: "plain", "vsi-bench"; "auto", which is the latter for VSI-Bench's types and plain for others; or the
            path of a text file in which {question} stands for the question and {options}, on a line of its own, for
            the options, one a line. Without that line there is no "choice".

    Raises:
        InputError: there is no such file, or it is no such text.

    Example:
        >>> own, others = templates_of("auto")
        >>> filled(others["short"], "How many rings are there?")
        'How many rings are there?'
    """
    if prompt == "auto":
        return VSI_BENCH, PLAIN
    templates = NAMED.get(prompt) or _read(Path(prompt))
    return templates, templates


def _read(path: Path) -> Mapping[str, str]:
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(["auto", *NAMED])
        raise InputError(f"--prompt {path}: expected {names} or a text file that can be read: {error}") from error
    lines = text.split("\n")
    n_options = lines.count("{options}")
    if text.count("{question}") != 1 or text.count("{options}") != n_options or n_options > 1:
        raise InputError(
            f"--prompt {path}: expected {{question}} once, and {{options}} once on a line of its own, which is left "
            "out for questions without"
        )
    short = "\n".join(line for line in lines if line != "{options}")
    return {"short": short, **({"choice": text} if n_options else {})}


def filled(template: str, question: str, options: str = "") -> str:
    """A template with its entries; braces in a question stay."""
    return _ENTRY.sub(lambda found: question if found[1] == "question" else options, template)
