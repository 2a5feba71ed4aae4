"""Answers whose tokens are drawn: the same for the same seed, recorded wherever an answer is, and refused where they
could not be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_runs import answers, arguments, results
from eval_runs import STRENGTHS, run

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.app import cli, pipeline
from videoanchor_triton.app.token_sampling import TokenSampling
from videoanchor_triton.app.video.reader import read_video

DRAWN = ("--temperature", "2", "--top-p", "0.9", "--seed", "5")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: "),
        ({"top_p": 0.0}, "top_p: "),
        ({"top_p": 1.1}, "top_p: "),
        ({"top_k": -1}, "top_k: expected 0 or more"),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**63}, "seed: "),
    ],
)
def test_ranges(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenSampling(**{"temperature": 1.0, **wrong})


def test_a_seed_gives_an_answer_whatever_was_drawn_before(clips: Path) -> None:
    model, processor = pipeline.load(str(clips / "checkpoint"), "cpu", "float32")
    assert model.generation_config is not None
    model.generation_config.top_k = 1  # as Qwen2.5-VL's own: drawing would be greedy if it stood
    clip = read_video(clips / "0.mp4", max_frames=2)
    config = VideoAnchorConfig(alpha_k=4, alpha_v=1, n_clusters=3, pca_rank=8, scorer="kmeans")

    def ask(drawn: TokenSampling | None) -> str:
        return pipeline.answer(model, processor, clip, "Where?", config, max_new_tokens=12, drawn=drawn).text

    greedy, state = ask(None), torch.get_rng_state()
    drawn = [ask(TokenSampling(1.0, seed=seed)) for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert [ask(TokenSampling(1.0, seed=seed)) for seed in range(4)] == drawn
    assert len({*drawn, greedy}) == 5
    assert ask(TokenSampling(1.0, top_k=1)) == ask(TokenSampling(1.0, top_p=1e-6)) == ask(TokenSampling(1e-4)) == greedy


def test_batch_records_what_was_drawn(job: Path, tmp_path: Path) -> None:
    greedy, drawn, alone = tmp_path / "greedy", tmp_path / "drawn", tmp_path / "alone"
    assert cli.main(arguments(job, greedy)) == 1
    assert cli.main(arguments(job, drawn, *DRAWN)) == 1
    rows = (job / "questions.jsonl").read_text().splitlines()
    (job / "last.jsonl").write_text(rows[-1])
    other = [str(job / "last.jsonl") if one.endswith("questions.jsonl") else one for one in arguments(job, alone)]
    assert cli.main([*other, *DRAWN]) == 0
    columns = ("temperature", "top_p", "top_k", "seed")
    assert [results(drawn)[0][name] for name in columns] == [2, 0.9, 0, 5]
    assert {results(greedy)[0][name] for name in columns} == {None}
    assert "temperature" in (drawn / "results.csv").read_text().split("\n", 1)[0]
    assert answers(drawn) != answers(greedy)
    assert answers(alone)["5"] == answers(drawn)["5"]
    assert results(drawn)[0]["settings"] != results(greedy)[0]["settings"]


def test_eval_records_what_was_drawn(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for seed in ("5", "6", "5"):
        assert run("eval", clips, tmp_path, *STRENGTHS, *DRAWN[:-1], seed, "--max-new-tokens", "6", "--json") == 0
        reports.append(json.loads(capsys.readouterr().out))
    generation = {"do_sample": True, "temperature": 2, "top_p": 0.9, "top_k": 0, "seed": 5}
    assert generation.items() <= reports[0]["card"]["generation"].items()
    assert reports[0]["tag"] == reports[2]["tag"] != reports[1]["tag"]
    lines = (tmp_path / "replies.jsonl").read_text().splitlines()
    assert len(lines) == 16  # four questions, two settings, two seeds: the third run had its replies
    assert {json.loads(line)["settings"]["seed"] for line in lines} == {"5", "6"}
    assert len({json.loads(line)["reply"] for line in lines}) > 4


def test_a_run_and_its_pictures(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TokenSampling | None] = []
    answer = pipeline.answer

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["drawn"])
        return answer(*args, **kwargs)

    monkeypatch.setattr(pipeline, "answer", noted)
    asked = ("run", "--model", clips / "checkpoint", "--video", clips / "0.mp4", "--question", "?", "--out", tmp_path)
    small = (*STRENGTHS, "--max-frames", "2", "--max-new-tokens", "3", "--n-clusters", "3", "--pca-rank", "8")
    assert cli.main([*map(str, asked), *small, *DRAWN]) == 0
    drawn = TokenSampling(2, 0.9, 0, 5)
    assert json.loads((tmp_path / "result.json").read_text())["drawn"] == vars(drawn)
    assert cli.main(["viz", str(tmp_path), "--what", "attention,page"]) == 0
    assert made == [drawn, drawn]  # the ungated answer beside the gated one as well


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", "1", "--top-k", "2"), "--top-k, --seed: tokens are drawn with a --temperature only"),
        (("--temperature", "0"), "--temperature: expected a number above 0"),
        (("--temperature", "1", "--top-p", "0"), "--top-p: expected a number above 0 and at most 1"),
        (("--temperature", "1", "--tensor-parallel", "2"), "--temperature: not with --tensor-parallel"),
    ],
)
def test_refusals(
    options: tuple[str, ...], said: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(job, tmp_path / "out", *options)) == 2
    assert said in capsys.readouterr().err
    asked = ("run", "--model", "m", "--video", str(job / "clips/a.mp4"), "--question", "?", "--out", str(tmp_path))
    assert cli.main([*asked, *STRENGTHS, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vllm_is_greedy(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("videoanchor_triton.app.commands.batch.find_spec", lambda _: True)
    assert cli.main(arguments(job, tmp_path / "out", "--engine", "vllm", *DRAWN)) == 2
    assert "--temperature: not with --engine vllm" in capsys.readouterr().err
