"""How often the 95% intervals of `videoanchor eval` cover the truth where questions share videos: drawn by video, as
the command does, and by question, as if the questions had nothing in common.

Made-up evaluations: without the gate a question is right with probability 0.5, with it with 0.5 + the effect on its
video, which differs from video to video by a normal distribution of mean 0. The true difference is 0.

    python benchmarks/evaluation/interval_coverage.py --out benchmarks/results/interval-coverage
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from videoanchor_triton.app.evaluation.paired import compare

SHAPES = ((40, 1), (6, 10), (10, 10), (20, 10), (40, 10), (288, 18))
"""Videos and questions a video; the last is about the size of VSI-Bench."""
SPREADS = (0.0, 0.15, 0.3)
"""Standard deviation of the effect over the videos."""


def study(n_videos: int, n_each: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with and without the gate, (n,) float64 0 or 1, and the number of the video of each question."""
    rng = np.random.default_rng([seed, n_videos, n_each, round(100 * spread)])
    videos = np.repeat(np.arange(n_videos), n_each)
    effect = np.clip(spread * rng.standard_normal(n_videos), -0.5, 0.5)[videos]
    before, after = rng.random((2, len(videos))) < np.stack([np.full(len(videos), 0.5), 0.5 + effect])
    return after.astype(float), before.astype(float), videos


def row(n_videos: int, n_each: int, spread: float, n_studies: int) -> dict[str, float]:
    """Shares of the studies whose interval covers 0, and mean widths."""
    covered, width = np.zeros(2), np.zeros(2)
    for seed in range(n_studies):
        after, before, videos = study(n_videos, n_each, spread, seed)
        for way, clusters in enumerate((videos, np.arange(len(videos)))):
            found = compare(after, before, clusters, seed=seed)
            covered[way] += found.low <= 0 <= found.high
            width[way] += found.high - found.low
    by_video, by_question = covered / n_studies
    wide, narrow = width / n_studies
    return {
        "videos": n_videos,
        "questions a video": n_each,
        "spread of the effect": spread,
        "coverage by video": by_video,
        "coverage by question": by_question,
        "width by video": wide,
        "width by question": narrow,
    }


def markdown(rows: list[dict[str, float]], n_studies: int) -> str:
    """The table, shares and widths in percent."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{'--:|' * len(rows[0])}"]
    for one in rows:
        shown = [
            f"{100 * value:.1f}" if name.startswith(("cov", "width")) else f"{value:g}" for name, value in one.items()
        ]
        lines.append(f"| {' | '.join(shown)} |")
    error = 100 * (0.95 * 0.05 / n_studies) ** 0.5
    return (
        "\n".join(lines) + f"\n\n{n_studies} studies a row: the standard error of a coverage of 95% is {error:.1f}.\n"
    )


def main() -> None:
    """Prints the table, and writes it with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, metavar="N", help="a row; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for interval-coverage.md and .json")
    args = parser.parse_args()
    rows = [row(*shape, spread, args.studies) for shape in SHAPES for spread in SPREADS if shape[1] > 1 or not spread]
    text = markdown(rows, args.studies)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "interval-coverage.md").write_text(text)
        record = {"numpy": version("numpy"), "studies": args.studies, "rows": rows}
        (args.out / "interval-coverage.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
