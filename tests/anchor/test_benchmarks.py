"""The measurements of the scores, at tiny sizes, and that they give no time to a wrong result."""

import importlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, orthogonal_mp

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores
from videoanchor_triton.anchor.solver import self_expression

from .reference import textbook_weights
from .tokens import vit_like

ssc_reference: Any = importlib.import_module("benchmarks.scores.helpers.reference")
ssc_rivals: Any = importlib.import_module("benchmarks.scores.helpers.rivals")
ssc_revisions: Any = importlib.import_module("benchmarks.scores.helpers.revisions")
resume: Any = importlib.import_module("benchmarks.helpers.resume")
ssc_resumed: Any = importlib.import_module("benchmarks.scores.helpers.resumed")
ssc_speed: Any = importlib.import_module("benchmarks.scores.speed")
ssc_long: Any = importlib.import_module("benchmarks.scores.long_video")
head_to_head: Any = importlib.import_module("benchmarks.scores.head_to_head")
stability: Any = importlib.import_module("benchmarks.scores.stability")
ssc_tokens: Any = importlib.import_module("benchmarks.scores.helpers.token_sets")
ssc_streaming: Any = importlib.import_module("benchmarks.scores.streaming")
record: Any = importlib.import_module("benchmarks.helpers.record")

ROOT = Path(__file__).parents[2]
SPEED = ["--sizes", "48", "64", "--whole", "48", "--sample", "16", "--ranks", "12", "--tols", "1e-3", "--repeats", "1"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "kernels"))
    return importlib.import_module("benchmarks.scores.helpers.gpu_tasks")


def features(n_tokens: int = 40, rank: int = 12) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rank, n_tokens))


def test_the_problem_is_the_published_one() -> None:
    problem = ssc_reference.published_problem(features(300))
    assert (problem.lambda_e, problem.lambda_z) == pytest.approx(textbook_weights(features(300), 800.0, 800.0))


def test_a_command_runs_from_any_folder(tmp_path: Path) -> None:
    """As a script, whose folder is all that Python knows of the benchmarks."""
    command = ROOT / "benchmarks" / "scores" / "long_video.py"
    arguments = ["--tokens", "64", "--ranks", "6", "--sample", "16", "--against", "none", "--out", "out"]
    subprocess.run([sys.executable, command, *arguments], cwd=tmp_path, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "out" / "scores-long-video.json").read_text())["rows"]
    assert (row["tokens"], row["rank"], row["solved"], row["unconverged"]) == (64, 6, 16, 0)
    assert row["solve_seconds"] > 0
    assert row["weights_seconds"] > 0


def test_the_bounds_hold_whatever_the_coefficients() -> None:
    problem = ssc_reference.published_problem(features())
    tokens = np.array([3, 17])
    optimum = ssc_reference.certified_optimum(problem, tokens)
    assert optimum.gap < 1e-6
    indices = np.tile(np.arange(40), (2, 1))
    coefficients = np.abs(np.random.default_rng(1).standard_normal((2, 40)))
    itself = ssc_reference.objectives(problem, indices, coefficients, tokens)
    assert np.isinf(itself).all()
    coefficients[[0, 1], tokens] = 0
    assert (ssc_reference.objectives(problem, indices, coefficients, tokens) > optimum.upper).all()
    negative = ssc_reference.objectives(problem, indices, -coefficients, tokens)
    assert np.isinf(negative).all()
    for seed in range(20):
        nu = np.random.default_rng(seed).standard_normal(12)
        assert ssc_reference._dual_value(problem, 3, nu) <= optimum.upper[0]


def test_the_objective_is_that_of_the_definition() -> None:
    Y = features()
    problem = ssc_reference.published_problem(Y)
    indices, values = np.array([[1, 5, 0]]), np.array([[0.5, -0.25, 0.75]])
    residual = Y[:, 7] - Y[:, [1, 5, 0]] @ values[0]
    fit = np.clip(residual, -problem.lambda_e / problem.lambda_z, problem.lambda_e / problem.lambda_z)
    expected = 1.5 + problem.lambda_e * np.abs(residual - fit).sum() + problem.lambda_z / 2 * (fit**2).sum()
    assert ssc_reference.objectives(problem, indices, values, np.array([7])) == pytest.approx([expected])


