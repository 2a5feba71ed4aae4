"""What an evaluation leaves: a table as Markdown and CSV, a picture, and all of it as JSON."""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import Question, Setting, videos_of
from .paired import Difference, compare

ALL, MEAN_OF_TYPES = "all questions", "mean of types"
BLUE, GREY, DARK = "#0072B2", "#BBBBBB", "#333333"  # of Okabe and Ito's palette: apart in print and for all eyes
NOTE = (
    "Score: accuracy of multiple choice, mean relative accuracy of numbers (VSI-Bench), exact match of text. Interval: "
    "95%, bootstrap over videos with all their questions, each paired with the same question without the gate; of few "
    "videos it is too narrow. A gain is one whose interval leaves out 0 with 6 or more videos changed, the questions "
    "of one taken together; with many rows, one in twenty intervals leaves out 0 by chance."
)


@dataclass(frozen=True)
class Line:
    """One line of the table: a setting against its baseline on the questions of one type."""

    setting: str
    baseline: str
    type: str
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "baseline_setting": self.baseline,
            "type": self.type,
            **self.difference.to_dict(),
        }


def lines(
    questions: Sequence[Question],
    pairs: Sequence[tuple[Setting, Setting]],
    scores: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Line]:
    """Each setting against its baseline: all questions, the mean of the types (VSI-Bench's overall score), each type.

    Args:
        questions: N of them.
        pairs: settings and their baselines.
        scores: (N,) of each setting, and of its baseline; NaN for failures, which leave the question out of this pair.
    """
    table = []
    videos, types = videos_of(questions), np.array([question.type for question in questions])
    for (setting, baseline), (after, before) in zip(pairs, scores, strict=True):
        known = ~np.isnan(after) & ~np.isnan(before)
        groups: list[tuple[str, np.ndarray, np.ndarray | None]] = [(ALL, known, None)]
        if len({*types[known]}) > 1:
            groups.append((MEAN_OF_TYPES, known, types[known]))
            groups += [(kind, known & (types == kind), None) for kind in np.unique(types[known])]
        table += [
            Line(setting.name, baseline.name, name, compare(after[chosen], before[chosen], videos[chosen], within))
            for name, chosen, within in groups
            if chosen.any()
        ]
    return table


def markdown(table: Sequence[Line]) -> str:
    """The table for people; scores in percent."""
    rows = [
        "| setting | questions | n | videos | without gate | with gate | difference | 95% interval | changed | "
        "videos changed | |",
        "|:--|:--|--:|--:|--:|--:|--:|:-:|--:|--:|:--|",
    ]
    for line in table:
        d = line.difference
        rows.append(
            f"| {line.setting} | {line.type} | {d.n} | {d.n_videos} | {100 * d.baseline:.1f} | {100 * d.mean:.1f} | "
            f"{100 * d.difference:+.1f} | {100 * d.low:+.1f} to {100 * d.high:+.1f} | {d.n_changed} | "
            f"{d.n_videos_changed} | {d.verdict} |"
        )
    return "\n".join(rows) + f"\n\n{NOTE}\n"


def table_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Dictionaries with the same keys as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(folder: Path, name: str, table: Sequence[Line], record: dict[str, Any]) -> list[Path]:
    """Writes NAME.md, NAME.csv, NAME.json and NAME.png; each file is replaced whole."""
    texts = {
        "md": markdown(table),
        "csv": table_csv([line.to_dict() for line in table]),
        "json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    for suffix, text in texts.items():
        replace_file(folder / f"{name}.{suffix}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    replace_file(folder / f"{name}.png", lambda path: draw(path, table))
    return [folder / f"{name}.{suffix}" for suffix in (*texts, "png")]


def replace_file(path: Path, write_to: Any) -> None:
    """Writes beside `path` and moves: the file is the old one or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.writing{path.suffix}")
    try:
        write_to(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def draw(path: Path, table: Sequence[Line]) -> None:
    """Bars of the scores with and without the gate, and beside them the differences with their intervals. Of several
    settings only the lines over all questions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len({line.setting for line in table}) > 1
    shown = [line for line in table if line.type == ALL or not several]
    labels = [line.setting if several else line.type for line in shown]
    y = np.arange(len(shown))
    figure = Figure((9, 1.6 + 0.5 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, changes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    found = [line.difference for line in shown]
    bars.barh(y - 0.19, [100 * d.baseline for d in found], 0.36, color=GREY, label="without gate")
    bars.barh(y + 0.19, [100 * d.mean for d in found], 0.36, color=BLUE, label="with gate")
    for place, d in zip(y, found, strict=True):
        for offset, value in ((-0.19, d.baseline), (0.19, d.mean)):
            bars.text(100 * value + 1, place + offset, f"{100 * value:.1f}", va="center", fontsize=8, color=DARK)
    bars.set(xlim=(0, 112), xlabel="score (%)", xticks=range(0, 101, 20))
    named = [f"{label[:40]}\nn = {d.n}, {d.n_videos} videos" for label, d in zip(labels, found, strict=True)]
    bars.set_yticks(y, named, fontsize=9)
    bars.invert_yaxis()
    changes.axvline(0, color=DARK, linewidth=0.8)
    draw_differences(changes, y, found)
    edges = [0, *(100 * edge for d in found for edge in (d.low, d.high))]
    changes.set(xlabel="difference (points), 95% interval", xlim=difference_range(edges))
    figure.legend(*_merged(bars, changes), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    changes.spines["left"].set_visible(False)
    for axes in (bars, changes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150, format="png")


def difference_range(points: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of differences: no less than 5 points to both sides, so that nothing looks large."""
    return min(1.1 * min(points), -5), max(1.1 * max(points), 5)


def draw_differences(axes: Any, y: np.ndarray, found: Sequence[Difference]) -> None:
    """Points with intervals, filled where a gain or a loss is shown."""
    for name, filled in (("gain or loss shown", True), ("no gain shown", False)):
        some = [n for n, d in enumerate(found) if (d.verdict != "no gain shown") == filled]
        if some:
            middle = np.array([100 * found[n].difference for n in some])
            low = middle - [100 * found[n].low for n in some]
            high = np.array([100 * found[n].high for n in some]) - middle
            axes.errorbar(
                middle, y[some], xerr=np.maximum([low, high], 0), fmt="o", color=BLUE, capsize=3, label=name,
                markerfacecolor=BLUE if filled else "white",
            )  # fmt: skip


def _merged(*axes: Any) -> tuple[list[Any], list[str]]:
    found = [item.get_legend_handles_labels() for item in axes]
    return [handle for handles, _ in found for handle in handles], [label for _, labels in found for label in labels]
