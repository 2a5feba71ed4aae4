"""Scores tokens with whichever revision of the package PYTHONPATH names: a JSON object a line in, one out.

In: data ("vit", "photo", "digits"), tokens, rank, tol; memory_budget (bytes or null); checked: tokens whose optimum is
certified anew, apart from the package; sample: null, or so many tokens are solved over the others and nothing else is
done; the time of the penalty weights, the same for any number of tokens, is apart then.

Out: seconds by stage ("whole" is all of them), cpu seconds of the process, gap and unconverged as the package claims
them, distance of the checked tokens from their optimum and how well that is known, iterations (of the slowest token)
and mean_iterations, peak MiB beyond the tokens, and the folder of the package.
"""

import contextlib
import inspect
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

import videoanchor_triton as va

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from benchmarks.scores.helpers import token_sets
from benchmarks.scores.helpers.peak_memory import PeakMemory
from benchmarks.scores.helpers.reference import certified_optimum, objectives, published_problem
from videoanchor_triton.anchor import problem, scores, solver
from videoanchor_triton.anchor.problem import token_features

# Where the package solves, now and up to commit fa832ec; each gives rows with n_iter.
SOLVERS = ("solve", "solve_working_sets", "_solve_blocks")
MAKERS = {"vit": token_sets.vit_like, "photo": token_sets.photo, "digits": token_sets.digits}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.from_numpy(MAKERS[request["data"]](request["tokens"]).X).float()
    peak = PeakMemory()
    run = _whole if request["sample"] is None else _sample
    begin, cpu = time.perf_counter(), time.process_time()
    with _keeping_iterations() as iterations:
        found, of, solution = run(tokens, request)
    found |= {"cpu": time.process_time() - cpu, "peak_mib": peak.mib()}
    found["seconds"].setdefault("whole", time.perf_counter() - begin)
    gap = solution.gap.double()
    found |= {"gap": float(gap.amax()), "unconverged": int((~(gap <= request["tol"])).sum())}
    found |= {"iterations": solution.n_iter, "rows": len(gap)}
    found["mean_iterations"] = float(np.concatenate(iterations).mean()) if iterations else None
    return found | _distance(tokens, request, of, solution)


@contextlib.contextmanager
def _keeping_iterations() -> Iterator[list[np.ndarray]]:
    """Collects how many iterations each token took, which the package says of the slowest only."""
    kept: list[np.ndarray] = []
    before = {name: getattr(solver, name) for name in SOLVERS if hasattr(solver, name)}

    def keeping(solve: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            rows = solve(*arguments, **options)
            kept.append(rows.n_iter.double().numpy())
            return rows

        return run

    for name, solve in before.items():
        setattr(solver, name, keeping(solve))
    try:
        yield kept
    finally:
        for name, solve in before.items():
            setattr(solver, name, solve)


def _config(request: dict[str, Any]) -> va.VideoAnchorConfig:
    return va.VideoAnchorConfig(
        alpha_k=0, alpha_v=0, pca_rank=request["rank"], n_clusters=10 if request["data"] == "digits" else 24,
        tol=request["tol"], memory_budget=request["memory_budget"],
    )  # fmt: skip


def _whole(tokens: torch.Tensor, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, Any]:
    """Everything from tokens to scores, as a user calls it."""
    kept: list[Any] = []
    right = scores.self_expression

    def keeping(*arguments: Any, **options: Any) -> Any:
        kept.append(right(*arguments, **options))
        return kept[-1]

    scores.self_expression = keeping
    try:
        result = va.anchor_scores(tokens, _config(request))
    finally:
        scores.self_expression = right
    return {"seconds": dict(result.seconds)}, np.arange(len(tokens)), kept[0]


def _sample(tokens: torch.Tensor, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, Any]:
    """Tokens of a sample over those that are not in it; before `atoms` there was none, over all others."""
    options: Any = _config(request)
    options = options.solver_options() if hasattr(options, "solver_options") else options
    Y = token_features(tokens, request["rank"])
    chosen = torch.from_numpy(sampled(len(tokens), request["sample"]))
    begin, cpu = time.perf_counter(), time.process_time()
    with _timing_weights() as weights:
        if "atoms" in inspect.signature(solver.self_expression).parameters:
            atoms = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, chosen, False).nonzero()[:, 0]
            solution = solver.self_expression(Y[:, chosen], options, atoms=Y[:, atoms])
        else:
            solution = _sample_by_working_sets(Y, chosen, options)
    seconds = time.perf_counter() - begin - weights["seconds"]
    found = {"seconds": {"solve": seconds}, "weights_cpu": weights["cpu"]}
    found["solve_cpu"] = time.process_time() - cpu - weights["cpu"]
    return found, chosen.numpy(), solution


