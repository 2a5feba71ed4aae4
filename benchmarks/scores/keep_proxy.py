"""How far does attention move when visual tokens are merged or dropped, by rule? A proxy: no model, made-up clips.

    python benchmarks/scores/keep_proxy.py --out DIR [--quick]

Clips of `cross_frame.py` (a camera that moves a quarter of a frame; half a frame of it), six frames of 9 x 12 tokens,
scikit-learn's two photographs, seeds 0 to 4: 20 clips. Keys, queries and values are random projections of the centred
tokens to one head of 128, rotary angles of three axes (16, 24 and 24 pairs, base 10,000); 200 queries, each half noise
and half a token, after the video, with logits times 2.5. No gate.

    counts, mean, drop   |output - that of all tokens| / |that of all tokens|, by what becomes of groups (`merge`)

`va.compress` groups, told the same angles. EVS keeps its first frame, a sixth, whole: fewer it does not leave.

Writes DIR/keep-proxy.csv, .json and .md.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import videoanchor_triton as va
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.scores.cross_frame import N_FRAMES, Clip, camera, half
from videoanchor_triton.anchor.grouping import Group, Merge

NAME = "keep-proxy"
KEEPS = (0.5, 0.25, 0.1)
WIDTH, N_QUERIES, SHARPNESS = 128, 200, 2.5
AXES = torch.tensor([0] * 16 + [1] * 24 + [2] * 24)


@dataclass(frozen=True)
class Row:
    """The relative error of a rule on a clip; see the top of this file."""

    case: str
    photograph: int
    seed: int
    keep: float
    group: Group
    merge: Merge
    error: float


def angles(place: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (n, 64) each."""
    phase = place[:, AXES].float() * 10000.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2))
    return phase.cos(), phase.sin()


def rotated(x: Tensor, place: Tensor) -> Tensor:
    cosine, sine = angles(place)
    first, second = x.chunk(2, 1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], 1)


def clip_rows(clip: Clip, seed: int, **of_row: int | str) -> Iterator[Row]:
    """The errors on a clip, by each rule that can leave as many tokens."""
    tokens = torch.as_tensor(clip.X).float()
    tokens = tokens - tokens.mean(0)
    n, width = tokens.shape
    place = torch.cartesian_prod(torch.arange(N_FRAMES), torch.arange(n // N_FRAMES // 12), torch.arange(12))
    generator = torch.Generator().manual_seed(seed)
    to_query, to_key, to_value = torch.randn(3, width, WIDTH, generator=generator) / width**0.5
    # tokens have a mean square of their own, noise is given the same
    noise = torch.randn(N_QUERIES, width, generator=generator) * tokens.square().mean().sqrt()
    asked = 0.5 * noise + 0.5 * tokens[torch.randint(n, (N_QUERIES,), generator=generator)]
    after = (N_FRAMES + 12 + torch.arange(N_QUERIES))[:, None].expand(-1, 3)
    scale = SHARPNESS / (tokens.square().mean() * WIDTH**0.5)
    query = rotated(asked @ to_query * scale, after)

    def attend(features: Tensor, at: Tensor, log_counts: Tensor) -> Tensor:
        keys = rotated(features @ to_key, at)
        return (query @ keys.T + log_counts).softmax(-1) @ (features @ to_value)

    whole = attend(tokens, place, torch.zeros(n))
    plain = va.VideoAnchorConfig(alpha_k=0, alpha_v=0)
    scores, rotary = va.anchor_scores(tokens, plain), torch.cat(angles(place), 1)
    for keep, group, merge in product(KEEPS, get_args(Group), get_args(Merge)):
        if group == "evs" and keep < 1 / N_FRAMES:
            continue
        config = va.VideoAnchorConfig(alpha_k=0, alpha_v=0, keep=keep, group=group, merge=merge, random_state=seed)
        merged = va.compress(tokens, config, scores=scores, grid=place, rotary=rotary)
        out = attend(merged.features, place[merged.kept], merged.log_gamma_k)
        error = float((out - whole).norm() / whole.norm())
        yield Row(**of_row, seed=seed, keep=keep, group=group, merge=merge, error=error)  # pyright: ignore[reportArgumentType]


def measure(seeds: int, photographs: int) -> Iterator[Row]:
    for seed, photograph in product(range(seeds), range(photographs)):
        yield from clip_rows(camera(photograph, 0.25, seed), seed, case="camera", photograph=photograph)
        yield from clip_rows(half(photograph, 0.5, seed), seed, case="half", photograph=photograph)


def summary(rows: list[Row]) -> str:
    """Markdown: a table for each share, camera / half, the mean over clips."""

    def mean(keep: float, group: Group, merge: Merge) -> str:
        errors = [
            [one.error for one in rows if (one.case, one.keep, one.group, one.merge) == (case, keep, group, merge)]
            for case in ("camera", "half")
        ]
        return " / ".join(f"{statistics.mean(part):.3f}" for part in errors if part)

    header = [f"{merge} {keep:g}" for keep in KEEPS for merge in get_args(Merge)]
    lines = [f"| camera / half | {' | '.join(header)} |", "| --- " * (1 + len(header)) + "|"]
    for group in get_args(Group):
        cells = [mean(keep, group, merge) for keep in KEEPS for merge in get_args(Merge)]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    clips = len({(one.case, one.photograph, one.seed) for one in rows})
    return "\n".join([f"# Merged tokens: relative error of the attention's output, {clips} clips, a proxy", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one seed and photograph, to see that everything runs")
    options = parser.parse_args(arguments)
    rows = list(measure(1, 1) if options.quick else measure(5, 2))
    report.write(options.out, NAME, environment(torch.device("cpu"), processor()), rows, summary(rows))
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
