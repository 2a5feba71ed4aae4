"""Sparse subspace clustering of this package beside elastic net, OMP, nearest neighbours and k-means, in one run.

    python benchmarks/scores/head_to_head.py --out DIR [--sizes 648 1024 2048 4096 8192] [--data vit photo digits]

Tokens as a vision encoder leaves them, patches of photographs, and digits (`token_sets.py`), each reduced to the same
principal components. From tokens to labels, and to scores where a method has them:

    ssc             this package's default: exact, a certificate for every token
    knn             this package, scorer="knn"; knn, scikit-learn: SpectralClustering(affinity="nearest_neighbors"),
                    10 neighbours, "cluster_qr"
    kmeans          this package, scorer="kmeans", which is scikit-learn's KMeans
    elastic net     SSC by elastic net, to a relative duality gap of its own problem of 1e-3, and
    omp             SSC by orthogonal matching pursuit, 10 atoms: both helpers/rivals.py, with the spectral step of ssc

    seconds         processor seconds, one thread, least of --repeats runs (those above 10 s are not repeated)
    gap             the largest relative duality gap of a token, of the method's own problem
    excess          median over the tokens of (objective - lower bound of the optimum) / objective, of the published
                    problem; for coefficients of a method that does not know that problem divided by their sum
    ari             adjusted Rand index of the labels against the planted objects, or the digits
    noise_..., left_out_...   of the labels (ARI), and of the scores (Spearman), with those of the same tokens where
                    1% of noise is added (of the root mean square of centred tokens), or 1% of the tokens is missing

A method that is not what it claims has no time: ssc whose checked tokens are further from a certified optimum than its
tolerance, an elastic net above its gap. Writes DIR/scores-head-to-head.csv, .json, .md and .png; the same command goes
on where it ended.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import videoanchor_triton as va
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.helpers.record import FAILED, OK, SKIPPED, WRONG
from benchmarks.helpers.resume import RefusedError
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.reference import certified_optimum, objectives, published_problem
from benchmarks.scores.helpers.resumed import Results
from benchmarks.scores.helpers.rivals import elastic_net, omp
from benchmarks.scores.helpers.token_sets import Tokens
from videoanchor_triton.anchor import scores as scores_module
from videoanchor_triton.anchor.affinity import affinity_matrix
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import shared_expression_score
from videoanchor_triton.anchor.solver import SelfExpression
from videoanchor_triton.anchor.spectral import spectral_labels

NAME = "scores-head-to-head"
KEY = ("data", "tokens", "method")
DIGITS = 1797
RIVAL_GAP = 1e-3
LONG_SECONDS = 10.0
MAKERS: dict[str, Callable[[int], Tokens]] = {
    "vit": token_sets.vit_like,
    "photo": token_sets.photo,
    "digits": token_sets.digits,
}


@dataclass(frozen=True)
class Found:
    """What a method made of tokens: labels (N,); scores (N,), coefficients and the largest gap where it has them."""

    labels: np.ndarray
    scores: np.ndarray | None = None
    solution: SelfExpression | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Row:
    """A method on a set of tokens; see the top of this file for the measures."""

    data: str
    tokens: int
    rank: int
    method: str
    status: str = SKIPPED
    seconds: float | None = None
    gap: float | None = None
    excess: float | None = None
    distance: float | None = None
    ari: float | None = None
    noise_ari: float | None = None
    noise_scores: float | None = None
    left_out_ari: float | None = None
    left_out_scores: float | None = None
    reason: str = ""

    def line(self) -> str:
        """The row for a terminal."""
        shown = {"s": self.seconds, "gap": self.gap, "excess": self.excess, "ARI": self.ari, "noise": self.noise_ari}
        said = "".join(f", {name} {value:.3g}" for name, value in shown.items() if value is not None)
        return f"{self.status:7} {self.data} N={self.tokens} {self.method}{said}{self.reason and ': ' + self.reason}"


def ours(X: np.ndarray, tokens: Tokens, scorer: Any) -> Found:
    """`anchor_scores` with its defaults."""
    kept: list[SelfExpression] = []
    right = scores_module.self_expression

    def keeping(*arguments: Any, **options: Any) -> SelfExpression:
        kept.append(right(*arguments, **options))
        return kept[-1]

    config = va.VideoAnchorConfig(
        alpha_k=0, alpha_v=0, scorer=scorer, n_clusters=tokens.n_clusters, pca_rank=tokens.pca_rank
    )
    scores_module.self_expression = keeping
    try:
        result = va.anchor_scores(torch.from_numpy(X).float(), config)
    finally:
        scores_module.self_expression = right
    solution = kept[0] if kept else None
    gap = None if solution is None else float(solution.gap.amax())
    return Found(result.labels.numpy(), result.scores.numpy(), solution, gap)


def theirs(X: np.ndarray, tokens: Tokens, express: Callable[[torch.Tensor], Any]) -> Found:
    """Another self-expression, with our spectral step and score."""
    Y = token_features(torch.from_numpy(X), tokens.pca_rank)
    indices, values, *gap = express(Y)
    n_tokens = len(values)
    labels = spectral_labels(affinity_matrix(indices, values), tokens.n_clusters, assign_labels="cluster_qr")
    known = torch.full((n_tokens,), gap[0] if gap else torch.nan, dtype=torch.float64)
    solution = SelfExpression(indices, values, known, 0, RIVAL_GAP, n_tokens)
    scores = shared_expression_score(solution.row_sums(), labels, int(labels.amax()) + 1)
    return Found(labels.numpy(), scores.numpy(), solution, gap[0] if gap else None)


def sklearn_knn(X: np.ndarray, tokens: Tokens) -> Found:
    Y = token_features(torch.from_numpy(X), tokens.pca_rank).T.numpy()
    spectral = SpectralClustering(
        tokens.n_clusters, affinity="nearest_neighbors", n_neighbors=10, assign_labels="cluster_qr", random_state=0
    )
    return Found(spectral.fit_predict(Y))


METHODS: dict[str, Callable[[np.ndarray, Tokens], Found]] = {
    "ssc": lambda X, tokens: ours(X, tokens, "ssc"),
    "knn": lambda X, tokens: ours(X, tokens, "knn"),
    "knn, scikit-learn": sklearn_knn,
    "kmeans": lambda X, tokens: ours(X, tokens, "kmeans"),
    "omp": lambda X, tokens: theirs(X, tokens, omp),
    "elastic net": lambda X, tokens: theirs(X, tokens, lambda Y: elastic_net(Y, RIVAL_GAP)),
}


def measured(row: Row, tokens: Tokens, run: Callable[[], Found], repeats: int) -> tuple[Row, Found]:
    """The row, checked before it is timed, and what was found."""
    times = []
    while True:
        begin = time.process_time()
        found = run()
        times.append(time.process_time() - begin)
        if len(times) >= repeats or times[0] > LONG_SECONDS:
            break
    row = judged(replace(row, gap=found.gap), tokens, found)
    if tokens.truth is not None:
        row = replace(row, ari=float(adjusted_rand_score(tokens.truth, found.labels)))
    return (replace(row, seconds=min(times)) if row.status == OK else row), found


def judged(row: Row, tokens: Tokens, found: Found, n_checked: int = 8) -> Row:
    """The row with its status: is the method what it claims?"""
    allowed = va.VideoAnchorConfig(alpha_k=0, alpha_v=0).tol if row.method == "ssc" else RIVAL_GAP
    if found.gap is not None and not found.gap <= allowed:
        return replace(row, status=WRONG, reason=f"a gap of {found.gap:.2g}, {allowed:.2g} is allowed")
    if row.method != "ssc" or found.solution is None:
        return replace(row, status=OK)
    problem = published_problem(token_features(torch.from_numpy(tokens.X).float(), tokens.pca_rank).numpy())
    chosen = np.random.default_rng(0).permutation(len(tokens.X))[:n_checked]
    optimum = certified_optimum(problem, chosen)
    distance = float((1 - optimum.lower / objective_of(problem, found.solution, chosen)).max())
    right = distance <= allowed + optimum.gap
    reason = "" if right else f"a token is {distance:.2g} from the optimum"
    return replace(row, status=OK if right else WRONG, distance=distance, reason=reason)


def objective_of(problem: Any, solution: SelfExpression, chosen: np.ndarray) -> np.ndarray:
    return objectives(problem, solution.indices[chosen].numpy(), solution.values[chosen].numpy(), chosen)


def with_excess(row: Row, tokens: Tokens, found: Found, exact: Found) -> Row:
    """The row with how far its coefficients are from the optimum of the published problem, by the bounds of ours."""
    if found.solution is None or exact.solution is None or row.method.startswith("knn"):
        return row
    problem = published_problem(token_features(torch.from_numpy(tokens.X).float(), tokens.pca_rank).numpy())
    everything = np.arange(len(tokens.X))
    lower = objective_of(problem, exact.solution, everything) * (1 - exact.solution.gap.numpy())
    return replace(row, excess=float(np.median(1 - lower / objective_of(problem, found.solution, everything))))


def with_stability(row: Row, tokens: Tokens, found: Found, method: Callable[[np.ndarray, Tokens], Found]) -> Row:
    """The row with how labels and scores stand to those of tokens that changed a little."""
    random = np.random.default_rng(0)
    spread = (tokens.X - tokens.X.mean(0)).std()
    noisy = method(tokens.X + 0.01 * spread * random.standard_normal(tokens.X.shape), tokens)
    kept = np.sort(random.permutation(len(tokens.X))[: round(0.99 * len(tokens.X))])
    fewer = method(tokens.X[kept], tokens)
    return replace(
        row,
        noise_ari=float(adjusted_rand_score(found.labels, noisy.labels)),
        noise_scores=correlation(found.scores, noisy.scores),
        left_out_ari=float(adjusted_rand_score(found.labels[kept], fewer.labels)),
        left_out_scores=correlation(None if found.scores is None else found.scores[kept], fewer.scores),
    )


def correlation(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    """Spearman's rank correlation, None where a side is missing or constant."""
    if a is None or b is None or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.asarray(spearmanr(a, b))[0])


