"""Are the scores the same for everyone: on more threads, in smaller blocks, from other precisions, at another gap?

    python benchmarks/scores/stability.py --out DIR [--tokens 1024] [--ranks 8 16 64] [--data vit photo]

The same tokens are scored as by default on one thread from float32, and then with one thing changed: two threads;
--budgets of memory, MiB, which make smaller blocks; float64 tokens; a relative duality gap of 1e-4 instead of 1e-3. For
comparison the tokens themselves are changed: 1% of noise (of the root mean square of centred tokens), and 1% left out,
of which the others are compared. The measures are of the two results:

    row_sums     Spearman's rank correlation of r_i, the row sums of W; sum_difference: the largest difference of one,
                 relative to the largest row sum
    published, projector   the same correlation of the scores
    labels       adjusted Rand index
    hull         share of the tokens whose coefficients are not unique: their L1 norm is 1, to 0.1%

Writes DIR/scores-stability.csv, .json, .md and .png; the same command goes on where it ended. The exit status is 1 if a
token has no certificate, or row sums of the same tokens correlate less than --least.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import videoanchor_triton as va
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.helpers.resume import RefusedError
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.resumed import Results
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import shared_expression_score
from videoanchor_triton.anchor.solver import SelfExpression, self_expression
from videoanchor_triton.anchor.spectral import Subspaces, spectral_subspaces

NAME = "scores-stability"
KEY = ("data", "tokens", "rank", "changed")
MAKERS: dict[str, Callable[[int], token_sets.Tokens]] = {"vit": token_sets.vit_like, "photo": token_sets.photo}
DEFAULT, NOISE, LEFT_OUT = "nothing", "1% of noise", "1% left out"


@dataclass(frozen=True)
class Row:
    """What a change makes of the results; see the top of this file for the measures."""

    data: str
    tokens: int
    rank: int
    changed: str
    unconverged: int
    hull: float
    row_sums: float
    sum_difference: float
    published: float
    projector: float
    labels: float

    def line(self) -> str:
        """The row for a terminal."""
        return (
            f"{self.data} N={self.tokens} r={self.rank}, {self.changed}: row sums {self.row_sums:.5f}, published "
            f"{self.published:.5f}, projector {self.projector:.5f}, labels {self.labels:.4f}, hull {self.hull:.0%}"
        )


@dataclass(frozen=True)
class Found:
    """Coefficients and subspaces of tokens (their numbers among all, ascending), and the scores that follow."""

    solution: SelfExpression
    subspaces: Subspaces
    kept: np.ndarray

    @property
    def published(self) -> np.ndarray:
        labels = self.subspaces.labels
        return shared_expression_score(self.solution.row_sums(), labels, int(labels.amax()) + 1).numpy()

    @property
    def projector(self) -> np.ndarray:
        return (self.subspaces.projector_size * self.solution.row_sums()).numpy()

    @property
    def sums(self) -> np.ndarray:
        return self.solution.row_sums().numpy()


def scored(
    tokens: token_sets.Tokens, rank: int, *, dtype: torch.dtype = torch.float32, threads: int = 1, tol: float = 1e-3,
    memory_budget: int | None = None, noise: float = 0.0, left_out: float = 0.0,
) -> Found:  # fmt: skip
    """PCA, solver and spectral step, as `anchor_scores` goes through them."""
    before, random = torch.get_num_threads(), np.random.default_rng(0)
    X = tokens.X + noise * (tokens.X - tokens.X.mean(0)).std() * random.standard_normal(tokens.X.shape)
    kept = np.sort(random.permutation(len(X))[: round((1 - left_out) * len(X))])
    torch.set_num_threads(threads)
    try:
        Y = token_features(torch.from_numpy(X[kept]).to(dtype), rank)
        solution = self_expression(Y, va.SolverOptions(tol=tol, memory_budget=memory_budget))
        subspaces = spectral_subspaces(solution.affinity(), tokens.n_clusters)
    finally:
        torch.set_num_threads(before)
    return Found(solution, subspaces, kept)


def changes(budgets: list[int]) -> dict[str, dict[str, Any]]:
    """What is changed, and the settings of `scored` for it."""
    found: dict[str, dict[str, Any]] = {DEFAULT: {}, "2 threads": {"threads": 2}, "gap 1e-4": {"tol": 1e-4}}
    found["float64 tokens"] = {"dtype": torch.float64}
    found |= {f"{mib} MiB": {"memory_budget": mib << 20} for mib in budgets}
    return found | {NOISE: {"noise": 0.01}, LEFT_OUT: {"left_out": 0.01}}


def compared(row: Callable[..., Row], base: Found, other: Found) -> Row:
    """The row of a change."""
    norms, kept = base.solution.values.abs().sum(1), other.kept

    def correlation(name: str) -> float:
        return float(np.asarray(spearmanr(getattr(base, name)[kept], getattr(other, name)))[0])

    return row(
        unconverged=len(other.solution.unconverged),
        hull=float((norms <= 1 + 1e-3).double().mean()),
        row_sums=correlation("sums"),
        sum_difference=float(np.abs(base.sums[kept] - other.sums).max() / np.abs(base.sums).max()),
        published=correlation("published"),
        projector=correlation("projector"),
        labels=float(adjusted_rand_score(base.subspaces.labels.numpy()[kept], other.subspaces.labels.numpy())),
    )


def summary(rows: list[Row]) -> str:
    """Markdown: a table for each set of tokens."""
    columns: dict[str, Callable[[Row], object]] = {
        "rank": lambda row: row.rank,
        "in a hull": lambda row: f"{row.hull:.0%}",
        "changed": lambda row: row.changed,
        "row sums": lambda row: f"{row.row_sums:.5f}",
        "largest difference": lambda row: f"{row.sum_difference:.1e}",
        "published score": lambda row: f"{row.published:.5f}",
        "projector score": lambda row: f"{row.projector:.5f}",
        "labels (ARI)": lambda row: f"{row.labels:.4f}",
        "unconverged": lambda row: row.unconverged,
    }
    parts = ["# The same scores for everyone", "`stability.py` says what the columns are."]
    for data, n_tokens in dict.fromkeys((row.data, row.tokens) for row in rows):
        here = [row for row in rows if (row.data, row.tokens) == (data, n_tokens)]
        parts.append(f"## {data}, N = {n_tokens}\n\n{report.table(here, columns)}")
    return "\n\n".join(parts)


def draw(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """1 - rank correlation of the row sums, for each change and rank."""
    names = list(dict.fromkeys(row.data for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names) + 1, 4.6), sharey=True, squeeze=False)
    changed = [name for name in dict.fromkeys(row.changed for row in rows) if name != DEFAULT]
    for panel, data in zip(axes[0], names, strict=True):
        for number, name in enumerate(changed):
            here = [row for row in rows if (row.data, row.changed) == (data, name)]
            report.line(panel, number, name, [(row.rank, max(1e-9, 1 - row.row_sums)) for row in here])
        panel.axhline(1e-3, color="#555555", linestyle=":", linewidth=1.2)
        panel.set(title=data, xlabel="rank", yscale="log", xscale="log")
        ranks = sorted({row.rank for row in rows})
        panel.set_xticks(ranks, [str(rank) for rank in ranks])
        panel.minorticks_off()
    axes[0, 0].set_ylabel("1 - rank correlation of row sums")
    report.save(figure, path, measured_on, axes[0, 0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", nargs="+", default=list(MAKERS), choices=MAKERS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="numbers of tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64], help="principal components")
    parser.add_argument("--budgets", type=int, nargs="*", default=[40, 12], help="memory budgets in MiB")
    parser.add_argument("--least", type=float, default=0.999, help="rank correlation that row sums must have")
    parser.add_argument("--anew", action="store_true", help="replace the results of earlier calls")
    options = parser.parse_args(arguments)
    measured_on = environment(torch.device("cpu"), processor())
    try:
        results = Results(options.out, NAME, Row, KEY, measured_on, summary, options.anew)
    except RefusedError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    for data in options.data:
        for n_tokens in options.tokens:
            tokens = MAKERS[data](n_tokens)
            for rank in options.ranks:
                base: Found | None = None
                for name, settings in changes(options.budgets).items():
                    if results.known(data=data, tokens=len(tokens.X), rank=rank, changed=name):
                        continue
                    base = base or scored(tokens, rank)
                    found = base if name == DEFAULT else scored(tokens, rank, **settings)
                    results.add(compared(partial(Row, data, len(tokens.X), rank, name), base, found))
                    print(results.rows[-1].line(), flush=True)
    draw(results.rows, options.out / f"{NAME}.png", measured_on)
    print(f"-> {options.out}")
    same = [row for row in results.rows if row.changed not in (NOISE, LEFT_OUT)]
    missed = any(row.unconverged for row in results.rows) or any(row.row_sums < options.least for row in same)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