@contextlib.contextmanager
def _timing_weights() -> Iterator[dict[str, float]]:
    """Times the penalty weights, which look at all pairs of atoms once, however many tokens are solved."""
    spent = {"seconds": 0.0, "cpu": 0.0}
    name = "_scaled_weights" if hasattr(problem, "_scaled_weights") else "penalty_weights"
    right = getattr(problem, name)

    def timed(*arguments: Any) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        found = right(*arguments)
        spent["seconds"] += time.perf_counter() - begin
        spent["cpu"] += time.process_time() - cpu
        return found

    setattr(problem, name, timed)
    try:
        yield spent
    finally:
        setattr(problem, name, right)


def _sample_by_working_sets(Y: torch.Tensor, chosen: torch.Tensor, options: Any) -> Any:
    """As `solve_working_sets` did up to commit fa832ec, of some tokens."""
    memory, working_set, admm = (
        import_module(f"videoanchor_triton.anchor.{x}") for x in ("memory", "working_set", "admm")
    )
    rank, n_tokens = Y.shape
    plan = memory.plan_solver(n_tokens, rank, torch.float32, Y.device, "working-set", options.memory_budget)
    weighted = problem.Problem.of(Y, affine=options.affine, alpha_e=options.alpha_e, alpha_z=options.alpha_z)
    atoms, missed, block = weighted.atoms.T.contiguous(), chosen, plan.block
    found = admm.Rows.empty(n_tokens, memory.candidate_atoms(rank, n_tokens), torch.float32, Y.device)
    for dtype, most in ((torch.float32, working_set.FLOAT32_ITERATIONS), (torch.float64, options.max_iter)):
        if len(missed):
            sets = working_set._WorkingSets.of(weighted, options, atoms, dtype)
            missed = sets.solve(missed, found, most, block, lambda _: None)
        block = max(1, block // 2)
    parts = (x[chosen] for x in (found.indices, found.values, found.gap))
    return solver.SelfExpression(*parts, int(found.n_iter[chosen].amax()), options.tol, "working-set")  # pyright: ignore


def sampled(n_tokens: int, n_sample: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(n_tokens)[:n_sample])


def _distance(tokens: torch.Tensor, request: dict[str, Any], of: np.ndarray, solution: Any) -> dict[str, float]:
    """The largest distance of some tokens from an optimum that no code of the package had a part in."""
    if not request["checked"]:
        return {}
    Y = token_features(tokens, request["rank"]).numpy()
    rows = np.random.default_rng(1).permutation(len(of))[: request["checked"]]
    apart = getattr(solution, "n_atoms", len(tokens)) < len(tokens)  # by atoms that are none of the sample
    weighted = published_problem(np.delete(Y, of, 1) if apart else Y)
    lower, reached, known_to = [], [], []
    for row in rows:
        one, own = weighted, of[row : row + 1]
        if apart:
            one = replace(weighted, Y=np.hstack([weighted.Y, Y[:, own]]))
            own = np.array([weighted.Y.shape[1]])
        optimum = certified_optimum(one, own)
        indices, values = (part[row : row + 1].numpy() for part in (solution.indices, solution.values))
        lower.append(optimum.lower[0])
        reached.append(objectives(one, indices, values, own)[0])
        known_to.append(optimum.gap)
    return {"distance": float((1 - np.array(lower) / np.array(reached)).max()), "known_to": max(known_to)}


def main() -> None:
    out = sys.stdout
    for line in sys.stdin:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                found = answer(json.loads(line)) | {"package": str(Path(va.__file__).resolve().parent)}
            except Exception as failure:
                found = {"error": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
