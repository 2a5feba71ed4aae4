"""What the measurements of scores and of video share: rows to CSV, JSON and Markdown, and the look of their figures."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, with markers: told apart by the colour-blind and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def write(out: Path, name: str, environment: dict[str, str], rows: list[Any], summary: str) -> None:
    """Write out/name.csv, .json and .md: rows are instances of one dataclass, each written with the environment."""
    write_record(out, name, environment, rows, summary)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*environment, *(field.name for field in fields(rows[0]))], lineterminator="\n")
        writer.writeheader()
        writer.writerows(environment | asdict(row) for row in rows)


def write_record(out: Path, name: str, environment: dict[str, str], rows: list[Any], summary: str) -> None:
    """The same without a table for programs, of rows that hold more than numbers and text."""
    out.mkdir(parents=True, exist_ok=True)
    content = environment | {"rows": [asdict(row) for row in rows]}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    measured_on = ", ".join(f"{key} {value}" for key, value in environment.items())
    (out / f"{name}.md").write_text(f"{summary}\n\n{measured_on}\n")


def table(rows: Iterable[Any], columns: dict[str, Callable[[Any], object]]) -> str:
    """A Markdown table: a header and a value of each row for each column, floats to 3 digits, None as nothing."""
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [f"| {' | '.join(_text(value(row)) for value in columns.values())} |" for row in rows]
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def line(panel: Axes, number: int, name: str, points: Iterable[tuple[float, float]], dashed: bool = False) -> None:
    """Draw one line through sorted points, in the colour and with the marker of its number."""
    points = sorted(points)
    if not points:
        return
    panel.plot(
        *zip(*points, strict=True), label=name, color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)], linestyle="--" if dashed else "-", markersize=5.5, linewidth=1.6,
    )  # fmt: skip
    panel.grid(color="#DDDDDD", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, environment: dict[str, str], legend: Axes) -> None:
    """Write the figure with the legend of one of its panels below, and the device and commit it was measured on, and
    close it."""
    handles, names = legend.get_legend_handles_labels()
    bottom = (0.5 + 0.25 * -(-len(names) // 3)) / figure.get_figheight()
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.legend(handles, names, ncols=3, loc="upper center", bbox_to_anchor=(0.5, bottom), fontsize=8, frameon=False)
    changed = " with changes" if environment["dirty"] == "true" else ""
    caption = f"{environment['device']}, torch {environment['torch']}, commit {environment['commit'][:10]}{changed}"
    figure.text(0.5, 0.01, caption, ha="center", fontsize=7, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)
