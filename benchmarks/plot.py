"""Two figures from the CSV of gpu_check.py: prefill TFLOP/s against tokens, decode TB/s against keys.

    python benchmarks/plot.py DIR/gpu_check.csv --out DIR [--heads 28/4]

One line a contender, solid where it applies the gate, dashed where it does not; a dotted line is the ceiling measured
in the same run. Rows without a correct result are not drawn.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

Row = dict[str, str]
# Colours of Okabe and Ito and two of Tol, told apart by the colour-blind and in print; ours have the wide lines.
STYLES = {
    "ours, gated, post-exp": ("#0072B2", "o"),
    "ours, gated, log-bias": ("#56B4E9", "s"),
    "ours, ungated": ("#0072B2", "o"),
    "ours, hopper, gated": ("#D55E00", "D"),
    "ours, hopper, ungated": ("#D55E00", "D"),
    "ours, gated, contiguous": ("#0072B2", "o"),
    "ours, gated, pages of 64": ("#56B4E9", "s"),
    "ours, contiguous, ungated": ("#0072B2", "o"),
    "SDPA flash, ungated": ("#009E73", "^"),
    "SDPA cuDNN, ungated": ("#000000", "v"),
    "SDPA efficient, expanded bias": ("#E69F00", "P"),
    "SDPA dense mask": ("#CC79A7", "X"),
    "SDPA augmented head": ("#999999", "*"),
    "FlexAttention, gated": ("#332288", "h"),
    "FlexAttention, ungated": ("#332288", "h"),
}
OTHER = ("#882255", "p")
PANEL = (4.6, 3.3)


def timed_rows(path: Path) -> list[Row]:
    """The rows with a correct result and a time. ValueError if there are none."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row.get("status") == "ok" and row.get("ms")]
    if not any(row["section"] in ("prefill", "decode") for row in rows):
        raise ValueError(f"{path} holds no times of prefill or decode; run gpu_check.py on a GPU to make one that does")
    return rows


def head_counts(rows: list[Row]) -> list[str]:
    """Query and KV heads as "28/4", in the order of the file."""
    return list(dict.fromkeys(f"{row['query_heads']}/{row['kv_heads']}" for row in rows if row["query_heads"]))


def draw(rows: list[Row], section: str, heads: str) -> Figure | None:
    """The figure of "prefill" (a panel a head dim and mask) or "decode" (a panel a batch), or None without rows."""
    chosen = [r for r in rows if r["section"] == section and f"{r['query_heads']}/{r['kv_heads']}" == heads]
    # what is timed to settle a table of kernels/measured.py is in summary.md
    chosen = [r for r in chosen if not r["contender"].startswith("candidate ") and "few queries" not in r["contender"]]
    if not chosen:
        return None
    across, down = ("causal", "head_dim") if section == "prefill" else ("batch", "head_dim")
    columns = sorted({row[across] for row in chosen}, key=lambda value: (len(value), value))
    lines = sorted({row[down] for row in chosen}, key=int, reverse=True)
    unit = chosen[0]["unit"]
    ceiling = next((float(r["rate"]) for r in rows if r["section"] == "ceiling" and r["unit"] == unit), None)
    size = (PANEL[0] * len(columns), PANEL[1] * len(lines) + 1.9)
    figure, axes = plt.subplots(len(lines), len(columns), figsize=size, sharex=True, sharey=True, squeeze=False)
    for panels, line in zip(axes, lines, strict=True):
        for panel, column in zip(panels, columns, strict=True):
            here = [row for row in chosen if row[across] == column and row[down] == line]
            _panel(panel, here, ceiling)
            mask = {"True": "causal", "False": "not causal"}
            panel.set_title(f"D={line}, {mask[column] if section == 'prefill' else f'batch {column}'}", fontsize=10)
        panels[0].set_ylabel(unit)
    for panel in axes[-1]:
        panel.set_xlabel("tokens" if section == "prefill" else "keys in the cache")
    names = list(dict.fromkeys(row["contender"] for row in chosen))
    handles = {name: line for panel in axes.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    ordered = [*(name for name in STYLES if name in names), *(name for name in names if name not in STYLES), "ceiling"]
    ordered = [name for name in ordered if name in handles]
    first = chosen[0]
    caption = f"{first['device']}, driver {first['driver']}, torch {first['torch']}, triton {first['triton']}, "
    caption += f"commit {first['commit'][:10]}{' with changes' if first['dirty'] == 'true' else ''}"
    figure.suptitle(f"{section}, bf16, {heads.replace('/', ' query heads over ')} KV heads", fontsize=11)
    bottom = 1.15 / size[1]
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.legend(
        [handles[name] for name in ordered], [_label(name, ceiling, unit) for name in ordered], ncols=3,
        loc="upper center", bbox_to_anchor=(0.5, bottom), fontsize=8, frameon=False,
    )  # fmt: skip
    figure.text(0.5, 0.01, caption, ha="center", fontsize=7, color="#555555")
    return figure


def _label(name: str, ceiling: float | None, unit: str) -> str:
    what = "matrix product" if unit == "TFLOP/s" else "copy"
    return name if name != "ceiling" or ceiling is None else f"{what} in the same run, {ceiling:.3g} {unit}"


def _panel(panel: Axes, rows: list[Row], ceiling: float | None) -> None:
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((int(row["keys"]), float(row["rate"])) for row in rows if row["contender"] == name)
        colour, marker = STYLES.get(name, OTHER)
        ungated = name.endswith("ungated")
        panel.plot(
            *zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=5.5,
            linestyle="--" if ungated else "-", markerfacecolor="white" if ungated else colour,
            linewidth=2.2 if name.startswith("ours") else 1.2, zorder=3 if name.startswith("ours") else 2,
        )  # fmt: skip
    if ceiling is not None:
        panel.axhline(ceiling, color="#555555", linestyle=":", linewidth=1.2, label="ceiling", zorder=1)
    keys = sorted({int(row["keys"]) for row in rows})
    panel.set_xscale("log", base=2)
    if keys:
        panel.set_xticks(keys, [f"{key // 1024}k" if key % 1024 == 0 else str(key) for key in keys])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="gpu_check.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for prefill.png and decode.png")
    parser.add_argument("--heads", help="query and KV heads to draw, such as 28/4 (default: the first in the file)")
    options = parser.parse_args(arguments)
    try:
        rows = timed_rows(options.csv)
        known = head_counts(rows)
        heads = options.heads or known[0]
        if heads not in known:
            raise ValueError(f"--heads must be one of {', '.join(known)}, got {heads}")
    except (OSError, ValueError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for section in ("prefill", "decode"):
        figure = draw(rows, section, heads)
        if figure is not None:
            figure.savefig(options.out / f"{section}.png", dpi=150)
            plt.close(figure)
            print(options.out / f"{section}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
