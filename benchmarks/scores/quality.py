"""How good are subspaces and scores, beside k-means and the authors' stopping rule, and how stable are they?

    python benchmarks/scores/quality.py --out DIR [--quick]

Unions of subspaces, where noise, dimension, angle and number of tokens vary over a few seeds; and five sets of tokens,
on which algorithms, and seeds of the spectral step, are compared with each other. `token_sets.py` says what they are.

    ari, purity   labels against the truth (adjusted Rand index; share of tokens in their cluster's largest class)
    mass          share of sum |W| whose two tokens have the same true subspace; for "uniform", W is constant
    matched       share of token pairs, known from the camera to show the same place, that share a label; by chance
    score         Spearman correlation with the scores of exact SSC; matched_score: of the scores of matched tokens
    gap           the largest relative duality gap of a token that the solver reports; unconverged: tokens above tol

Writes DIR/ssc-quality.csv, .json, .md, DIR/ssc-quality-unions.png and DIR/ssc-quality-stability.png.
"""

import argparse
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.token_sets import Tokens
from videoanchor_triton.anchor.affinity import affinity_matrix
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores, shared_expression_score
from videoanchor_triton.anchor.solver import SelfExpression, self_expression
from videoanchor_triton.anchor.spectral import spectral_labels

NAME = "ssc-quality"
EXACT, AUTHORS = "exact SSC", "authors' stopping rule"
METHODS = (EXACT, AUTHORS, "k-means", "uniform")
ALGORITHMS = ("dense", "blocked", "working-set", "authors")
# Two seeds whose labels agree less than this give different subspaces.
STABLE = 0.95


@dataclass(frozen=True)
class Row:
    """A method on a set of tokens; see the top of this file for the measures."""

    section: str
    case: str
    method: str
    tokens: int
    value: float | None = None
    seed: int = 0
    ari: float | None = None
    purity: float | None = None
    mass: float | None = None
    matched: float | None = None
    matched_by_chance: float | None = None
    score: float | None = None
    matched_score: float | None = None
    iterations: int | None = None
    gap: float | None = None
    unconverged: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Found:
    """Labels and scores of a method, with its coefficients where it has any."""

    labels: np.ndarray
    scores: np.ndarray
    solution: SelfExpression | None = None
    seconds: float = 0.0


def cluster(solution: SelfExpression, n_clusters: int, **options: Any) -> Found:
    """Labels and scores from coefficients."""
    labels = spectral_labels(affinity_matrix(solution.indices, solution.values), n_clusters, **options)
    scores = shared_expression_score(solution.row_sums(), labels, n_clusters)
    return Found(labels.numpy(), scores.numpy(), solution)


def clustered(tokens: Tokens, algorithm: str) -> Found:
    """Labels and scores by an algorithm of the solver, with the seconds that the solver took."""
    options = SolverOptions(algorithm=algorithm, affine=tokens.affine)  # pyright: ignore[reportArgumentType]
    Y = token_features(torch.from_numpy(tokens.X), tokens.pca_rank)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = self_expression(Y, options)
    seconds = time.perf_counter() - start
    return replace(cluster(solution, tokens.n_clusters), seconds=seconds)


def run(tokens: Tokens, method: str) -> Found:
    """One of METHODS."""
    if method in (EXACT, AUTHORS):
        return clustered(tokens, "auto" if method == EXACT else "authors")
    config = VideoAnchorConfig(
        alpha_k=0, alpha_v=0, scorer="kmeans" if method == "k-means" else "uniform", pca_rank=tokens.pca_rank,
        n_clusters=tokens.n_clusters,
    )  # fmt: skip
    start = time.perf_counter()
    result = anchor_scores(tokens.X, config)
    return Found(result.labels.numpy(), result.scores.numpy(), seconds=time.perf_counter() - start)


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, None where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.asarray(spearmanr(a, b))[0])


def mass_inside(truth: np.ndarray, solution: SelfExpression | None) -> float:
    """The share of sum |W| inside the true subspaces, the diagonal left out; of constant W where there is none."""
    same = truth[:, None] == truth[None, :]
    if solution is None:
        n_tokens = len(truth)
        return float((same.sum() - n_tokens) / (n_tokens * (n_tokens - 1)))
    weight = solution.values.abs().double().numpy()
    inside = truth[solution.indices.numpy()] == truth[:, None]
    return float(weight[inside].sum() / weight.sum())


