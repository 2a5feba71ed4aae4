"""`videoanchor eval` with several strengths: what is shared, and what is compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import STRENGTHS, run
from torch import nn

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.app import cli, demo, pipeline
from videoanchor_triton.app.evaluation.readers.reading import read_result
from videoanchor_triton.app.evaluation.settings import Setting, sweep
from videoanchor_triton.app.shared_vision import shared_vision, tower_of
from videoanchor_triton.integrations.errors import InputError

SETTING = Setting("gate", VideoAnchorConfig(alpha_k=2, alpha_v=0), 8)


def test_each_combination_is_a_setting() -> None:
    found = sweep(SETTING, {"alpha_k": [0, 2, 0.1, 2], "alpha_v": [0, 1]})
    expected = {f"alpha_k {k}, alpha_v {v}": (k, v) for k in (0, 2, 0.1) for v in (0, 1) if k or v}
    assert {one.name: (one.config.alpha_k, one.config.alpha_v) for one in found} == expected
    assert len(found) == 5
    assert sweep(SETTING, {"alpha_k": [2], "alpha_v": [0]}) == [SETTING]
    close = sweep(SETTING, {"alpha_k": [1.0000001, 1.0000002]})
    assert len({one.name for one in close}) == 2
    with pytest.raises(InputError, match="alpha_v"):
        sweep(SETTING, {"alpha_v": [1, float("nan")]})


def test_a_sweep_as_a_user_runs_it(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], n_scored: list[int], monkeypatch: Any
) -> None:
    seen: list[nn.Module] = []
    load = pipeline.load

    def counting(*args: Any) -> Any:
        model, processor = load(*args)
        tower_of(model).blocks[0].register_forward_hook(lambda *_: seen.append(model))  # pyright: ignore
        return model, processor

    monkeypatch.setattr(pipeline, "load", counting)
    both = ("--alpha-k", "400,4", "--alpha-v", "40")
    assert run("eval", clips, tmp_path / "both", *both, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    names = ["alpha_k 400, alpha_v 40", "alpha_k 4, alpha_v 40"]
    assert list(record["settings"]) == ["baseline, 2 frames", *names]
    assert list(dict.fromkeys(row["setting"] for row in record["results"])) == names
    assert {row["baseline_setting"] for row in record["results"]} == {"baseline, 2 frames"}
    assert n_scored == [12, 2]  # four questions in three settings; each clip scored once
    assert len(seen) == 2  # and seen once

    assert cli.main(["compare", str(tmp_path / "both"), str(tmp_path / "both")]) == 2
    assert (
        f"choose one by --setting-a or --setting-b from 'baseline, 2 frames', '{names[0]}'" in capsys.readouterr().err
    )
    chosen = ("--setting-a", names[0], "--setting-b", names[1], "--json")
    assert cli.main(["compare", str(tmp_path / "both"), str(tmp_path / "both"), *chosen]) == 0
    capsys.readouterr()
    (tmp_path / "none").mkdir()
    without = {**record, "settings": {name: record["settings"][name] for name in ("baseline, 2 frames", names[1])}}
    (tmp_path / "none" / "eval.json").write_text(json.dumps(without))
    assert read_result(tmp_path / "none").setting == names[1]

    assert run("eval", clips, tmp_path / "one", *STRENGTHS, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    kept = [{**row, "setting": "gate"} for row in record["results"] if row["setting"] == names[0]]
    assert kept == alone["results"]
    replies = {kind: {} for kind in ("both", "one")}
    for kind, found in replies.items():
        for line in (tmp_path / kind / "replies.jsonl").read_text().splitlines():
            reply = json.loads(line)
            found[reply["settings"]["alpha_k"], reply["id"]] = reply["reply"]
    assert replies["one"] == {key: reply for key, reply in replies["both"].items() if key[0] != 4}


def test_ablations_are_of_one_gate(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--alpha-k", "2,4", "--alpha-v", "1", "--ablate", "control")
    assert run("eval", clips, tmp_path / "out", *options) == 2
    assert "--ablate varies one gate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tower_is_not_computed_again_for_the_same_pixels(tmp_path: Path) -> None:
    demo.make_checkpoint(tmp_path / "checkpoint")
    model, processor = pipeline.load(str(tmp_path / "checkpoint"), "cpu", "float32")
    tower, calls = tower_of(model), []
    tower.blocks[0].register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    images = np.random.default_rng(0).integers(0, 255, (3, 112, 112, 3), dtype=np.uint8)
    inputs = [pipeline.prepare(model, processor, image, "?")[0] for image in images]

    def logits(n: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs[n]).logits

    expected = [logits(n) for n in range(3)]
    calls.clear()
    with shared_vision(model):
        for n in (0, 1, 0, 1, 0):
            assert torch.equal(logits(n), expected[n])
        assert len(calls) == 2
        assert torch.equal(logits(2), expected[2])
        assert torch.equal(logits(0), expected[0])
        assert len(calls) == 4, "only the last two are kept"
    assert "forward" not in tower.__dict__
    logits(0)
    assert len(calls) == 5
