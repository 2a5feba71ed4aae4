"""A search that finds what was planted, claims nothing of noise, and goes on where it stopped."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from eval_runs import lose_the_device_after, run
from matplotlib.figure import Figure

from videoanchor_triton.app import pipeline
from videoanchor_triton.app.evaluation import pictures
from videoanchor_triton.app.evaluation.paired import compare
from videoanchor_triton.app.evaluation.pictures import draw_search
from videoanchor_triton.app.evaluation.report import COLUMNS
from videoanchor_triton.app.evaluation.tune import Point, Trial, best_gate, conclusion, coordinate_search, split
from videoanchor_triton.integrations.errors import InputError

GRID = (0, 0.5, 1, 2, 4, 8)


def answers(right: Callable[[Point], float], seed: int, asked: list[int] | None = None):
    """Questions that a model gets right with probability `right(point)`. Each has a difficulty of its own, the same for
    all points, and for each point a little luck."""

    def evaluate(points: Sequence[Point], numbers: Sequence[int]) -> np.ndarray:
        if asked is not None:
            asked.append(len(points) * len(numbers))
        difficulty = np.array([np.random.default_rng([seed, n]).random() for n in numbers])
        luck = [
            [np.random.default_rng([seed, n, *np.array(p).view(np.uint32)]).normal() for n in numbers] for p in points
        ]
        chance = np.array([right(point) for point in points])
        return (difficulty + 0.05 * np.array(luck) < chance[:, None]).astype(float)

    return evaluate


def planted(point: Point) -> float:
    """0.4 without a gate, 0.8 at (4, 1)."""
    distance = np.hypot(np.log1p(point[0]) - np.log1p(4), np.log1p(point[1]) - np.log1p(1))
    return 0.35 + 0.45 * float(np.exp(-(distance**2)))


def tune(evaluate, n_questions: int = 200, seed: int = 0):
    order, held = split(["a", "b"] * (n_questions // 2), np.arange(n_questions), 0.3, seed)
    point, trials = coordinate_search(evaluate, GRID, GRID, order)
    after, before = evaluate([point, (0.0, 0.0)], held)
    return point, trials, compare(after, before, np.array(held)) if any(point) else None


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_optimum_is_found(seed: int) -> None:
    point, _, held_out = tune(answers(planted, seed), seed=seed)
    assert planted(point) > 0.75
    assert held_out is not None
    assert held_out.verdict == "gain"
    assert conclusion(point, point, held_out).startswith(
        f"Gain shown for alpha_k = {point[0]:g}, alpha_v = {point[1]:g}: +"
    )


def test_noise_is_no_gain() -> None:
    """The gate does nothing but shuffle answers: of 40 searches, each of which picks the luckiest point, about one in
    forty shows a gain by chance."""
    verdicts = []
    for seed in range(40):
        point, _, held_out = tune(answers(lambda _: 0.5, seed), n_questions=80, seed=seed)
        verdicts.append("no gain shown" if held_out is None else held_out.verdict)
        if verdicts[-1] == "no gain shown":
            assert conclusion(point, point if any(point) else None, held_out).startswith("No gain shown")
    assert verdicts.count("gain") <= 3


def test_what_the_search_itself_saw_would_have_been_a_gain() -> None:
    """Why questions are held out: on those it was chosen on, the luckiest of many points looks better."""
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = {(k, v): (rng.random(40) < 0.5).astype(float) for k in map(float, GRID) for v in map(float, GRID)}
        point, _ = coordinate_search(
            lambda points, numbers, table=table: np.stack([table[p][numbers] for p in points]), GRID, GRID, range(28)
        )
        gains.append((table[point][:28].mean() - 0.5, table[point][28:].mean() - 0.5))
    on_search, on_held_out = np.mean(gains, 0)
    assert on_search > 0.1
    assert abs(on_held_out) < 0.06


def test_halving_asks_less_than_the_grid() -> None:
    asked: list[int] = []
    _, trials, _ = tune(answers(planted, 0, asked))
    assert sum(asked) < 0.6 * len(GRID) ** 2 * 140
    first = [trial for trial in trials if (trial.search_pass, trial.coordinate) == (1, "alpha_k")]
    assert [(trial.rung, trial.n) for trial in first] == [(1, 35)] * 6 + [(2, 70)] * 3 + [(3, 140)] * 2
    assert [sum(trial.kept for trial in first if trial.rung == rung) for rung in (1, 2, 3)] == [3, 2, 1]


def test_ties_go_to_the_weaker_gate() -> None:
    point, trials = coordinate_search(
        lambda points, numbers: np.ones((len(points), len(numbers))), GRID, GRID, range(20)
    )
    assert point == (0, 0)
    assert best_gate(trials) in [(0, 1), (1, 0), (0, 0.5), (0.5, 0)], "the weakest of them"
    assert conclusion(point, None, None).endswith("prefers no gate (alpha_k = alpha_v = 0).")


def test_where_no_gate_is_better_the_best_one_is_judged() -> None:
    """Every gate costs 20 points, the stronger the more: the search says so, with what the weakest costs elsewhere."""
    table = np.random.default_rng(0).random(400)

    def evaluate(points: Sequence[Point], numbers: Sequence[int]) -> np.ndarray:
        return np.array([(table[list(numbers)] < 0.9 - 0.2 * any(p) - 0.01 * sum(p)).astype(float) for p in points])

    point, trials = coordinate_search(evaluate, GRID, GRID, range(200))
    gate = best_gate(trials)
    assert point == (0, 0)
    assert gate is not None
    assert sum(gate) == min(trial.alpha_k + trial.alpha_v for trial in trials if trial.alpha_k + trial.alpha_v)
    after, before = evaluate([gate, point], range(200, 400))
    held_out = compare(after, before, np.arange(200))
    assert held_out.high < 0
    said = conclusion(point, gate, held_out)
    assert f"the best gate it tried, alpha_k = {gate[0]:g}, alpha_v = {gate[1]:g}: -" in said
    assert f"{100 * held_out.low:+.1f} to {100 * held_out.high:+.1f}" in said


def test_failures_are_left_out_of_all_points_of_a_rung() -> None:
    """The better point failed on the questions that all others get right."""

    def evaluate(points: Sequence[Point], numbers: Sequence[int]) -> np.ndarray:
        hard = np.array(numbers) % 2 == 1
        return np.array([np.where(hard, float(k == 2), np.nan if k == 2 else 1.0) for k, _ in points])

    point, trials = coordinate_search(evaluate, (0, 2), (0,), range(20))
    assert point == (2, 0)
    assert trials[-1].n == 10
    assert conclusion(point, point, None, 7, 7).startswith("Nothing could be judged: ")
    with pytest.raises(InputError, match="no question was answered"):
        coordinate_search(lambda points, numbers: np.full((len(points), len(numbers)), np.nan), GRID, GRID, range(9))


def test_split_takes_its_share_of_every_type() -> None:
    types = ["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"]
    videos = np.arange(63)
    order, held = split(types, videos, 0.3, 7)
    assert sorted(order + held) == list(range(63))
    assert {kind: [types[n] for n in held].count(kind) for kind in "abc"} == {"a": 15, "b": 3, "c": 1}
    assert split(types, videos, 0.3, 7) == (order, held)
    assert split(types, videos, 0.3, 8) != (order, held)
    assert 3 <= [types[n] for n in order[:24]].count("b") <= 5  # mixed evenly from the start
    order, held = split([str(n) for n in range(10)], videos[:10], 0.3, 0)  # types of a single question each
    assert (len(order), len(held)) == (7, 3)
    for share in (0, 1, float("nan")):
        with pytest.raises(InputError, match="--held-out"):
            split(types, videos, share, 0)
    with pytest.raises(InputError, match="more videos"):
        split(["a"], videos[:1], 0.3, 0)


@pytest.mark.parametrize("seed", range(3))
def test_no_video_is_in_both_parts(seed: int) -> None:
    """40 videos of 1 to 20 questions of three types, rows in any order: about the share of each type is held out."""
    rng = np.random.default_rng(seed)
    videos = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 21, 40)))
    types = rng.choice(["a", "b", "c"], len(videos), p=[0.6, 0.3, 0.1]).tolist()
    order, held = split(types, videos, 0.3, seed)
    assert sorted(order + held) == list(range(len(videos)))
    assert not {*videos[order]} & {*videos[held]}
    for kind in "abc":
        assert [types[n] for n in held].count(kind) / types.count(kind) == pytest.approx(0.3, abs=0.1)
    one_large = np.r_[np.zeros(50), np.arange(1, 51)]
    assert {len(split(["a"] * 100, one_large, 0.1, other)[1]) for other in range(20)} == {10}  # of the small ones
    with pytest.raises(InputError, match="9 questions about 1 videos"):
        split(["a"] * 9, np.zeros(9), 0.3, seed)


def test_picture_of_a_search_over_one_coordinate() -> None:
    trials = [Trial("alpha_k", 1, 1, k, 1.0, 9, 0.1 * k, k == 2.0) for k in (0.0, 2.0)]
    picture = draw_search(trials, None, "No gain shown.")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_long_conclusion_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "_png", drawn.append)
    said = conclusion((0.0, 0.0), (0.25, 0.125), compare(np.ones(300), np.zeros(300), np.arange(300)))
    draw_search([Trial("alpha_k", 1, 1, 0.0, 1.0, 9, 0.1, True)], None, said)
    (figure,) = drawn
    figure.draw_without_rendering()
    (title,) = (text for text in figure.texts if text.get_text())
    box = title.get_window_extent()
    assert (box.x0 >= 0, box.x1 <= figure.bbox.width) == (True, True)
    assert title.get_text().replace("\n", " ") == said


@pytest.mark.parametrize(
    ("options", "n_trials"),
    [(("--grid-k", "0,400", "--grid-v", "0"), 2), (("--grid-k", "400", "--grid-v", "40"), 0)],
    ids=["search", "one point"],
)
def test_tune_as_a_user_runs_it(
    clips: Path,
    n_scored: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    n_trials: int,
) -> None:
    out = tmp_path / "out"
    assert run("tune", clips, out, "--held-out", "0.5", *options) == 0
    shown = capsys.readouterr().out
    record = json.loads((out / "tune.json").read_text())
    assert shown.startswith(("**No gain shown", "**Nothing could be judged: no letter or number could be read from"))
    assert record["conclusion"] in shown
    with (out / "tune.csv").open(newline="") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames or ()) == COLUMNS["tune"]
        assert [row["questions_sha256"] for row in table] == [record["questions_sha256"]] * n_trials
    assert "mean (%)" in (out / "tune.md").read_text()
    assert len(record["held_out_ids"]) == 2  # both about one of the two videos
    if record["held_out"] is not None:  # the search may prefer no gate
        assert (record["held_out"]["n"], record["held_out"]["n_videos"]) == (2, 1)
    if record["held_out"] is not None and "could be judged" not in shown:
        assert "on 2 questions about 1 videos held out" in shown
    assert {path.name for path in out.iterdir()} >= {"tune.md", "tune.csv", "tune.json", "tune.png", "replies.jsonl"}
    assert n_scored[1] <= 2  # each clip once, whatever the strengths
    asked = n_scored[0]
    assert run("tune", clips, out, "--held-out", "0.5", *options, "--json") == 0
    assert {**json.loads(capsys.readouterr().out), "date": record["date"]} == record
    assert n_scored[0] == asked  # nothing is asked again


def test_tune_stops_where_the_device_is_lost(
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "answer", lose_the_device_after(3, pipeline.answer))
    assert run("tune", clips, tmp_path, "--held-out", "0.5", "--grid-k", "0,400", "--grid-v", "0") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("videoanchor tune: stopped, as the device failed")
    assert last.endswith(f"{tmp_path} has what was done, the same command goes on")
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grid-k", "0,1e9"), "--grid-k: alpha_k"),
        (("--grid-v", "-1"), "--grid-v: alpha_v"),
        (("--grid-v", "nan"), "--grid-v: alpha_v"),
        (("--grid-k", "inf,1"), "--grid-k: alpha_k"),
        (("--held-out", "1.5"), "--held-out"),
    ],
)
def test_wrong_options(
    clips: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("tune", clips, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