def with_solution(row: Row, solution: SelfExpression | None) -> Row:
    """The row with what the solver reported, if one ran."""
    if solution is None:
        return row
    return replace(
        row, iterations=solution.n_iter, gap=float(solution.gap.max()), unconverged=len(solution.unconverged)
    )


def judged(row: Row, tokens: Tokens, found: Found, exact: Found) -> Row:
    """The row with all measures that apply."""
    row = replace(row, seconds=found.seconds, score=correlation(found.scores, exact.scores))
    row = with_solution(row, found.solution)
    if tokens.truth is not None:
        counts = contingency_matrix(tokens.truth, found.labels)
        row = replace(
            row, ari=float(adjusted_rand_score(tokens.truth, found.labels)),
            purity=float(counts.max(axis=0).sum() / counts.sum()),
        )  # fmt: skip
        if found.solution is not None or row.method == "uniform":
            row = replace(row, mass=mass_inside(tokens.truth, found.solution))
    if tokens.matches is not None:
        first, second = tokens.matches.T
        shares = np.bincount(found.labels) / len(found.labels)
        row = replace(
            row, matched=float((found.labels[first] == found.labels[second]).mean()),
            matched_by_chance=float((shares**2).sum()),
            matched_score=correlation(found.scores[first], found.scores[second]),
        )  # fmt: skip
    return row


def unions(quick: bool) -> dict[str, dict[float, Callable[[int], Tokens]]]:
    """Unions of subspaces: what varies, its values, and the tokens of a seed."""
    each = 12 if quick else 40

    def subspaces(dim: int = 4, noise: float = 0.0) -> Callable[[int], Tokens]:
        return lambda seed: token_sets.random_subspaces(5, dim, 30, each, noise, seed)

    def at_angle(angle: float) -> Callable[[int], Tokens]:
        return lambda seed: token_sets.disjoint_subspaces(angle, each, seed=seed)

    def in_nine(each: int) -> Callable[[int], Tokens]:
        return lambda seed: token_sets.random_subspaces(5, 6, 9, each, seed=seed)

    found: dict[str, dict[float, Callable[[int], Tokens]]] = {
        "noise": {noise: subspaces(noise=noise) for noise in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)},
        "dimension of a subspace": {dim: subspaces(dim, 0.1) for dim in (4, 2, 6, 10, 15, 20)},
        "angle in degrees": {angle: at_angle(angle) for angle in (30, 6, 12, 20, 45, 60)},
        "tokens of a subspace": {each: in_nine(each) for each in (25, 50, 100, 200)},
    }
    if quick:
        return {name: dict(list(values.items())[:1]) for name, values in found.items()}
    return {name: dict(sorted(values.items())) for name, values in found.items()}


TITLES = {
    "noise": "5 subspaces of dimension 4 in 30, 40 tokens each",
    "dimension of a subspace": "5 subspaces in 30, 40 tokens each, noise 0.1",
    "angle in degrees": "3 disjoint subspaces of dimension 4 in 50, 40 tokens each (after Elhamifar, Vidal 2013)",
    "tokens of a subspace": "5 subspaces of dimension 6 in 9 (You et al. 2016)",
}


def union_rows(quick: bool, seeds: int) -> Iterator[Row]:
    for name, values in unions(quick).items():
        for value, make in values.items():
            for seed in range(seeds):
                tokens = make(seed)
                exact = run(tokens, EXACT)
                for method in METHODS:
                    found = exact if method == EXACT else run(tokens, method)
                    row = Row("unions", name, method, len(tokens.X), float(value), seed)
                    yield judged(row, tokens, found, exact)


def sets_of_tokens(quick: bool) -> dict[str, Callable[[], Tokens]]:
    """Sets of tokens on which algorithms and seeds are compared."""
    if quick:
        return {"digits": partial(token_sets.digits, 60), "camera over photographs": partial(token_sets.camera, 2, 84)}
    return {
        "subspaces, no noise": partial(token_sets.random_subspaces, 8, 4, 40, 50),
        "subspaces, noise 0.6": partial(token_sets.random_subspaces, 8, 4, 40, 50, 0.6),
        "as a vision encoder's": partial(token_sets.vit_like, 768),
        "digits": partial(token_sets.digits, 900),
        "camera over photographs": partial(token_sets.camera, 4),
    }


