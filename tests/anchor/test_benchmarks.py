"""The measurements of the scores, at tiny sizes, and that they give no time to a wrong result."""

import csv
import importlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores
from videoanchor_triton.anchor.solver import self_expression

from .reference import textbook_iterates, textbook_weights
from .tokens import vit_like

ssc_reference: Any = importlib.import_module("benchmarks.scores.helpers.reference")
ssc_speed: Any = importlib.import_module("benchmarks.scores.speed")
ssc_tokens: Any = importlib.import_module("benchmarks.scores.helpers.token_sets")
ssc_quality: Any = importlib.import_module("benchmarks.scores.quality")
ssc_streaming: Any = importlib.import_module("benchmarks.scores.streaming")
record: Any = importlib.import_module("benchmarks.helpers.record")

SPEED = ["--sizes", "48", "--rank", "24", "--checked", "6", "--targets", "1e-2"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "kernels"))
    return importlib.import_module("benchmarks.scores.helpers.gpu_tasks")


def features(n_tokens: int = 40, rank: int = 12) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rank, n_tokens))


@pytest.mark.parametrize("factorised", [False, True], ids=["solve", "factorised"])
@pytest.mark.parametrize("affine", [False, True], ids=["linear", "affine"])
@pytest.mark.parametrize("alpha_e", [3.0, 800.0], ids=["error-active", "error-zero"])
def test_the_textbook_is_the_textbook(factorised: bool, affine: bool, alpha_e: float) -> None:
    Y = features()
    weights = textbook_weights(Y, alpha_e, 800.0)
    problem = ssc_reference.Problem(Y, *weights, affine)
    found = next(islice(ssc_reference.textbook_iterates(problem, factorised), 29, None))
    *_, (_, expected) = textbook_iterates(Y, *weights, 300.0, affine, 30, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)
    some = np.array([7, 0, 31])
    found = next(islice(ssc_reference.textbook_iterates(problem, factorised, some), 29, None))
    np.testing.assert_allclose(found, expected[:, some], atol=1e-10, rtol=0)


def test_the_problem_is_the_published_one() -> None:
    problem = ssc_speed.published_problem(features())
    assert (problem.lambda_e, problem.lambda_z) == pytest.approx(textbook_weights(features(), 800.0, 800.0))


def test_a_command_runs_from_any_folder(tmp_path: Path) -> None:
    """As a script, whose folder is all that Python knows of the benchmarks."""
    command = Path(__file__).parents[2] / "benchmarks" / "scores" / "long_video.py"
    arguments = ["--tokens", "40", "--rank", "6", "--out", "out"]
    subprocess.run([sys.executable, command, *arguments], cwd=tmp_path, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "out" / "ssc-long.json").read_text())["rows"]
    assert (row["tokens"], row["rank"], row["unconverged"]) == (40, 6, 0)


def test_the_bounds_hold_whatever_the_coefficients() -> None:
    problem = ssc_speed.published_problem(features())
    tokens = np.array([3, 17])
    optimum = ssc_reference.certified_optimum(problem, tokens)
    coefficients = np.abs(np.random.default_rng(1).standard_normal((40, 2)))
    assert np.isinf(ssc_reference.objectives(problem, coefficients, tokens)).all()  # a token expresses itself
    coefficients[tokens, [0, 1]] = 0
    assert (ssc_reference.objectives(problem, coefficients, tokens) > optimum.upper).all()
    assert np.isinf(ssc_reference.objectives(problem, -coefficients, tokens)).all()  # negative sums
    for _ in range(20):
        nu = np.random.default_rng(2).standard_normal(12)
        assert ssc_reference._dual_value(problem, 3, nu) <= optimum.upper[0]


def test_speed_writes_every_contender_with_ratios_to_the_textbook(tmp_path: Path) -> None:
    assert ssc_speed.main(["--out", str(tmp_path), *SPEED]) == 0, (tmp_path / "ssc-speed.md").read_text()
    content = json.loads((tmp_path / "ssc-speed.json").read_text())
    rows = [ssc_speed.Row(**row) for row in content["rows"]]
    names = [ssc_speed.TEXTBOOK, ssc_speed.FACTORISED, ssc_speed.AUTHORS, *ssc_speed.OURS]
    found = {row.contender: row for row in rows}
    assert sorted(found) == sorted(names)
    assert all(row.status == "ok" and row.seconds and row.distance is not None for row in rows)
    assert all(row.distance <= 1e-2 for row in rows if row.target)
    plain, ours = found[ssc_speed.TEXTBOOK], found["ours, dense"]
    assert plain.product
    assert plain.iterations == found[ssc_speed.FACTORISED].iterations
    assert plain.seconds == pytest.approx(plain.iterations * plain.ms_per_iteration / 1e3)
    assert not found[ssc_speed.FACTORISED].product
    assert ours.faster == pytest.approx(plain.seconds / ours.seconds)
    assert ours.faster_per_iteration == pytest.approx(plain.ms_per_iteration / ours.ms_per_iteration)
    with (tmp_path / "ssc-speed.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert table[0]["device"] == content["device"]
    assert (tmp_path / "ssc-speed.png").read_bytes().startswith(b"\x89PNG")
    assert "## N = 48" in (tmp_path / "ssc-speed.md").read_text()


def test_speed_gives_no_time_to_what_is_further_from_the_optimum_than_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ssc_speed.self_expression

    def wrong(*arguments: Any, **options: Any) -> Any:
        solution = right(*arguments, **options)
        return replace(solution, values=solution.values.roll(1, 0))

    monkeypatch.setattr(ssc_speed, "self_expression", wrong)
    assert ssc_speed.main(["--out", str(tmp_path), *SPEED]) == 1
    rows = json.loads((tmp_path / "ssc-speed.json").read_text())["rows"]
    ours = [row for row in rows if not row["contender"].startswith("textbook")]
    assert ours
    assert all(row["status"] == "wrong" and row["seconds"] is None for row in ours)
    assert all(row["status"] == "wrong" and row["seconds"] is None for row in rows), "other iterates, no product"


def test_speed_stops_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, progress: Any, **__: Any) -> Any:
        progress("solve", 1, 48)

    monkeypatch.setattr(ssc_speed, "self_expression", late)
    bench = ssc_speed.Bench(torch.from_numpy(features()), None, None, deadline=0.0)
    row = ssc_speed.Row(48, 12, "ours, dense", 1e-2)
    found = ssc_speed.attempt(row, lambda row: ssc_speed.measured(bench, row, dtype=torch.float32))
    assert (found.status, found.reason) == ("skipped", record.TIME_BUDGET)


