"""What an evaluation or a search of strengths shows: its table, for people and for programs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from ..batch.worker import CONFIG_COLUMNS, VIDEO_COLUMNS
from ..text import shown
from .evaluate import Judged
from .paired import ALL, Difference, compare, groups_of, interval_text
from .questions import Question, videos_of
from .settings import Setting
from .tune import Trial

Row = dict[str, Any]

NO_REPLY = "nothing could be judged"
NOTE = (
    "Score: accuracy of multiple choice, mean relative accuracy of numbers (VSI-Bench), exact match of text. Interval: "
    "95%, bootstrap over videos with all their questions, each paired with the same question without the gate. "
    "Replies from which no letter or number can be read count as wrong, questions without a "
    "reply are left out. A gain is one whose interval leaves out 0 with 6 or more videos changed, the questions "
    "of one taken together; with many rows, one in twenty intervals leaves out 0 by chance."
)

RUN_COLUMNS = ("revision", "device", "date", "questions", "questions_sha256", "n_unasked", "version", "tag")
"""Where the numbers come from: the same in all rows of a table."""
COLUMNS = {
    "eval": (
        *("setting", "baseline_setting", "type", *(field.name for field in fields(Difference)), "n_failed"),
        *(
            "unreadable",
            "baseline_unreadable",
            "foreign",
            "baseline_foreign",
            "model",
            "dtype",
            *CONFIG_COLUMNS,
            *VIDEO_COLUMNS,
            "fit",
        ),
        *("max_new_tokens", *RUN_COLUMNS, "class", "frames", "resolution", "prompt", "prompt_sha256"),
        *("chat_template_sha256", "generation", "seeds", "versions"),
    ),
    "tune": (*(field.name for field in fields(Trial)), "model", *RUN_COLUMNS),
}
"""Of the CSV of a command; scores are shares of 1."""
_SHARES = ("baseline", "mean", "difference", "low", "high")
_EVAL_TABLE = {
    "setting": (":--", "{setting}"),
    "questions": (":--", "{type}"),
    "n": ("--:", "{n}"),
    "videos": ("--:", "{n_videos}"),
    "without gate": ("--:", "{baseline:.1f}"),
    "with gate": ("--:", "{mean:.1f}"),
    "difference": ("--:", "{difference:+.1f}"),
    "95% interval": (":-:", "{interval}"),
    "changed": ("--:", "{n_changed}"),
    "videos changed": ("--:", "{n_videos_changed}"),
    "unreadable without / with gate": (":-:", "{baseline_unreadable} / {unreadable}"),
    "failed": ("--:", "{n_failed}"),
    "": (":--", "{verdict}"),
}
"""Columns for people: alignment and content."""
_TUNE_TABLE = {
    "coordinate": (":--", "{coordinate}"),
    "search_pass": ("--:", "{search_pass}"),
    "rung": ("--:", "{rung}"),
    "alpha_k": ("--:", "{alpha_k:.4g}"),
    "alpha_v": ("--:", "{alpha_v:.4g}"),
    "n": ("--:", "{n}"),
    "mean (%)": ("--:", "{mean:.1f}"),
    "kept": (":--", "{kept}"),
}


def compared(questions: Sequence[Question], settings: Sequence[Setting], judged: Judged) -> list[Row]:
    """Each setting against its baseline: all questions, the mean of the types (VSI-Bench's overall score), each type.

    Args:
        questions: N of them.
        settings: S of them, the baselines among them.
        judged: (S, N) their replies; a question without one in a setting or in its baseline is left out of this pair.

    Returns:
        see `paired.Difference`; with n_failed questions left out. Where all replies are unreadable, the verdict is
        `NO_REPLY`.
    """
    table: list[Row] = []
    videos, types = videos_of(questions), np.array([question.type for question in questions])
    for setting in settings:
        baseline = setting.baseline()
        pair = [settings.index(setting), settings.index(baseline)]
        (after, before), unreadable, foreign = judged.scores[pair], judged.unreadable[pair], judged.foreign[pair]
        known = ~np.isnan(after) & ~np.isnan(before)
        if setting == baseline or not known.any():
            continue
        for name, group, within in groups_of(types, known):
            chosen = known & group
            difference = asdict(compare(after[chosen], before[chosen], videos[chosen], within[chosen]))
            row = {"setting": setting.name, "baseline_setting": baseline.name, "type": name, **difference}
            row["n_failed"] = int((group & ~known).sum())
            row["unreadable"], row["baseline_unreadable"] = unreadable[:, chosen].sum(1).tolist()
            row["foreign"], row["baseline_foreign"] = foreign[:, chosen].sum(1).tolist()
            if row["unreadable"] == row["baseline_unreadable"] == row["n"]:
                row["verdict"] = NO_REPLY
            table.append(row | setting.columns())
    return table


def eval_markdown(about: Mapping[str, Any], table: Sequence[Row]) -> str:
    """What was run and `compared`, for people."""
    text = _markdown(about, _EVAL_TABLE, table)
    if not table:
        text += f"\n**{NO_REPLY.capitalize()}**: no question has a reply with the gate and without.\n"
    if any(row["verdict"] == NO_REPLY for row in table):
        text += f"\n**{NO_REPLY.capitalize()}** where no letter or number could be read from any reply.\n"
    for said in warnings_of(table):
        text += f"\n**{said}**\n"
    return f"{text}\n{NOTE}\n"


def warnings_of(table: Sequence[Row]) -> list[str]:
    """What is likely wrong with the whole of a setting: most of its replies are no answers."""
    return [
        f"Most replies are no answers: {row[name]} of {row['n']} in {row[setting]} are what no question of their type "
        "has as its answer; the model may not know this wording, see --prompt."
        for row in table
        for name, setting in (("baseline_foreign", "baseline_setting"), ("foreign", "setting"))
        if row["type"] == ALL and 2 * row[name] > row["n"]
    ]


def tune_markdown(about: Mapping[str, Any], conclusion: str, trials: Sequence[Trial]) -> str:
    """The conclusion, what was run, and each step of the search, for people."""
    rows = [{**asdict(trial), "kept": "yes" if trial.kept else ""} for trial in trials]
    return f"**{conclusion}**\n\n{_markdown(about, _TUNE_TABLE, rows)}"


def _markdown(about: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], rows: Iterable[Row]) -> str:
    """Two tables; scores in percent."""
    lines = ["| | |", "|:--|:--|", *(markdown_line([name, shown(value)]) for name, value in about.items())]
    lines += ["", markdown_line(columns), f"|{'|'.join(alignment for alignment, _ in columns.values())}|"]
    for row in rows:
        percent = row | {name: 100 * row[name] for name in _SHARES if name in row}
        if "low" in row:
            percent["interval"] = interval_text(f"{percent['low']:+.1f}", f"{percent['high']:+.1f}", row["n_videos"])
        lines.append(markdown_line(content.format_map(percent) for _, content in columns.values()))
    return "\n".join(lines) + "\n"


def beginning(text: str | None, most: int) -> str:
    """The first characters of a text, in one line."""
    line = " ".join((text or "").split())
    return line if len(line) <= most else f"{line[:most]}..."


def markdown_line(cells: Iterable[str]) -> str:
    """A row of a table, each cell in one line."""
    return f"| {' | '.join(map(markdown_text, cells))} |"


def markdown_text(text: str) -> str:
    """`text` in one line, without the start of a cell or of HTML."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