def set_rows(case: str, tokens: Tokens, seeds: int) -> Iterator[Row]:
    """Methods against what is known of the tokens, then algorithms and seeds against exact SSC."""
    size = len(tokens.X)
    methods = {method: run(tokens, method) for method in METHODS}
    exact = methods[EXACT]
    for method, found in methods.items():
        yield judged(Row("sets", case, method, size), tokens, found, exact)
    assert exact.solution is not None
    for algorithm in ALGORITHMS:
        found = methods[AUTHORS] if algorithm == "authors" else clustered(tokens, algorithm)
        row = Row(
            "algorithms", case, algorithm, size, ari=float(adjusted_rand_score(exact.labels, found.labels)),
            score=correlation(exact.scores, found.scores), seconds=found.seconds,
        )  # fmt: skip
        yield with_solution(row, found.solution)
    of_seed = [cluster(exact.solution, tokens.n_clusters, random_state=seed) for seed in range(seeds)]
    for (i, first), (j, second) in combinations(enumerate(of_seed), 2):
        yield Row(
            "seeds", case, f"seeds {i} and {j}", size, ari=float(adjusted_rand_score(first.labels, second.labels)),
            score=correlation(first.scores, second.scores),
        )  # fmt: skip
    for assign in ("cluster_qr", "kmeans"):
        found = cluster(exact.solution, tokens.n_clusters, assign_labels=assign)
        yield Row(
            "assignment", case, f"{assign} against discretize", size,
            ari=float(adjusted_rand_score(exact.labels, found.labels)), score=correlation(exact.scores, found.scores),
        )  # fmt: skip


def stability(rows: list[Row]) -> Iterator[str]:
    """Plain words on how far labels and scores depend on the seed, the algorithm and the assignment, for each set."""
    for case in dict.fromkeys(row.case for row in rows if row.section == "seeds"):
        here = [row for row in rows if row.case == case]

        def least(section: str, here: list[Row] = here) -> tuple[float, str]:
            chosen = [row for row in here if row.section == section]
            scores = [row.score for row in chosen if row.score is not None]
            return min(row.ari or 0.0 for row in chosen), f"{min(scores):.3f}" if scores else "undefined"

        (seeds, seed_score), (algorithms, algorithm_score) = least("seeds"), least("algorithms")
        verdict = "stable" if min(seeds, algorithms) >= STABLE else "UNSTABLE"
        assignment, assignment_score = least("assignment")
        yield (
            f"- {case}: labels are **{verdict}**. Two seeds of the spectral step on the same W agree to ARI "
            f"{seeds:.3f} at worst (scores {seed_score}), exact SSC and another algorithm to {algorithms:.3f} "
            f"({algorithm_score}), and with another way of assigning labels to {assignment:.3f} ({assignment_score})."
        )


def averaged(rows: list[Row]) -> list[Row]:
    """Means over the seeds, for each case, method and value; of iterations, gap and unconverged the largest."""
    groups: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.method, row.value), []).append(row)

    def over(group: list[Row], name: str, reduce: Callable[[list[float]], float]) -> float | None:
        values = [getattr(row, name) for row in group if getattr(row, name) is not None]
        return reduce(values) if values else None

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    means = ("ari", "purity", "mass", "matched", "matched_by_chance", "score", "matched_score", "seconds")
    largest = ("iterations", "gap", "unconverged")
    return [
        replace(
            group[0],
            **{name: over(group, name, mean) for name in means},
            **{name: over(group, name, max) for name in largest},
        )
        for group in groups.values()
    ]