def test_quality_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssc_quality.main(["--out", str(tmp_path), "--quick"]) == 0
    content = json.loads((tmp_path / "ssc-quality.json").read_text())
    rows = [ssc_quality.Row(**row) for row in content["rows"]]
    clean = {row.method: row for row in rows if row.case == "noise"}
    assert clean["exact SSC"].ari == clean["authors' stopping rule"].ari == 1
    assert clean["exact SSC"].mass > 0.999
    assert clean["uniform"].mass < 0.2
    for row in rows:
        if row.section == "sets" and row.case.startswith("camera"):
            assert 0 <= row.matched_by_chance <= row.matched <= 1
    assert {row.method for row in rows if row.section == "algorithms"} == set(ssc_quality.ALGORITHMS)
    said = capsys.readouterr().out
    assert said.count("labels are **") == 2
    for name in ("unions", "stability"):
        assert (tmp_path / f"ssc-quality-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_unstable_labels_are_said_to_be() -> None:
    def rows(seeds: float, algorithms: float) -> list[Any]:
        values = {"seeds": seeds, "algorithms": algorithms, "assignment": 0.1}
        return [ssc_quality.Row(section, "some tokens", "a", 9, ari=ari) for section, ari in values.items()]

    assert "labels are **stable**" in "".join(ssc_quality.stability(rows(1.0, 0.96)))
    assert "labels are **UNSTABLE**" in "".join(ssc_quality.stability(rows(0.9, 1.0)))
    assert "labels are **UNSTABLE**" in "".join(ssc_quality.stability(rows(1.0, 0.9)))


def test_mass_is_that_inside_the_true_subspaces() -> None:
    solution = SimpleNamespace(
        indices=torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]]),
        values=torch.tensor([[0.5, -0.5], [1.0, 0.0], [-0.25, 0.75], [1.0, 0.0]]),
    )
    truth = np.array([0, 0, 1, 1])
    assert ssc_quality.mass_inside(truth, solution) == pytest.approx((0.5 + 1 + 0.25 + 1) / 4)
    assert ssc_quality.mass_inside(truth, None) == pytest.approx(4 / 12)


@pytest.mark.parametrize("angle", [10.0, 45.0])
def test_disjoint_subspaces_have_the_angle_that_they_say(angle: float) -> None:
    tokens = ssc_tokens.disjoint_subspaces(angle, 16)
    bases = [np.linalg.svd(tokens.X[tokens.truth == k].T, full_matrices=False)[0][:, :4] for k in range(3)]
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    np.testing.assert_allclose(np.rad2deg(np.arccos(cosines)), angle, atol=1e-6)
    assert np.linalg.matrix_rank(tokens.X) == 8


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

    rows = [row(2048, "ours, total", 40.0), row(2048, "ours, solve", 90.0), row(16384, "ours, total", 1200.0)]
    rows.append(row(65536, "ours, total", 9000.0, peak_extra_mib=17000.0))
    found = {headline.name: (headline.value, headline.met) for headline in record.headlines(rows)}
    assert found == {
        "scores of 2048 tokens, ms": (40.0, True),
        "scores of 16384 tokens, ms": (1200.0, False),
        "scores of 65536 tokens, ms": (9000.0, True),
        "scores of 65536 tokens, peak MiB": (17000.0, False),
    }
    assert "| N=2048 | 40 | 90 |" in record.summary({"device": "none"}, rows)


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


def test_benchmark_finds_no_difference_where_there_is_none() -> None:
    X, config = vit_like(4, 20).numpy(), VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=6, pca_rank=16)
    found = ssc_streaming.streamed(X, config, 80, 80, 80)
    assert np.array_equal(found.scores, anchor_scores(X, config).scores.numpy())
    whole = self_expression(token_features(torch.from_numpy(X), 16), config.solver_options())
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
