"""Pictures of an evaluation and of a search of strengths, as PNG."""

from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..viz.plain_text import plain_text, wrapped
from .paired import ALL, Difference
from .report import Row
from .tune import Trial

BLUE, ORANGE, GREY, DARK = "#0072B2", "#D55E00", "#BBBBBB", "#333333"
"""Of Okabe and Ito's palette: apart in print and for all eyes."""
MARKERS = "osD^vP*X"


@plain_text()
def draw_eval(table: Sequence[Row]) -> bytes:
    """Rows of `report.compared`: bars of the scores with and without the gate, and beside them the differences with
    their intervals. Of several settings only the rows over all questions."""
    several = len({row["setting"] for row in table}) > 1
    shown = [row for row in table if row["type"] == ALL or not several]
    y = np.arange(len(shown))
    figure = Figure((9, 1.6 + 0.5 * len(shown)), layout="constrained")
    bars, changes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for offset, name, colour, label in ((-0.19, "baseline", GREY, "without gate"), (0.19, "mean", BLUE, "with gate")):
        found = bars.barh(y + offset, [100 * row[name] for row in shown], 0.36, color=colour, label=label)
        bars.bar_label(found, fmt="%.1f", padding=3, fontsize=8, color=DARK)
    bars.set(xlim=(0, 112), xlabel="score (%)", xticks=range(0, 101, 20))
    name = "setting" if several else "type"
    bars.set_yticks(y, [f"{row[name][:40]}\nn = {row['n']}, {row['n_videos']} videos" for row in shown], fontsize=9)
    bars.invert_yaxis()
    _draw_differences(changes, shown)
    changes.set_xlabel("difference (points), 95% interval")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    for axes in (bars, changes):
        axes.tick_params(axis="y", length=0)
    return _png(figure)


@plain_text()
def draw_search(trials: Sequence[Trial], held_out: Difference | None, conclusion: str) -> bytes:
    """The last line search of each coordinate, a line a rung, and the difference on the questions held out."""
    figure = Figure((11, 3.8), layout="constrained")
    figure.suptitle(wrapped(conclusion, 140), fontsize=10)
    *searches, judged = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for axes, coordinate, colour in zip(searches, ("alpha_k", "alpha_v"), (BLUE, ORANGE), strict=True):
        mine = [trial for trial in trials if trial.coordinate == coordinate]
        _draw_line_search(axes, [trial for trial in mine if trial.search_pass == mine[-1].search_pass], colour)
        axes.set(xlabel=coordinate, ylabel="mean score, search part (%)")
    judged.set_xlabel("difference on held-out questions\n(points), 95% interval")
    if held_out is None:
        _say(judged, "no gate chosen")
    else:
        _draw_differences(judged, [asdict(held_out)])
        judged.set_title(held_out.verdict, fontsize=9)
    judged.set(yticks=[], ylim=(-1, 1))
    return _png(figure)


def _draw_line_search(axes: Any, trials: Sequence[Trial], colour: str) -> None:
    if not trials:
        _say(axes, "one value: not searched")
        return
    values = sorted({getattr(trial, trial.coordinate) for trial in trials})
    n_rungs = trials[-1].rung
    axes.set_title(f"last search, pass {trials[-1].search_pass}: {n_rungs} rungs", fontsize=9)
    for rung in range(1, n_rungs + 1):
        some = [trial for trial in trials if trial.rung == rung]
        x = [values.index(getattr(trial, trial.coordinate)) for trial in some]
        y = [100 * trial.mean for trial in some]
        style = {"color": colour, "alpha": 0.35 + 0.65 * rung / n_rungs, "marker": MARKERS[(rung - 1) % len(MARKERS)]}
        axes.plot(x, y, **style, label=f"rung {rung}: {some[0].n} questions")
        if rung == n_rungs:
            best = next(n for n, trial in enumerate(some) if trial.kept)
            axes.plot(x[best], y[best], "o", ms=14, mfc="none", mec=DARK, label=f"chosen in rung {rung}")
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.margins(x=0.1, y=0.15)
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    axes.set_ylim(min(low, middle - 5), max(high, middle + 5))
    axes.legend(frameon=False, fontsize=8, labelspacing=0.8)


def _draw_differences(axes: Any, rows: Sequence[Row]) -> None:
    """Points with intervals, filled where a gain or a loss is shown. The axis has no less than 5 points to both sides,
    so that nothing looks large."""
    axes.axvline(0, color=DARK, linewidth=0.8)
    edges = [0.0]
    for name, filled in (("gain or loss shown", True), ("no gain shown", False)):
        some = [n for n, row in enumerate(rows) if (row["verdict"] in ("gain", "loss")) == filled]
        if some:
            middle, low, high = (np.array([100 * rows[n][one] for n in some]) for one in ("difference", "low", "high"))
            axes.errorbar(
                middle, some, xerr=np.maximum([middle - low, high - middle], 0), fmt="o", color=BLUE, capsize=3,
                label=name, markerfacecolor=BLUE if filled else "white",
            )  # fmt: skip
            edges += [*low, *high]
    axes.set_xlim(min(1.1 * min(edges), -5), max(1.1 * max(edges), 5))
    axes.spines["left"].set_visible(False)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=DARK)
    axes.set(xticks=[], yticks=[])
    axes.spines["left"].set_visible(False)


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, dpi=150, format="png")
    return content.getvalue()
