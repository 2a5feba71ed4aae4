"""--keep and --group: what the commands make of them."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from batch_runs import arguments, results

import videoanchor_triton as va
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.app import cli
from videoanchor_triton.app.batch.worker import BatchJob
from videoanchor_triton.app.commands.shared import add_config_options, config_of
from videoanchor_triton.app.score_cache import cache_key
from videoanchor_triton.integrations.errors import InputError
from videoanchor_triton.integrations.vllm.settings import settings_of

ALPHAS: dict[str, Any] = {"alpha_k": 2.0, "alpha_v": 1.0}


def parsed(*options: str) -> VideoAnchorConfig:
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return config_of(parser.parse_args(["--alpha-k", "2", "--alpha-v", "1", *options]))


def job(config: VideoAnchorConfig) -> BatchJob:
    return BatchJob("model", "cpu", "auto", config, {}, False, 4, Path("scores"), 0)


def test_a_share_or_a_number() -> None:
    assert parsed().merges is False
    assert parsed("--keep", "1") == parsed()
    assert parsed("--keep", "0.25", "--group", "farthest", "--merge", "drop") == va.VideoAnchorConfig(
        **ALPHAS, keep=0.25, group="farthest", merge="drop"
    )
    assert repr(parsed("--keep", "256").keep) == "256"
    with pytest.raises(InputError, match="keep must be a share of the visual tokens"):
        parsed("--keep", "1.5")


def test_results_and_scores_of_before_are_found_again() -> None:
    """Settings without keep have the digest they had; scores are those of all tokens, merged or not."""
    plain = va.VideoAnchorConfig(**ALPHAS)
    merged = va.VideoAnchorConfig(**ALPHAS, keep=0.5, group="farthest", merge="mean")
    assert not {"keep", "group", "merge"} & job(plain).settings()["config"].keys()
    assert job(merged).settings()["config"]["keep"] == 0.5
    assert job(merged).settings_hash() != job(plain).settings_hash()
    assert [job(config).columns()["keep"] for config in (plain, merged)] == [1.0, 0.5]
    assert [job(config).columns()["group"] for config in (plain, merged)] == ["ward", "farthest"]
    assert [job(config).columns()["merge"] for config in (plain, merged)] == ["counts", "mean"]
    tokens = torch.zeros(3, 4)
    assert cache_key(tokens, plain) == cache_key(tokens, merged)


def test_vllm_takes_none() -> None:
    assert settings_of({"videoanchor": {**ALPHAS, "keep": 1}}) is not None
    with pytest.raises(ValueError, match=r"keep=0\.5 cannot be served"):
        settings_of({"videoanchor": {**ALPHAS, "keep": 0.5, "merge": "drop"}})


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 merges nothing")
def test_a_batch(job: Path, tmp_path: Path) -> None:
    """Several questions about a video, whose prompts are computed whole: generate() alone merges."""
    cli.main(arguments(job, tmp_path, "--keep", "0.5"))
    records = results(tmp_path)
    assert [record["status"] for record in records].count("done") == 4
    assert {record["keep"] for record in records} == {0.5}


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 merges nothing")
def test_too_few_tokens_are_a_line(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--model", job / "checkpoint", "--video", job / "clips" / "a.mp4", "--question", "word5"]
    options = ["--alpha-k", "2", "--alpha-v", "1", "--max-frames", "4", "--keep", "3", "--out", tmp_path / "out"]
    assert cli.main([*map(str, [*command, *options])]) == 2
    assert "for 4 frames or images: expected at least one for each, keep=4 or 0.25" in capsys.readouterr().err