def test_omp_is_scikit_learns() -> None:
    Y = features(30, 8)
    indices, values = ssc_rivals.omp(torch.from_numpy(Y), terms=4)
    for token in (0, 29):
        others = np.delete(Y, token, 1)
        unit = others / np.linalg.norm(others, axis=0)
        found = orthogonal_mp(unit, Y[:, token], n_nonzero_coefs=4) / np.linalg.norm(others, axis=0)
        dense = np.zeros(30)
        np.add.at(dense, indices[token].numpy(), values[token].numpy())
        np.testing.assert_allclose(dense, np.insert(found, token, 0.0), atol=1e-8)


def test_the_elastic_net_is_scikit_learns() -> None:
    Y = features(30, 8)
    norms = np.linalg.norm(Y, axis=0)
    indices, values, gap = ssc_rivals.elastic_net(torch.from_numpy(Y), 1e-8)
    assert gap <= 1e-8
    for token in (0, 29):
        unit = np.delete(Y / norms, token, 1)
        target = Y[:, token] / norms[token]
        l1 = np.abs(target @ unit).max() / ssc_rivals.EFFORT
        l2 = l1 * (1 - ssc_rivals.L1_SHARE) / ssc_rivals.L1_SHARE
        net = ElasticNet((l1 + l2) / 8, l1_ratio=l1 / (l1 + l2), fit_intercept=False, max_iter=100_000, tol=1e-12)
        dense = np.zeros(30)
        np.add.at(dense, indices[token].numpy(), values[token].numpy())
        expected = np.insert(net.fit(unit, target).coef_, token, 0.0) * norms[token] / norms
        np.testing.assert_allclose(dense, expected, atol=1e-3)


def test_head_to_head_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path), "--sizes", "160", "--repeats", "1", "--data", "vit"]
    assert head_to_head.main([*command, "--methods", "omp"]) == 0
    first = json.loads((tmp_path / "scores-head-to-head.json").read_text())["rows"]
    assert head_to_head.main(command) == 0, capsys.readouterr().out
    rows = [head_to_head.Row(**x) for x in json.loads((tmp_path / "scores-head-to-head.json").read_text())["rows"]]
    assert rows[0] == head_to_head.Row(**first[0])
    found = {row.method: row for row in rows}
    assert found.keys() == head_to_head.METHODS.keys()
    assert all(row.status == "ok" and row.seconds and row.ari is not None for row in rows)
    assert found["ssc"].distance <= 1e-3
    assert all(found[name].excess > 0.01 for name in ("omp", "elastic net"))
    assert found["ssc"].excess is None
    assert all(0 < row.noise_ari <= 1 for row in rows)
    assert (tmp_path / "scores-head-to-head.png").read_bytes().startswith(b"\x89PNG")


def test_head_to_head_gives_no_time_to_what_is_not_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = head_to_head.scores_module.self_expression

    def wrong(*arguments: Any, **options: Any) -> Any:
        solution = right(*arguments, **options)
        return replace(solution, values=solution.values.roll(1, 0))

    monkeypatch.setattr(head_to_head.scores_module, "self_expression", wrong)
    command = ["--out", str(tmp_path), "--sizes", "96", "--repeats", "1", "--data", "vit", "--stability", "0"]
    assert head_to_head.main([*command, "--methods", "ssc"]) == 1
    (row,) = json.loads((tmp_path / "scores-head-to-head.json").read_text())["rows"]
    assert (row["status"], row["seconds"]) == ("wrong", None)
    row, tokens = head_to_head.Row("vit", 96, 64, "elastic net"), ssc_tokens.vit_like(96)
    assert head_to_head.judged(row, tokens, head_to_head.Found(np.zeros(96), gap=1e-3)).status == "ok"
    assert head_to_head.judged(row, tokens, head_to_head.Found(np.zeros(96), gap=0.1)).status == "wrong"


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    def results(commit: str, **more: Any) -> Any:
        return ssc_resumed.Results(tmp_path, "some", head_to_head.Row, ("data",), {"commit": commit}, str, **more)

    results("a").add(head_to_head.Row("vit", 1, 2, "ssc"))
    assert results("a").known(data="vit")
    assert not results("a").known(data="photo")
    with pytest.raises(resume.RefusedError, match="commit a there, b here"):
        results("b")
    assert results("b", anew=True).rows == []


