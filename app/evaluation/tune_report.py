"""What `videoanchor tune` leaves: the conclusion, the table and the picture of its search, and all of it as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..viz.plain_text import plain_text
from .paired import Difference
from .report import BLUE, DARK, difference_range, draw_differences, markdown_cell
from .tune import Trial

ORANGE = "#D55E00"  # of Okabe and Ito's palette, with BLUE
STRENGTHS = {"alpha_k": BLUE, "alpha_v": ORANGE}
MARKERS = "osD^vP*X"


def markdown(conclusion: str, rows: Sequence[dict[str, Any]], about: Mapping[str, str]) -> str:
    """The conclusion, what was run, and each step of the search as a table; scores in percent."""
    head = ["| | |", "|:--|:--|", *(f"| {name} | {markdown_cell(text)} |" for name, text in about.items()), ""]
    names = list(rows[0]) if rows else []
    lines = [
        f"| {' | '.join('mean (%)' if name == 'mean' else name for name in names)} |",
        f"|{'--:|' * len(names)}",
        *(f"| {' | '.join(_cell(name, row[name]) for name in names)} |" for row in rows),
    ]
    return f"**{conclusion}**\n\n" + "\n".join([*head, *lines]) + "\n"


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if name == "mean":
        return f"{100 * value:.1f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@plain_text()
def draw_search(path: Path, trials: Sequence[Trial], held_out: Difference | None, conclusion: str) -> None:
    """The last line search of each coordinate, a line a rung, and the difference on the questions held out."""
    figure, panels = _figure(conclusion)
    for axes, coordinate in zip(panels, STRENGTHS, strict=False):
        mine = [trial for trial in trials if trial.coordinate == coordinate]
        last = max((trial.search_pass for trial in mine), default=0)
        mine = [trial for trial in mine if trial.search_pass == last]
        values = sorted({getattr(trial, coordinate) for trial in mine})
        n_rungs = max((trial.rung for trial in mine), default=0)
        for rung in range(1, n_rungs + 1):
            some = [trial for trial in mine if trial.rung == rung]
            x = [values.index(getattr(trial, coordinate)) for trial in some]
            y = [100 * trial.mean for trial in some]
            strength = 0.35 + 0.65 * rung / n_rungs
            style = {"color": STRENGTHS[coordinate], "alpha": strength, "marker": MARKERS[(rung - 1) % len(MARKERS)]}
            axes.plot(x, y, **style, label=f"rung {rung}: {some[0].n} questions")
            if rung == n_rungs:
                best = next(n for n, trial in enumerate(some) if trial.kept)
                axes.plot(x[best], y[best], "o", ms=14, mfc="none", mec=DARK, label="chosen")
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(xlabel=coordinate, ylabel="mean score, search part (%)")
        axes.margins(x=0.1, y=0.15)
        low, high = axes.get_ylim()
        middle = (low + high) / 2
        axes.set_ylim(min(low, middle - 5), max(high, middle + 5))
        if mine:
            axes.legend(frameon=False, fontsize=8, labelspacing=0.8)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "one value: not searched", transform=axes.transAxes, ha="center", color=DARK)
    _finish(figure, panels, held_out, path)


@plain_text()
def draw_descent(path: Path, steps: Sequence[dict[str, Any]], held_out: Difference | None, conclusion: str) -> None:
    """The loss and the strengths over the steps, and the difference on the questions held out."""
    figure, panels = _figure(conclusion)
    x = [step["step"] for step in steps]
    panels[0].plot(x, [step["loss"] for step in steps], color=DARK, marker=".")
    panels[0].set(xlabel="step", ylabel="-log p(right answer), mean of the step")
    for (name, colour), marker in zip(STRENGTHS.items(), "os", strict=True):
        panels[1].plot(x, [step[name] for step in steps], color=colour, marker=marker, ms=3, label=name)
    panels[1].set(xlabel="step", ylabel="strength", ylim=(0, None))
    panels[1].legend(frameon=False, fontsize=9)
    for axes in panels[:2]:
        axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, panels, held_out, path)


def _figure(conclusion: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(conclusion, fontsize=10)
    return figure, figure.subplots(1, 3, width_ratios=(3, 3, 2))


def _finish(figure: Any, panels: Any, held_out: Difference | None, path: Path) -> None:
    axes = panels[2]
    axes.set(yticks=[], xlabel="difference on held-out questions\n(points), 95% interval", ylim=(-1, 1))
    if held_out is None:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no gate chosen", transform=axes.transAxes, ha="center", color=DARK)
    else:
        axes.axvline(0, color=DARK, linewidth=0.8)
        draw_differences(axes, np.zeros(1), [held_out])
        axes.set_title(held_out.verdict, fontsize=9)
        axes.set_xlim(difference_range([100 * held_out.low, 100 * held_out.high]))
    axes.spines["left"].set_visible(False)
    for one in panels:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
