"""Which score finds the objects that all frames share, and does it depend on how large they are?

    python benchmarks/scores/cross_frame.py --out DIR [--quick]

Clips of six frames with known truth; `clips` says what they are:

    subspaces   objects on affine subspaces: three in all frames, two in three frames, six in one frame; the size is
                that of an object in all frames over one in a single frame. With the true number of clusters, and with
                the published 24.
    camera      a camera that moves over a photograph: the place of each token is known exactly, and whether all frames
                show it; the size is how far the camera moves, in widths of a frame. ARI is against a 4 x 6 grid over
                the photograph, which is no segmentation: it only compares methods.
    half        the left part of each frame is such a camera over one photograph, the rest another part of the other
                photograph in every frame; the size is the share of the left part.

    auc         of the score for "token belongs to what all frames show" (0.5 by chance)
    ari         adjusted Rand index of the labels against the truth; the first five methods share their labels
    shared      share of tokens that belong to what all frames show

The tokens of photographs are patches that went through a network of random weights, no trained vision encoder.

Writes DIR/cross-frame.csv, .json, .md and .png.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.scores.helpers.token_sets import POOLED, embedded
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores, expression_score
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.anchor.spectral import spectral_subspaces

NAME = "cross-frame"
N_FRAMES = 6
PUBLISHED_CLUSTERS = 24
SCORES = ("published", "size", "row_sum", "projector", "cross_frame")
METHODS = (*SCORES, "kmeans", "uniform")
PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # scikit-learn's
SUBSPACE_SIZES, MOTIONS, PARTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.25, 0.4), (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Clip:
    """Tokens of a clip and the truth about them.

    Attributes:
        X: (N, D) float32, one token a row.
        frames: (N,) frame of each token.
        truth: (N,) object or place of each token.
        shared: (N,) bool, all frames show it.
        n_clusters: clusters to look for.
    """

    X: np.ndarray
    frames: np.ndarray
    truth: np.ndarray
    shared: np.ndarray
    n_clusters: int = PUBLISHED_CLUSTERS


@dataclass(frozen=True)
class Row:
    """A method on a clip; see the top of this file for the measures."""

    case: str
    size: float
    seed: int
    method: str
    tokens: int
    shared: float
    auc: float
    ari: float
    seconds: float


def subspaces(size: float, seed: int, per_frame: int = 72, n_clusters: int | None = None) -> Clip:
    """Objects of centre + 4-dimensional subspace in 96 dimensions, with noise half as large as they are."""
    random = np.random.default_rng(seed)
    half = N_FRAMES // 2
    appears = [range(N_FRAMES)] * 3 + [range(half), range(half, N_FRAMES)] + [[f] for f in range(N_FRAMES)]
    total = np.array([size] * 3 + [1.0] * (len(appears) - 3)) * random.uniform(0.75, 1.25, len(appears))
    objects, frames = [], []
    for frame in range(N_FRAMES):
        here = [k for k, seen in enumerate(appears) if frame in seen]
        weight = np.array([total[k] / len(appears[k]) for k in here])
        count = np.maximum(1, np.round(per_frame * weight / weight.sum()).astype(int))
        objects.append(np.repeat(here, count))
        frames.append(np.full(count.sum(), frame))
    truth, n_features, dim = np.concatenate(objects), 96, 4
    centres = random.standard_normal((len(appears), n_features)) / n_features**0.5
    bases = random.standard_normal((len(appears), dim, n_features)) / n_features**0.5
    X = centres[truth] + np.einsum("nd,ndf->nf", random.standard_normal((len(truth), dim)), bases[truth]) / dim**0.5
    X += 0.5 * random.standard_normal(X.shape) / n_features**0.5
    return Clip(X.astype(np.float32), np.concatenate(frames), truth, truth < 3, n_clusters or len(appears))


def camera(photograph: int, motion: float, seed: int, rows: int = 9, columns: int = 12) -> Clip:
    """A camera that pans in a random direction, with some shake and zoom, over the middle of a photograph."""
    random = np.random.default_rng(seed)
    image = load_sample_images().images[photograph]
    boxes = _camera_path(image.shape, 0.55 * image.shape[1] * np.array([1, rows / columns]), motion, random)
    pixels = np.concatenate([_patches(image, box, rows, columns).reshape(rows * columns, -1) for box in boxes])
    x, y = np.concatenate([_centres(box, rows, columns) for box in boxes]).T
    shared = np.all([(left < x) & (x < right) & (top < y) & (y < bottom) for left, top, right, bottom in boxes], axis=0)
    height, width = image.shape[:2]
    place = (y // (height / 4)).astype(int) * 6 + (x // (width / 6)).astype(int)
    return Clip(
        embedded(pixels, random).astype(np.float32), np.repeat(np.arange(N_FRAMES), rows * columns), place, shared
    )


def half(photograph: int, part: float, seed: int, rows: int = 9, columns: int = 12) -> Clip:
    """The left `part` of each frame moves little over one photograph, the rest is a sixth of the other one."""
    random = np.random.default_rng(seed)
    images = load_sample_images().images
    image, other = images[photograph], images[1 - photograph]
    height, width = other.shape[:2]
    n_left = round(part * columns)
    boxes = _camera_path(image.shape, 0.5 * image.shape[1] * np.array([part, rows / columns]), 0.1, random)
    pixels, truth = [], []
    for frame, sixth in enumerate(random.permutation(N_FRAMES)):
        left, top = sixth % 3 * width / 3, sixth // 3 * height / 2
        right_part = _patches(other, (left, top, left + width / 3, top + height / 2), rows, columns - n_left)
        pixels.append(np.concatenate([_patches(image, boxes[frame], rows, n_left), right_part], 1))
        truth.append(np.tile(np.where(np.arange(columns) < n_left, 0, 1 + frame), rows))
    found = np.concatenate(truth)
    tokens = embedded(np.concatenate(pixels).reshape(len(found), -1), random).astype(np.float32)
    return Clip(tokens, np.repeat(np.arange(N_FRAMES), rows * columns), found, found == 0)


def _camera_path(
    shape: tuple[int, ...], view: np.ndarray, motion: float, random: np.random.Generator
) -> list[tuple[float, ...]]:
    """Boxes (left, top, right, bottom) of about the size `view` (2,), inside a photograph of `shape`."""
    whole = np.array([shape[1], shape[0]], dtype=float)
    angle = random.uniform(0, 2 * np.pi)
    direction = np.array([np.cos(angle), np.sin(angle)])
    boxes = []
    for t in np.linspace(-1, 1, N_FRAMES):
        extent = view * random.uniform(0.95, 1.05)
        offset = motion * view * t * direction + 0.05 * view * random.uniform(-1, 1, 2)
        corner = np.clip((whole - extent) / 2 + offset, 0, whole - extent)
        boxes.append((*corner, *np.minimum(corner + extent, whole)))
    return boxes


def _patches(image: np.ndarray, box: tuple[float, ...], rows: int, columns: int) -> np.ndarray:
    """(rows, columns, values) pixels of the patches of a view."""
    size = (columns * POOLED, rows * POOLED)
    view = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box=box), dtype=np.float64)  # pyright: ignore[reportArgumentType]
    return view.reshape(rows, POOLED, columns, POOLED, 3).swapaxes(1, 2).reshape(rows, columns, -1)


def _centres(box: tuple[float, ...], rows: int, columns: int) -> np.ndarray:
    """(rows * columns, 2) x and y of the patches in the photograph."""
    left, top, right, bottom = box
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    y = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
    return np.stack([np.tile(x, rows), np.repeat(y, columns)], 1)


def clips(quick: bool) -> Iterator[tuple[str, float, int, Clip]]:
    """Case, size, seed, clip."""
    for seed in range(1 if quick else 10):
        for size in SUBSPACE_SIZES[:: 5 if quick else 1]:
            yield "subspaces", size, seed, subspaces(size, seed, 24 if quick else 72)
            if not quick:
                yield "subspaces, 24 clusters", size, seed, subspaces(size, seed, n_clusters=PUBLISHED_CLUSTERS)
    grid = (3, 4) if quick else (9, 12)
    for seed in range(1 if quick else 5):
        for number, name in enumerate(PHOTOGRAPHS[: 1 if quick else 2]):
            for motion in MOTIONS[:: 2 if quick else 1]:
                yield f"camera, {name}", motion, seed, camera(number, motion, seed, *grid)
            for part in PARTS[:: 2 if quick else 1]:
                yield f"half, {name}", part, seed, half(number, part, seed, *grid)


def clip_rows(case: str, size: float, seed: int, clip: Clip) -> Iterator[Row]:
    """Every method on a clip; the scores of self-expression share one solution."""
    config = VideoAnchorConfig(alpha_k=0, alpha_v=0, n_clusters=clip.n_clusters)
    frames = torch.from_numpy(clip.frames)

    def row(method: str, scores: torch.Tensor, labels: torch.Tensor, seconds: float) -> Row:
        return Row(
            case, size, seed, method, len(clip.X), float(clip.shared.mean()),
            auc=float(roc_auc_score(clip.shared, scores.numpy())),
            ari=float(adjusted_rand_score(clip.truth, labels.numpy())), seconds=seconds,
        )  # fmt: skip

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = self_expression(token_features(torch.from_numpy(clip.X), config.pca_rank), config)
    found = spectral_subspaces(solution.affinity(), config.n_clusters)
    seconds = time.perf_counter() - start
    for score in SCORES:
        scores = expression_score(solution, found.labels, score, frames=frames, sizes=found.projector_size)
        yield row(score, scores, found.labels, seconds)
    for scorer in ("kmeans", "uniform"):
        start = time.perf_counter()
        settings = VideoAnchorConfig(alpha_k=0, alpha_v=0, n_clusters=clip.n_clusters, scorer=scorer)
        result = anchor_scores(clip.X, settings)
        yield row(scorer, result.scores, result.labels, time.perf_counter() - start)


def mean_of(rows: list[Row], measure: str, **chosen: object) -> float:
    """The mean of a measure over the rows with the chosen values."""
    here = [row for row in rows if all(getattr(row, name) == value for name, value in chosen.items())]
    return float(np.mean([getattr(row, measure) for row in here]))


def verdict(rows: list[Row], case: str) -> str:
    """How often cross_frame finds the shared objects better than the published score in a case."""
    auc = {(row.size, row.seed, row.method): row.auc for row in rows if row.case == case}
    pairs = [(auc[size, seed, "cross_frame"], auc[size, seed, "published"]) for size, seed in {k[:2] for k in auc}]
    better = sum(ours > theirs for ours, theirs in pairs)
    worst = min(ours for ours, _ in pairs)
    return (
        f"- {case}: cross_frame above published in {better} of {len(pairs)} clips, mean AUC "
        f"{mean_of(rows, 'auc', case=case, method='cross_frame'):.3f} against "
        f"{mean_of(rows, 'auc', case=case, method='published'):.3f}; its lowest is {worst:.3f}. ARI "
        f"{mean_of(rows, 'ari', case=case, method='published'):.3f}, of k-means "
        f"{mean_of(rows, 'ari', case=case, method='kmeans'):.3f}."
    )


def summary(rows: list[Row]) -> str:
    """Markdown: what the numbers say, and a table for each case."""
    cases = list(dict.fromkeys(row.case for row in rows))
    parts = [
        "# Scores that look across frames",
        "AUC of each score for tokens that belong to what all frames show, and ARI of the labels; means over seeds, in "
        "the figure with bands from the lowest to the highest of published and cross_frame. "
        "Published, size, row_sum, projector and cross_frame share their labels, so that only k-means differs in ARI. "
        "The formula of cross_frame was chosen on clips of other seeds. The tokens come from "
        "made-up subspaces and from photographs through random weights: nothing here says what a trained model's "
        "answers gain.",
        "\n".join(verdict(rows, case) for case in cases),
    ]

    def column(method: str, measure: str) -> Callable[[tuple[str, float]], object]:
        return lambda key: mean_of(rows, measure, case=key[0], size=key[1], method=method)

    columns: dict[str, Callable[[tuple[str, float]], object]] = {
        "size": lambda key: key[1],
        "shared": column("published", "shared"),
        **{f"AUC {method}": column(method, "auc") for method in METHODS},
        "ARI ssc": column("published", "ari"),
        "ARI kmeans": column("kmeans", "ari"),
        "ARI uniform": column("uniform", "ari"),
    }
    for case in cases:
        here = [row for row in rows if row.case == case]
        tokens, seeds = {row.tokens for row in here}, {row.seed for row in here}
        parts.append(f"## {case}: {min(tokens)} to {max(tokens)} tokens, {len(seeds)} seeds")
        parts.append(report.table([(case, size) for size in sorted({row.size for row in here})], columns))
    return "\n\n".join(parts)


def draw(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """AUC against size, a panel a case; lines are means over seeds, bands reach from the lowest to the highest."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = plt.subplots(2, -(-len(cases) // 2), figsize=(10, 6.8), sharey=True, squeeze=False)
    for panel, case in zip(axes.flat, cases, strict=False):
        sizes = sorted({row.size for row in rows if row.case == case})
        for number, method in enumerate(METHODS):
            here = [[r.auc for r in rows if (r.case, r.size, r.method) == (case, size, method)] for size in sizes]
            report.line(panel, number, method, zip(sizes, map(np.mean, here), strict=True), dashed=method == "uniform")
            if method in ("published", "cross_frame"):
                colour = report.COLOURS[number]
                panel.fill_between(sizes, [*map(min, here)], [*map(max, here)], color=colour, alpha=0.15, linewidth=0)
        if case.startswith("subspaces"):
            panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        label = {"subspaces": "size, shared / single-frame object", "camera": "motion / width of a frame"}
        panel.set(title=case, xlabel=label.get(case.split(",")[0], "share of the frame"), ylim=(-0.03, 1.03))
        panel.title.set_fontsize(10)
    for panel in axes.flat[len(cases) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("AUC, seen in all frames")
    report.save(figure, path, measured_on, axes[0, 0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="a few small clips, to see that everything runs")
    options = parser.parse_args(arguments)
    measured_on = environment(torch.device("cpu"), processor())
    rows: list[Row] = []
    for case, size, seed, clip in clips(options.quick):
        found = list(clip_rows(case, size, seed, clip))
        rows += found
        print(f"{case} {size:g}, seed {seed}: " + "  ".join(f"{r.method} {r.auc:.3f}" for r in found), flush=True)
    cases = list(dict.fromkeys(row.case for row in rows))
    rows.sort(key=lambda row: (cases.index(row.case), row.size, row.seed))
    report.write(options.out, NAME, measured_on, rows, summary(rows))
    draw(rows, options.out / f"{NAME}.png", measured_on)
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