def summary(rows: list[Row]) -> str:
    """Markdown: a table for each data set."""
    columns: dict[str, Callable[[Row], object]] = {
        "tokens": lambda row: row.tokens,
        "method": lambda row: row.method,
        "seconds": lambda row: row.seconds,
        "largest gap, own problem": lambda row: row.gap,
        "excess, median": lambda row: row.excess,
        "ARI": lambda row: row.ari,
        "labels, 1% noise": lambda row: row.noise_ari,
        "scores": lambda row: row.noise_scores,
        "labels, 1% left out": lambda row: row.left_out_ari,
        "scores ": lambda row: row.left_out_scores,
        "": lambda row: "" if row.status == OK else f"{row.status}: {row.reason}",
    }
    parts = ["# Subspaces by self-expression, neighbours and k-means", "`head_to_head.py` says what the columns are."]
    for data in dict.fromkeys(row.data for row in rows):
        here = [row for row in rows if row.data == data]
        parts.append(f"## {data}, rank {here[0].rank}\n\n{report.table(here, columns)}")
    return "\n\n".join(parts)


def draw(rows: list[Row], path: Path, measured_on: dict[str, str]) -> None:
    """Seconds above, ARI against the truth below where there is one, against the number of tokens."""
    names = list(dict.fromkeys(row.data for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(3.6 * len(names) + 1, 6.6), squeeze=False)
    for column, data in enumerate(names):
        for number, method in enumerate(METHODS):
            here = [row for row in rows if (row.data, row.method) == (data, method)]
            dashed = method not in ("ssc", "knn", "kmeans")
            report.line(axes[0, column], number, method, [(x.tokens, x.seconds) for x in here if x.seconds], dashed)
            found = [(x.tokens, x.ari) for x in here if x.ari is not None]
            report.line(axes[1, column], number, method, found, dashed)
        sizes = sorted({row.tokens for row in rows if row.data == data})
        for panel in axes[:, column]:
            panel.set(xscale="log", xlabel="tokens")
            panel.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
            panel.minorticks_off()
        axes[0, column].set(yscale="log", title=data)
        axes[1, column].set_ylim(-0.03, 1.03)
        axes[1, column].set_visible(any(row.ari is not None for row in rows if row.data == data))
    axes[0, 0].set_ylabel("seconds, one thread")
    axes[1, 0].set_ylabel("ARI against the truth")
    report.save(figure, path, measured_on, axes[0, 0])


def cases(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Numbers of tokens and data, the small first; of digits no more than there are."""
    found = [
        (min(size, DIGITS) if data == "digits" else size, data)
        for size in sorted(options.sizes)
        for data in options.data
    ]
    return list(dict.fromkeys(found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", nargs="+", default=list(MAKERS), choices=MAKERS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[648, 1024, 2048, 4096, 8192], help="numbers of tokens")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--stability", type=int, default=2048, help="most tokens that are changed and done anew")
    parser.add_argument("--elastic-net", type=int, default=4096, help="most tokens of the elastic net (default 4096)")
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the least time counts (default 2)")
    parser.add_argument("--anew", action="store_true", help="replace the results of earlier calls")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measured_on = environment(torch.device("cpu"), processor())
    warnings.simplefilter("ignore", UserWarning)
    try:
        results = Results(options.out, NAME, Row, KEY, measured_on, summary, options.anew)
    except RefusedError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    for n_tokens, data in cases(options):
        left = [x for x in options.methods if not results.known(data=data, tokens=n_tokens, method=x)]
        if left:
            run_case(results, data, MAKERS[data](n_tokens), left, options)
    draw(results.rows, options.out / f"{NAME}.png", measured_on)
    print(f"-> {options.out}")
    return 1 if any(row.status in (WRONG, FAILED) for row in results.rows) else 0


def run_case(results: Results, data: str, tokens: Tokens, methods: list[str], options: argparse.Namespace) -> None:
    """The rows of a set of tokens that are not there yet."""
    exact: Found | None = None
    for method in methods:
        row = Row(data, len(tokens.X), tokens.pca_rank or tokens.X.shape[1], method)
        if method == "elastic net" and len(tokens.X) > options.elastic_net:
            row = replace(row, reason=f"more than {options.elastic_net} tokens take it minutes")
        else:
            try:
                row, found = measured(row, tokens, lambda m=method: METHODS[m](tokens.X, tokens), options.repeats)
                if found.solution is not None and method != "ssc":
                    exact = exact or METHODS["ssc"](tokens.X, tokens)
                    row = with_excess(row, tokens, found, exact)
                if method == "ssc":
                    exact = found
                if len(tokens.X) <= options.stability:
                    row = with_stability(row, tokens, found, METHODS[method])
            except Exception as failure:
                row = replace(row, status=FAILED, seconds=None, reason=f"{type(failure).__name__}: {failure}")
        results.add(row)
        print(row.line(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