def test_speed_compares_revisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here with itself, and an outcome that is not a matter of time."""
    assert ssc_speed.main(["--out", str(tmp_path), "--against", str(ROOT), *SPEED]) == 0, capsys.readouterr()
    content = json.loads((tmp_path / "scores-speed.json").read_text())
    rows = [ssc_speed.Row(**row) for row in content["rows"]]
    assert [(row.tokens, row.revision, row.threads, row.solved) for row in rows] == [
        (48, str(ROOT), 1, 48), (48, "now", 1, 48), (48, "now", 2, 48), (64, str(ROOT), 1, 16), (64, "now", 1, 16)
    ]  # fmt: skip
    assert all(row.status == "ok" and row.cpu_seconds and row.distance <= 1e-3 for row in rows)
    assert all(row.mean_iterations and row.mean_iterations <= row.iterations for row in rows)
    ours, other = rows[1], rows[0]
    assert ours.ratio == pytest.approx(other.cpu_seconds / ours.cpu_seconds)
    assert rows[2].ratio > 0
    assert "rank 12, gap 0.001, 2 threads" in (tmp_path / "scores-speed.md").read_text()
    assert (tmp_path / "scores-speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("unconverged", "distance"), [(1, 1e-4), (0, 2e-3), (0, float("nan"))])
def test_speed_gives_no_time_to_what_is_further_than_promised(unconverged: int, distance: float) -> None:
    row = ssc_speed.Row("vit", 48, 12, 1e-3, 1, "now", 48, "failed")
    answer = {"rows": 48, "gap": 1e-3, "iterations": 9, "cpu": 1.0, "seconds": {"whole": 1.0}, "known_to": 1e-9}
    right = ssc_speed.measured(row, [answer | {"unconverged": 0, "distance": 1e-4}])
    assert (right.status, right.cpu_seconds) == ("ok", 1.0)
    found = ssc_speed.measured(row, [answer | {"unconverged": unconverged, "distance": distance}])
    assert (found.status, found.cpu_seconds, found.seconds) == ("wrong", None, None)
    assert ssc_speed.with_ratio(right, found).ratio is None


def test_a_revision_that_fails_says_why(tmp_path: Path) -> None:
    with ssc_revisions.Revision(ROOT / "src") as worker, pytest.raises(ssc_revisions.FailedError, match="KeyError"):
        worker.ask(data="none", tokens=9)
    with ssc_revisions.Revision(tmp_path) as worker:
        worker._process.kill()
        with pytest.raises(ssc_revisions.FailedError, match="the process ended with -9"):
            worker.ask(data="vit", tokens=9)
    with pytest.raises(ssc_revisions.FailedError, match="neither a folder nor a commit"):
        ssc_revisions.checkout("no-such-commit", tmp_path)


def test_long_videos_have_no_time_without_certificates() -> None:
    class Worker:
        def ask(self, **_: Any) -> dict[str, Any]:
            return {"rows": 9, "gap": 0.1, "unconverged": 2, "iterations": 9, "mean_iterations": 2.0, "peak_mib": 1.0}

    found = ssc_long.measured(ssc_long.Row(100, 6, "now", False, 0, 9, 64.0), Worker())
    assert (found.status, found.solve_seconds) == ("wrong", None)


def test_stability_runs(tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--tokens", "300", "--ranks", "6", "24", "--data", "vit", "--budgets", "4"]
    assert stability.main(command) == 0, (tmp_path / "scores-stability.md").read_text()
    rows = [stability.Row(**x) for x in json.loads((tmp_path / "scores-stability.json").read_text())["rows"]]
    assert len(rows) == 2 * len(stability.changes([4]))
    assert all(row.row_sums == row.labels == 1 for row in rows if row.changed == "nothing")
    assert {row.hull > 0.5 for row in rows if row.rank == 6} == {True}
    assert (tmp_path / "scores-stability.png").read_bytes().startswith(b"\x89PNG")
    assert stability.main([*command, "--least", "1.1"]) == 1


@pytest.mark.parametrize("n_tokens", [2, 33, 648])
def test_there_are_as_many_tokens_of_photographs_as_asked_for(n_tokens: int) -> None:
    tokens = ssc_tokens.photo(n_tokens).X
    assert tokens.shape == (n_tokens, ssc_tokens.HIDDEN)
    assert len(np.unique(tokens, axis=0)) == n_tokens


def test_gpu_check_scores_are_right_at_a_tiny_size(gpu: Any) -> None:
    for task in gpu.score_tasks(torch.device("cpu")):
        row = task.run(task.row)
        assert (row.status, row.ms) == ("ok", None), row


def test_gpu_check_gives_no_time_to_wrong_scores(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.self_expression

    def wrong(*arguments: Any, **options: Any) -> Any:
        solution = right(*arguments, **options)
        return replace(solution, values=1.02 * solution.values + 0.01)

    monkeypatch.setattr(gpu, "self_expression", wrong)
    for task in gpu.score_tasks(torch.device("cpu")):
        assert task.run(task.row).status == "wrong", task.row.contender


def test_gpu_check_plans_scores_from_2k_to_65k_tokens(gpu: Any) -> None:
    tasks = list(gpu.score_tasks(torch.device("cuda")))
    assert {task.row.keys for task in tasks} == {2048, 8192, 16384, 65536}
    assert len({(task.row.case, task.row.contender) for task in tasks}) == len(tasks)


def test_gpu_check_headlines_and_table_of_scores() -> None:
    def row(tokens: int, contender: str, ms: float, **more: Any) -> Any:
        return record.Row("scores", f"N={tokens}", contender, keys=tokens, status="ok", ms=ms, unit="ms", **more)

    rows = [row(2048, "ours, total", 20.0), row(2048, "ours, solve", 90.0), row(16384, "ours, total", 1200.0)]
    rows.append(row(65536, "ours, total", 2000.0, peak_extra_mib=17000.0))
    found = {headline.name: (headline.value, headline.met) for headline in record.headlines(rows)}
    assert found == {
        "scores of 2048 tokens, ms": (20.0, True),
        "scores of 16384 tokens, ms": (1200.0, False),
        "scores of 65536 tokens, ms": (2000.0, True),
        "scores of 65536 tokens, peak MiB": (17000.0, False),
    }
    assert "| N=2048 | 20 | 90 |" in record.summary({"device": "none"}, rows)


def test_benchmark_runs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert ssc_streaming.main(["--out", str(tmp_path), "--quick"]) == 0
    content = json.loads((tmp_path / "ssc-streaming.json").read_text())
    rows = [ssc_streaming.Row(**row) for row in content["rows"]]
    assert len({(row.case, row.max_atoms, row.chunk) for row in rows}) == len(rows) == 4
    assert all(-1 <= row.score <= 1 and 0 <= row.drift <= 1 and row.ari <= 1 for row in rows)
    assert (tmp_path / "ssc-streaming.png").read_bytes().startswith(b"\x89PNG")
    assert "## shared subspaces: N = 96" in (tmp_path / "ssc-streaming.md").read_text()


def test_benchmark_of_the_cache_runs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert ssc_streaming.main(["--out", str(tmp_path), "--quick", "--cache"]) == 0
    rows = json.loads((tmp_path / "ssc-streaming-cache.json").read_text())["rows"]
    assert [row["keep"] for row in rows] == [row["tokens"] // 2 for row in rows]
    assert all(0 < row["merged"] < min(row["uncounted"], row["newest"]) for row in rows)
    assert "without counts" in (tmp_path / "ssc-streaming-cache.md").read_text()


def test_a_cache_that_holds_all_tokens_has_no_error() -> None:
    tokens = ssc_tokens.vit_like(120)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ssc_streaming, "CACHES", (1.0,))
        (row,) = ssc_streaming.cache_rows("all", tokens, quick=False)
    assert row.merged == row.uncounted == row.newest == 0


def test_benchmark_finds_no_difference_where_there_is_none() -> None:
    X, config = vit_like(4, 20).numpy(), VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=6, pca_rank=16)
    found = ssc_streaming.streamed(X, config, 80, 80, 80)
    assert np.array_equal(found.scores, anchor_scores(X, config).scores.numpy())
    whole = self_expression(token_features(torch.from_numpy(X), 16), config)
    assert np.array_equal(found.row_sums, whole.row_sums().numpy())
    parts = ssc_streaming.streamed(X, config, 40, 20, 80)
    assert np.array_equal(parts.row_sums[60:], whole.row_sums().numpy()[60:])
    assert not np.array_equal(parts.row_sums[:60], whole.row_sums().numpy()[:60])


def test_a_long_task_of_the_scores_says_that_it_is_at_work(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpu_check.py ends a worker that is silent: each stage is said, and that it may take long."""
    said: list[tuple[str, float]] = []
    monkeypatch.setattr(gpu, "alive", lambda what, seconds: said.append((what, seconds)))
    scores = gpu.Scores(40, torch.device("cpu"))
    scores.total(record.Row("scores", "N=40", "ours, total"))
    words = " ".join(what for what, _ in said)
    assert all(stage in words for stage in ("solve", "optimum of token", "of 40 tokens", "pca"))
    assert {seconds for _, seconds in said} == {gpu.STAGE_SECONDS}
    said.clear()
    report = gpu.saying("scores")
    for done in range(1000):
        report("solve", done, 1000)
    report("score", 0, 1)
    assert [what.split(",")[0] for what, _ in said] == ["scores: solve", "scores: score"]
