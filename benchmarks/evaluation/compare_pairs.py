"""What `videoanchor compare` finds in made-up pairs of results, as files that it reads.

Coverage: two results of the same questions, 0 or 1, whose true difference is 0 though it differs from video to video;
how often the interval holds 0, and how often a difference is shown that is none. Protocols: pairs whose cards differ in
one entry, that differ in none, or that ask other questions; how often each is flagged, not flagged, or refused.

    python benchmarks/evaluation/compare_pairs.py --out benchmarks/results/compare-pairs
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from interval_coverage import study

from videoanchor_triton.app.evaluation.head_to_head import head_to_head
from videoanchor_triton.app.evaluation.readers.reading import read_result
from videoanchor_triton.integrations.errors import InputError

SHAPES = ((20, 10), (40, 10), (100, 10))
SPREADS = (0.0, 0.15, 0.3)
FIRST_SEED = 1_000_000
"""Other pairs than those of interval_coverage.py."""
CARD: dict[str, dict[str, Any]] = {
    "frames": {"max_frames": 32, "fps": None, "sampling": "uniform"},
    "resolution": {"max_frame_pixels": 2**24, "processor_size": {"longest_edge": 602112}},
    "prompt": {"sha256": "0" * 64},
    "generation": {"max_new_tokens": 16, "do_sample": False},
    "seeds": {"scores": 0, "bootstrap": 0},
}
PLANTED = {
    "frames": ("frames", "max_frames", 16),
    "frames a second": ("frames", "fps", 1.0),
    "resolution": ("resolution", "processor_size", {"longest_edge": 301056}),
    "prompt": ("prompt", "sha256", "1" * 64),
    "length of replies": ("generation", "max_new_tokens", 32),
    "seed": ("seeds", "scores", 1),
}


def write(path: Path, scores: np.ndarray, videos: np.ndarray, card: Mapping[str, Any] | None) -> Path:
    """A plain JSONL of scores, with a card."""
    pairs = zip(scores, videos, strict=True)
    rows = [{"id": n, "video": f"{video}.mp4", "score": score} for n, (score, video) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in ([{"card": card}] if card else []) + rows))
    return path


def compared(folder: Path, pair: tuple[np.ndarray, np.ndarray, np.ndarray], card: Any = CARD, other: Any = CARD) -> Any:
    """What `compare` says about two results."""
    after, before, videos = pair
    a, b = write(folder / "a.jsonl", before, videos, card), write(folder / "b.jsonl", after, videos, other)
    return head_to_head(read_result(a), read_result(b))


def coverage(folder: Path, n_studies: int) -> list[dict[str, float]]:
    """A row for each shape and spread."""
    rows = []
    for n_videos, n_each in SHAPES:
        for spread in SPREADS:
            pairs = (study(n_videos, n_each, spread, FIRST_SEED + n) for n in range(n_studies))
            found = [compared(folder, pair)["table"][0] for pair in pairs]
            rows.append(
                {
                    "videos": n_videos,
                    "questions a video": n_each,
                    "spread of the difference": spread,
                    "interval holds the truth": float(np.mean([row["low"] <= 0 <= row["high"] for row in found])),
                    "difference shown": float(np.mean([row["verdict"] != "no difference shown" for row in found])),
                }
            )
            print(rows[-1], flush=True)
    return rows


def protocols(folder: Path, n_pairs: int) -> dict[str, float]:
    """Shares of the pairs in which just what was planted was found."""
    found: dict[str, list[bool]] = {}
    for seed in range(n_pairs):
        pair = study(20, 3, 0.15, seed)
        for name, (section, entry, value) in PLANTED.items():
            other = {**CARD, section: {**CARD[section], entry: value}}
            flags = [flag["what"] for flag in compared(folder, pair, other=other)["flags"]]
            found.setdefault(f"{name}: flagged, and nothing else", []).append(flags == [f"{section}.{entry}"])
        same = compared(folder, pair)
        found.setdefault("equal cards: nothing flagged", []).append(not same["flags"] and not same["unchecked"])
        without = compared(folder, pair, other=None)
        found.setdefault("no card: said of each section", []).append(len(without["unchecked"]) == len(CARD))
        after, before, videos = pair
        a, b = write(folder / "a.jsonl", before, videos, CARD), write(folder / "b.jsonl", after[1:], videos[1:], CARD)
        try:
            refused = not head_to_head(read_result(a), read_result(b))
        except InputError:
            refused = True
        found.setdefault("another set of questions: refused", []).append(refused)
    return {name: float(np.mean(hits)) for name, hits in found.items()}


def markdown(record: dict[str, Any]) -> str:
    """Two tables, shares in percent."""
    shares = ("interval holds the truth", "difference shown")
    lines = [f"| {' | '.join(record['coverage'][0])} |", f"|{'--:|' * len(record['coverage'][0])}"]
    for row in record["coverage"]:
        cells = [f"{100 * value:.1f}" if name in shares else f"{value:g}" for name, value in row.items()]
        lines.append(f"| {' | '.join(cells)} |")
    error = 100 * (0.95 * 0.05 / record["studies"]) ** 0.5
    lines += ["", f"{record['studies']} pairs a row: the standard error of a coverage of 95% is {error:.1f}.", ""]
    lines += [f"| planted in {record['pairs']} pairs | found, % |", "|:--|--:|"]
    lines += [f"| {name} | {100 * share:g} |" for name, share in record["protocols"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the tables, and writes them with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, metavar="N", help="a row; default: %(default)s")
    parser.add_argument(
        "--pairs", type=int, default=100, metavar="N", help="with each difference; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for compare-pairs.md and .json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record: dict[str, Any] = {
            "numpy": version("numpy"),
            "studies": args.studies,
            "pairs": args.pairs,
            "protocols": protocols(Path(folder), args.pairs),
            "coverage": coverage(Path(folder), args.studies),
        }
    text = markdown(record)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "compare-pairs.md").write_text(text)
        (args.out / "compare-pairs.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
