"""Scores of a long video within a memory budget: seconds by stage, peak memory, and the certificate of every token.

    python benchmarks/scores/long_video.py --out benchmarks/results/ssc-long
    python benchmarks/scores/long_video.py --tokens 8192 --rank 64 --memory-gib 0.5 --out out/ssc-long

The numbers of tokens and components set the time: 100,000 tokens take half an hour and more on a CPU. The exit status
is 1 if a token is not within the tolerance or the solver's budget was exceeded.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import videoanchor_triton as va
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.peak_memory import PeakMemory

NAME = "ssc-long"


@dataclass(frozen=True)
class Row:
    """One run; seconds by stage, memory in MiB beyond what the process held with the tokens in it.

    The budget is that of the solver.
    """

    tokens: int
    rank: int
    algorithm: str | None
    budget_mib: float
    solver_peak_mib: float | None
    peak_mib: float | None
    largest_gap: float
    unconverged: int
    iterations: int
    pca: float
    solve: float
    spectral: float
    score: float


def measured(n_tokens: int, rank: int, memory_gib: float) -> Row:
    tokens = torch.from_numpy(token_sets.vit_like(n_tokens).X).float()
    budget = int(memory_gib * 2**30)
    config = va.VideoAnchorConfig(alpha_k=0, alpha_v=0, pca_rank=rank, n_clusters=24, memory_budget=budget)
    peak = PeakMemory()
    solver_peak: dict[str, float | None] = {}  # by stage, up to the first one after the solver
    with tqdm(total=len(tokens), unit=" tokens") as bar:

        def progress(stage: str, done: int, _total: int) -> None:
            bar.set_description(stage, refresh=False)
            if stage == "solve":
                bar.update(done - bar.n)
            if not solver_peak.keys() - {"pca", "solve"}:
                solver_peak[stage] = peak.mib()
            bar.refresh()

        result = va.anchor_scores(tokens, config, progress=progress)
    assert result.duality_gap is not None
    return Row(
        len(tokens),
        rank,
        result.algorithm,
        budget / 2**20,
        list(solver_peak.values())[-1],
        peak.mib(),
        result.residual,
        int((result.duality_gap > config.tol).sum()),
        result.n_iter,
        *(result.seconds[stage] for stage in ("pca", "solve", "spectral", "score")),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000], help="numbers of tokens (default 100000)")
    parser.add_argument("--rank", type=int, default=16, help="principal components (default 16)")
    parser.add_argument("--memory-gib", type=float, default=1.0, help="budget of the solver in GiB (default 1)")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for n_tokens in options.tokens:
        rows.append(measured(n_tokens, options.rank, options.memory_gib))
        columns = {name: lambda row, name=name: getattr(row, name) for name in Row.__dataclass_fields__}
        summary = f"# Scores of a long video within a memory budget\n\n{report.table(rows, columns)}"
        report.write(options.out, NAME, environment(torch.device("cpu"), processor()), rows, summary)
        print(rows[-1], flush=True)
    kept = all(
        row.unconverged == 0 and (row.solver_peak_mib is None or row.solver_peak_mib <= row.budget_mib) for row in rows
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