def summary(rows: list[Row]) -> str:
    """Markdown: what is stable, and the tables."""
    common: dict[str, Callable[[Row], object]] = {
        "method": lambda row: row.method,
        "ARI": lambda row: row.ari,
        "purity": lambda row: row.purity,
        "mass inside": lambda row: row.mass,
    }
    solver: dict[str, Callable[[Row], object]] = {
        "score against exact": lambda row: row.score,
        "iterations": lambda row: row.iterations,
        "largest gap": lambda row: row.gap,
        "unconverged": lambda row: row.unconverged,
        "seconds": lambda row: row.seconds,
    }
    matches: dict[str, Callable[[Row], object]] = {
        "matched pairs with one label": lambda row: row.matched,
        "by chance": lambda row: row.matched_by_chance,
        "scores of matched tokens": lambda row: row.matched_score,
    }
    case: dict[str, Callable[[Row], object]] = {"tokens": lambda row: f"{row.case}, N = {row.tokens}"}
    parts = ["# Quality of the subspaces and scores", "## Are labels stable?", "\n".join(stability(rows))]
    for name, title in TITLES.items():
        chosen = averaged([row for row in rows if row.section == "unions" and row.case == name])
        columns: dict[str, Callable[[Row], object]] = {name: lambda row: row.value}
        parts += [f"## {title}", report.table(chosen, columns | common | solver)]
    chosen = [row for row in rows if row.section == "sets"]
    parts += ["## Sets of tokens", report.table(chosen, case | common | matches | solver)]
    chosen = [row for row in rows if row.section == "algorithms"]
    agreement: dict[str, Callable[[Row], object]] = {"algorithm": lambda row: row.method, "ARI": lambda row: row.ari}
    parts += ["## Algorithms against exact SSC (auto)", report.table(chosen, case | agreement | solver)]
    return "\n\n".join(parts)


def draw_unions(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """ARI above, mass inside the true subspaces below, against what varies."""
    figure, axes = plt.subplots(2, len(TITLES), figsize=(3.6 * len(TITLES), 6.4), sharey=True)
    for column, (name, title) in enumerate(TITLES.items()):
        chosen = averaged([row for row in rows if row.section == "unions" and row.case == name])
        for panel, measure in zip(axes[:, column], ("ari", "mass"), strict=True):
            for number, method in enumerate(METHODS):
                here = [row for row in chosen if row.method == method and getattr(row, measure) is not None]
                points = [(row.value, getattr(row, measure)) for row in here if row.value is not None]
                report.line(panel, number, method, points, dashed=method == AUTHORS)
            panel.set_xlabel(name)
            panel.set_ylim(-0.05, 1.05)
        axes[0, column].set_title(textwrap.fill(title, 40), fontsize=8)
    axes[0, 0].set_ylabel("ARI of the labels")
    axes[1, 0].set_ylabel("mass of W in the true subspace")
    report.save(figure, path, measured_on, axes[0, 0])


def draw_stability(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """Every ARI between two seeds, two algorithms or two assignments, for each set of tokens."""
    figure, panel = plt.subplots(figsize=(8, 4.2))
    cases = list(dict.fromkeys(row.case for row in rows if row.section == "seeds"))
    names = {"seeds": "two seeds, same W", "algorithms": "another algorithm", "assignment": "another assignment"}
    for number, (section, name) in enumerate(names.items()):
        chosen = [row for row in rows if row.section == section]
        places = [cases.index(row.case) + 0.2 * (number - 1) for row in chosen]
        panel.scatter(
            places, [row.ari or 0.0 for row in chosen], label=name, color=report.COLOURS[number],
            marker=report.MARKERS[number], alpha=0.7, s=26,
        )  # fmt: skip
    panel.axhline(STABLE, color="#555555", linestyle=":", linewidth=1.2)
    panel.set_xticks(range(len(cases)), cases, fontsize=8)
    panel.set(ylabel="ARI", ylim=(min(0.5, panel.get_ylim()[0]), 1.03), title="agreement of labels on the same tokens")
    panel.spines[["top", "right"]].set_visible(False)
    report.save(figure, path, measured_on, panel)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that everything runs")
    options = parser.parse_args(arguments)
    measured_on = environment(torch.device("cpu"), processor())
    rows: list[Row] = []
    sources = [union_rows(options.quick, 1 if options.quick else 3)]
    n_seeds = 2 if options.quick else 8
    sources += [set_rows(case, make(), n_seeds) for case, make in sets_of_tokens(options.quick).items()]
    for source in sources:
        for row in source:
            rows.append(row)
            if row.section != "seeds":
                value = "" if row.value is None else f" {row.value:g}"
                ari = "" if row.ari is None else f"  ARI {row.ari:.3f}"
                print(f"{row.section:10} {row.case}{value} | {row.method}{ari}", flush=True)
    report.write(options.out, NAME, measured_on, rows, summary(rows))
    draw_unions(rows, options.out / f"{NAME}-unions.png", measured_on)
    draw_stability(rows, options.out / f"{NAME}-stability.png", measured_on)
    print("\n".join(stability(rows)), f"-> {options.out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
