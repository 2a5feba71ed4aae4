"""How far are the scores of a stream from those of all tokens solved at once?

    python benchmarks/scores/streaming.py --out DIR [--quick] [--cache]

A clip arrives in chunks: first a quarter of its tokens, then equal parts. Once the bound on the dictionary varies, once
the size of the later chunks. Clips: tokens of subspaces that all frames share, tokens as a vision encoder leaves them,
and a camera over two photographs, once in turn and once one after the other, which is a cut that the first chunk does
not show. `token_sets.py` says what they are.

    row_sum    Spearman correlation of the row sums with those of all tokens solved at once, of the tokens after the
               first chunk; score: the same of the scores
    distance   mean absolute difference of the scores, of the same tokens
    ari        adjusted Rand index of the labels against those of all at once, of all tokens; truth_ari: against the
               true subspaces; truth_at_once: of all at once against these
    first      Spearman correlation of the row sums of the first chunk, which are those of its tokens alone
    drift      mean absolute difference of the dictionary's scores after the last chunk and as they were handed out
    seconds    of the whole stream; at_once: of all tokens at once

Writes DIR/ssc-streaming.csv, .json, .md and .png.

--cache: of the same clips, what a bounded cache (`keep`) does to one attention call. 64 of the tokens are queries; keys
and values are random projections of all tokens, gated by the scores that the stream handed out (alpha 1), logits times
2.5 (no model, no positions). The relative error of the output, with the cache in place of all tokens:

    merged     by the stream's `merged`: means, with counts; uncounted: the same without the counts
    newest     only the newest `keep` tokens, with their gates

Writes DIR/ssc-streaming-cache.csv, .json and .md.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.token_sets import Tokens
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.streaming import AnchorStream

NAME = "ssc-streaming"
FIRST = 1 / 4
CACHES = (1 / 2, 1 / 4, 1 / 10)
# What varies, its values, what is fixed meanwhile, its value, and a label; sizes are shares of the clip's tokens.
SWEEPS = (
    ("max_atoms", (1 / 8, 1 / 4, 1 / 2, 1.0), "chunk", 1 / 8, "dictionary / tokens of the clip (chunk 1/8)"),
    ("chunk", (1 / 32, 1 / 16, 1 / 8, 1 / 4), "max_atoms", 1 / 4, "chunk / tokens of the clip (dictionary 1/4)"),
)


@dataclass(frozen=True)
class Row:
    """A clip in chunks; see the top of this file for the measures."""

    case: str
    tokens: int
    first_chunk: int
    chunk: int
    max_atoms: int
    row_sum: float
    score: float
    distance: float
    ari: float
    first: float
    drift: float
    seconds: float
    at_once: float
    truth_ari: float | None = None
    truth_at_once: float | None = None


@dataclass(frozen=True)
class Streamed:
    """What was handed out, in the order of the tokens, and the stream behind it."""

    scores: np.ndarray
    labels: np.ndarray
    row_sums: np.ndarray
    stream: AnchorStream
    seconds: float


def streamed(X: np.ndarray, config: VideoAnchorConfig, first: int, chunk: int, max_atoms: int) -> Streamed:
    """Score (N, D) tokens: `first` of them, then `chunk` at a time."""
    stream = AnchorStream(config, max_atoms=max_atoms)
    scores, labels, row_sums = [], [], []
    start = time.perf_counter()
    for part in np.split(X, range(first, len(X), chunk)):
        result = stream.update(part)
        assert stream.solution is not None
        scores.append(result.scores.numpy())
        labels.append(result.labels.numpy())
        row_sums.append(stream.solution.row_sums()[-len(part) :].numpy())
    seconds = time.perf_counter() - start
    return Streamed(np.concatenate(scores), np.concatenate(labels), np.concatenate(row_sums), stream, seconds)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.asarray(spearmanr(a, b))[0])


def sizes(n_tokens: int, most: int | None) -> list[tuple[int, int]]:
    """(max_atoms, chunk) of both sweeps, the `most` largest of each, every pair once."""
    pairs = []
    for varied, shares, fixed, share, _ in SWEEPS:
        for value in shares[-most if most else 0 :]:
            size = {varied: int(n_tokens * value), fixed: int(n_tokens * share)}
            pairs.append((size["max_atoms"], size["chunk"]))
    return list(dict.fromkeys(pairs))


def case_rows(case: str, tokens: Tokens, quick: bool) -> Iterator[Row]:
    """One clip, with every bound on the dictionary and every size of chunks."""
    X, n_tokens = tokens.X.astype(np.float32), len(tokens.X)
    config = VideoAnchorConfig(
        alpha_k=0, alpha_v=0, n_clusters=tokens.n_clusters, pca_rank=tokens.pca_rank, affine=tokens.affine
    )
    first = int(n_tokens * FIRST)
    whole = streamed(X, config, n_tokens, n_tokens, n_tokens)
    for max_atoms, chunk in sizes(n_tokens, 1 if quick else None):
        max_atoms = max(max_atoms, tokens.n_clusters + 1)
        found = streamed(X, config, first, chunk, max_atoms)
        atoms = found.stream.dictionary
        assert atoms is not None
        handed_out = found.scores[atoms.position.numpy()]
        yield Row(
            case, n_tokens, first, chunk, max_atoms,
            row_sum=correlation(found.row_sums[first:], whole.row_sums[first:]),
            score=correlation(found.scores[first:], whole.scores[first:]),
            distance=float(np.abs(found.scores - whole.scores)[first:].mean()),
            ari=float(adjusted_rand_score(whole.labels, found.labels)),
            first=correlation(found.row_sums[:first], whole.row_sums[:first]),
            drift=float(np.abs(atoms.scores.numpy() - handed_out).mean()),
            seconds=found.seconds, at_once=whole.seconds,
            truth_ari=None if tokens.truth is None else float(adjusted_rand_score(tokens.truth, found.labels)),
            truth_at_once=None if tokens.truth is None else float(adjusted_rand_score(tokens.truth, whole.labels)),
        )  # fmt: skip


@dataclass(frozen=True)
class CacheRow:
    """A clip in chunks and a bound on its cache; see the top of this file for the measures."""

    case: str
    tokens: int
    keep: int
    merged: float
    uncounted: float
    newest: float


def attention(queries: Tensor, maps: Tensor, y: Tensor, gamma_k: Tensor, gamma_v: Tensor) -> Tensor:
    """Of queries (Q, D) over tokens y (n, D) with gates (n,); maps (3, D, 128) make queries, keys and values."""
    logits = 2.5 * (queries @ maps[0]) @ (y @ maps[1]).T / 128**0.5
    return (logits + gamma_k.log()).softmax(1) @ (gamma_v[:, None] * (y @ maps[2]))


def cache_rows(case: str, tokens: Tokens, quick: bool) -> Iterator[CacheRow]:
    """One clip, a quarter and then eighths of it, with several bounds on its cache."""
    X, n_tokens = tokens.X.astype(np.float32), len(tokens.X)
    for part in CACHES[:1] if quick else CACHES:
        config = VideoAnchorConfig(
            alpha_k=1, alpha_v=1, n_clusters=tokens.n_clusters, pca_rank=tokens.pca_rank, affine=tokens.affine,
            keep=int(n_tokens * part), group="farthest",
        )  # fmt: skip
        keep, atoms = int(config.keep), max(n_tokens // 4, tokens.n_clusters + 1)
        found = streamed(X, config, int(n_tokens * FIRST), n_tokens // 8, atoms)
        cache, gate = found.stream.merged, torch.from_numpy(1 + found.scores)
        assert cache is not None
        generator = torch.Generator().manual_seed(0)
        all_tokens, spread = torch.from_numpy(X), float(X.std())
        queries = all_tokens[torch.randperm(n_tokens, generator=generator)[:64]]
        maps = torch.randn(3, X.shape[1], 128, generator=generator) / (X.shape[1] ** 0.5 * spread)
        whole = attention(queries, maps, all_tokens, gate, gate)
        cached = {
            "merged": (cache.tokens, cache.gamma_k, cache.gamma_v),
            "uncounted": (cache.tokens, cache.gamma_k / cache.counts, cache.gamma_v),
            "newest": (all_tokens[-keep:], gate[-keep:], gate[-keep:]),
        }
        errors = {
            name: float((attention(queries, maps, *of) - whole).norm() / whole.norm()) for name, of in cached.items()
        }
        yield CacheRow(case, n_tokens, keep, **errors)


def cache_summary(rows: list[CacheRow]) -> str:
    """Markdown: one table."""
    columns: dict[str, Callable[[CacheRow], object]] = {
        "clip": lambda row: row.case,
        "tokens": lambda row: row.tokens,
        "keep": lambda row: row.keep,
        "merged, with counts": lambda row: row.merged,
        "without counts": lambda row: row.uncounted,
        "the newest only": lambda row: row.newest,
    }
    return f"# A bounded cache against all tokens: relative error of an attention call\n\n{report.table(rows, columns)}"


def reordered(tokens: Tokens, order: np.ndarray) -> Tokens:
    truth = None if tokens.truth is None else tokens.truth[order]
    return Tokens(tokens.X[order], truth, None, tokens.n_clusters, tokens.pca_rank, tokens.affine)


def clips(quick: bool) -> Iterator[tuple[str, Tokens]]:
    """Names and tokens, in the order in which they arrive."""
    subspaces = token_sets.random_subspaces(*((4, 3, 20, 24) if quick else (8, 4, 40, 80)), noise=0.3)
    yield "shared subspaces", reordered(subspaces, np.random.default_rng(0).permutation(len(subspaces.X)))
    if not quick:
        yield "as a vision encoder's", token_sets.vit_like(768)
    n_steps, patch = (2, 84) if quick else (3, 28)
    camera = token_sets.camera(n_steps, patch)
    in_turn = np.arange(len(camera.X)).reshape(2, n_steps, -1).swapaxes(0, 1).ravel()
    yield "camera, photographs in turn", reordered(camera, in_turn)
    if not quick:
        yield "camera, with a cut", camera


def summary(rows: list[Row]) -> str:
    """Markdown: a table for each clip."""
    columns: dict[str, Callable[[Row], object]] = {
        "max_atoms": lambda row: row.max_atoms,
        "chunk": lambda row: row.chunk,
        "row sums": lambda row: row.row_sum,
        "scores": lambda row: row.score,
        "distance of scores": lambda row: row.distance,
        "ARI": lambda row: row.ari,
        "ARI, truth": lambda row: row.truth_ari,
        "row sums, first chunk": lambda row: row.first,
        "drift": lambda row: row.drift,
        "seconds": lambda row: row.seconds,
    }
    parts = ["# A stream against all tokens at once", "Correlations are Spearman's, of tokens after the first chunk."]
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case]
        truth = here[0].truth_at_once
        at_once = f"at once {here[0].at_once:.3g} s" + ("" if truth is None else f", ARI against the truth {truth:.3g}")
        parts.append(f"## {case}: N = {here[0].tokens}, first chunk {here[0].first_chunk}; {at_once}")
        parts.append(report.table(here, columns))
    return "\n\n".join(parts)


def draw(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """Agreement of scores and labels against the bound on the dictionary and against the size of the chunks."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharex="col", sharey="row")
    for number, case in enumerate(dict.fromkeys(row.case for row in rows)):
        here = [row for row in rows if row.case == case]
        for column, (varied, _, fixed, share, _) in enumerate(SWEEPS):
            chosen = [row for row in here if getattr(row, fixed) == int(row.tokens * share)]
            for panel, measure in zip(axes[:, column], ("score", "ari"), strict=True):
                points = [(getattr(row, varied) / row.tokens, getattr(row, measure)) for row in chosen]
                report.line(panel, number, case, points)
    for panel, (_, shares, _, _, label) in zip(axes[1], SWEEPS, strict=True):
        panel.set(xlabel=label, xscale="log")
        panel.set_xticks(shares, [f"1/{round(1 / share)}" if share < 1 else "all" for share in shares])
        panel.minorticks_off()
    axes[0, 0].set(ylabel="Spearman of new scores\nwith all at once", ylim=(-0.05, 1.05))
    axes[1, 0].set(ylabel="ARI of labels\nwith all at once", ylim=(-0.05, 1.05))
    report.save(figure, path, measured_on, axes[0, 0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="two small clips, to see that everything runs")
    parser.add_argument("--cache", action="store_true", help="measure the cache, not the scores")
    options = parser.parse_args(arguments)
    measured_on = environment(torch.device("cpu"), processor())
    if options.cache:
        of_caches: list[CacheRow] = []
        for case, tokens in clips(options.quick):
            for one in cache_rows(case, tokens, options.quick):
                of_caches.append(one)
                print(one, flush=True)
        report.write(options.out, f"{NAME}-cache", measured_on, of_caches, cache_summary(of_caches))
        print(f"-> {options.out}")
        return 0
    rows: list[Row] = []
    for case, tokens in clips(options.quick):
        for row in case_rows(case, tokens, options.quick):
            rows.append(row)
            print(
                f"{case}: max_atoms {row.max_atoms}, chunk {row.chunk}  row sums {row.row_sum:.3f}  "
                f"scores {row.score:.3f}  ARI {row.ari:.3f}",
                flush=True,
            )
    report.write(options.out, NAME, measured_on, rows, summary(rows))
    draw(rows, options.out / f"{NAME}.png", measured_on)
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
