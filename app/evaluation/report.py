"""What an evaluation leaves: a table as Markdown and CSV, a picture, and all of it as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_write import replacing, write_whole
from ..batch.worker import CONFIG_COLUMNS, VIDEO_COLUMNS
from ..viz.plain_text import plain_text
from .evaluate import Setting
from .paired import Difference, compare
from .questions import Question, videos_of

ALL, MEAN_OF_TYPES = "all questions", "mean of types"
BLUE, GREY, DARK = "#0072B2", "#BBBBBB", "#333333"  # of Okabe and Ito's palette: apart in print and for all eyes
NOTE = (
    "Score: accuracy of multiple choice, mean relative accuracy of numbers (VSI-Bench), exact match of text. Interval: "
    "95%, bootstrap over videos with all their questions, each paired with the same question without the gate; of few "
    "videos it is too narrow. Replies from which no letter or number can be read count as wrong, questions without a "
    "reply are left out. A gain is one whose interval leaves out 0 with 6 or more videos changed, the questions "
    "of one taken together; with many rows, one in twenty intervals leaves out 0 by chance."
)


CSV_COLUMNS = (
    *("setting", "baseline_setting", "type", "n", "n_videos", "baseline", "mean", "difference", "low", "high"),
    *("n_changed", "n_videos_changed", "verdict", "n_failed", "unreadable", "baseline_unreadable", "n_unasked"),
    *("model", "revision", "dtype", "device", *CONFIG_COLUMNS, *VIDEO_COLUMNS, "fit", "max_new_tokens"),
    *("questions", "questions_sha256", "date", "version", "tag"),
)
"""Scores are shares of 1."""
NO_REPLY = "nothing could be judged"


@dataclass(frozen=True)
class Line:
    """One line of the table: a setting against its baseline on the questions of one type.

    Attributes:
        n_failed: questions left out, as one of the two has no reply.
        unreadable, baseline_unreadable: replies from which no letter or number could be read; they count as wrong.
    """

    setting: Setting
    baseline: str
    type: str
    difference: Difference
    n_failed: int = 0
    unreadable: int = 0
    baseline_unreadable: int = 0

    @property
    def verdict(self) -> str:
        garbage = self.unreadable == self.baseline_unreadable == self.difference.n
        return NO_REPLY if garbage else self.difference.verdict

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting.name,
            "baseline_setting": self.baseline,
            "type": self.type,
            **self.difference.to_dict(),
            "verdict": self.verdict,
            "n_failed": self.n_failed,
            "unreadable": self.unreadable,
            "baseline_unreadable": self.baseline_unreadable,
            **self.setting.columns(),
        }


Pair = tuple[np.ndarray, np.ndarray]


def lines(
    questions: Sequence[Question],
    pairs: Sequence[tuple[Setting, Setting]],
    scores: Sequence[Pair],
    unreadable: Sequence[Pair] | None = None,
) -> list[Line]:
    """Each setting against its baseline: all questions, the mean of the types (VSI-Bench's overall score), each type.

    Args:
        questions: N of them.
        pairs: settings and their baselines.
        scores: (N,) of each setting, and of its baseline; NaN for failures, which leave the question out of this pair.
        unreadable: (N,) bool, see `evaluate.unreadable`, of each setting, and of its baseline; None for none.
    """
    table = []
    videos, types = videos_of(questions), np.array([question.type for question in questions])
    nothing = np.zeros(len(questions), dtype=bool)
    unreadable = [(nothing, nothing)] * len(pairs) if unreadable is None else unreadable
    for (setting, baseline), (after, before), unread in zip(pairs, scores, unreadable, strict=True):
        known = ~np.isnan(after) & ~np.isnan(before)
        everything = ~nothing
        groups: list[tuple[str, np.ndarray, np.ndarray | None]] = [(ALL, everything, None)]
        if len({*types[known]}) > 1:
            groups.append((MEAN_OF_TYPES, everything, types))
            groups += [(kind, types == kind, None) for kind in np.unique(types[known])]
        for name, group, kinds in groups:
            chosen = known & group
            if chosen.any():
                within = None if kinds is None else kinds[chosen]
                difference = compare(after[chosen], before[chosen], videos[chosen], within)
                counts = (int((group & ~known).sum()), *(int((chosen & one).sum()) for one in unread))
                table.append(Line(setting, baseline.name, name, difference, *counts))
    return table


def markdown(table: Sequence[Line], about: Mapping[str, str]) -> str:
    """What was run and the table, for people; scores in percent."""
    rows = ["| | |", "|:--|:--|", *(f"| {name} | {markdown_cell(text)} |" for name, text in about.items()), ""]
    rows += [
        "| setting | questions | n | videos | without gate | with gate | difference | 95% interval | changed | "
        "videos changed | unreadable without / with gate | failed | |",
        "|:--|:--|--:|--:|--:|--:|--:|:-:|--:|--:|:-:|--:|:--|",
    ]
    for line in table:
        d = line.difference
        rows.append(
            f"| {markdown_cell(line.setting.name)} | {markdown_cell(line.type)} | {d.n} | {d.n_videos} | "
            f"{100 * d.baseline:.1f} | {100 * d.mean:.1f} | "
            f"{100 * d.difference:+.1f} | {100 * d.low:+.1f} to {100 * d.high:+.1f} | {d.n_changed} | "
            f"{d.n_videos_changed} | {line.baseline_unreadable} / {line.unreadable} | {line.n_failed} | "
            f"{line.verdict} |"
        )
    if not table:
        rows += ["", f"**{NO_REPLY.capitalize()}**: no question has a reply with the gate and without."]
    if any(line.verdict == NO_REPLY for line in table):
        rows += ["", f"**{NO_REPLY.capitalize()}** where no letter or number could be read from any reply."]
    return "\n".join(rows) + f"\n\n{NOTE}\n"


def markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(
    folder: Path, name: str, tag: str, texts: Mapping[str, str], draw_to: Callable[[Path], None]
) -> tuple[list[Path], list[Path]]:
    """Writes NAME.SUFFIX for each of `texts` and NAME.png, and the same as NAME-TAG.SUFFIX: those stay when another run
    writes NAME.SUFFIX. Each file is replaced whole.

    Returns:
        the files NAME.SUFFIX, and the reports of other tags that are there.
    """
    for stem in (f"{name}-{tag}", name):
        for suffix, text in texts.items():
            write_whole(folder / f"{stem}.{suffix}", text.encode())
        replace_file(folder / f"{stem}.png", draw_to)
    others = sorted({*folder.glob(f"{name}-*.md")} - {folder / f"{name}-{tag}.md"})
    return [folder / f"{name}.{suffix}" for suffix in (*texts, "png")], others


def replace_file(path: Path, write_to: Any) -> None:
    """Writes beside `path` and moves: the file is the old one or the new one, never a part."""
    with replacing(path) as scratch:
        write_to(scratch)


@plain_text()
def draw(path: Path, table: Sequence[Line]) -> None:
    """Bars of the scores with and without the gate, and beside them the differences with their intervals. Of several
    settings only the lines over all questions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len({line.setting.name for line in table}) > 1
    shown = [line for line in table if line.type == ALL or not several]
    labels = [line.setting.name if several else line.type for line in shown]
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
