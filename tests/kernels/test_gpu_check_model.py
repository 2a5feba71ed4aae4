"""The section "model" of gpu_check.py: tokens of the card beside the CPU's, here on the CPU."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")
generation: Any = importlib.import_module("benchmarks.model.helpers.generation")
record: Any = importlib.import_module("benchmarks.helpers.record")


@pytest.fixture(autouse=True)
def tiny_models_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "integrations" / "transformers"))


def rows(*contenders: str, name: str = "internvl") -> dict[str, Any]:
    tasks = [task for task in generation.model_tasks(CPU) if task.row.case in (name, "scores")]
    return {task.row.contender: task.run(task.row) for task in tasks if task.row.contender in contenders}


def test_every_way_of_generating_finds_the_tokens_of_the_cpu() -> None:
    found = rows("dynamic", "static", "chunked", "assisted", "beams", "two cards", "ssc")
    assert {name: row.status for name, row in found.items() if row.status != "ok"} == {"two cards": "skipped"}
    assert found["two cards"].reason == "needs two GPUs"
    assert all(
        " s; nearest two logits" in row.reason for name, row in found.items() if name not in ("two cards", "ssc")
    )
    assert all(row.ms is None for row in found.values())


@pytest.mark.parametrize("name", generation.MODELS)
def test_no_token_hangs_on_a_rounding(name: str) -> None:
    """The card's logits differ from the CPU's by some 1e-5."""
    assert all(generation.on_cpu(name, beams)[1] > 1e-2 for beams in (False, True))


def test_other_tokens_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = generation.generated
    monkeypatch.setattr(generation, "generated", lambda *given: right(*given) + (torch.arange(8) == 5))
    row = rows("dynamic")["dynamic"]
    assert (row.status, row.error, row.allowed) == ("wrong", 1.0, 0.0)
    assert row.bad
    assert row.reason.startswith("1 of 8 tokens differ")


def test_a_gate_that_is_not_applied_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens depend on the gate: without it the row would say nothing about this package."""
    generation.on_cpu("internvl", False)
    config = generation.va.VideoAnchorConfig
    monkeypatch.setattr(
        generation.va, "VideoAnchorConfig", lambda **given: config(**(given | {"alpha_k": 0, "alpha_v": 0}))
    )
    assert rows("dynamic")["dynamic"].status == "wrong"


def test_other_scores_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = generation.va.anchor_scores, []

    def wrong(x: torch.Tensor, config: Any) -> Any:
        calls.append(x)
        result = right(x, config)
        if len(calls) == 4:  # fp64 twice and fp32 on the CPU are before the card's
            result.scores.mul_(1.02)
        return result

    monkeypatch.setattr(generation.va, "anchor_scores", wrong)
    assert rows("ssc")["ssc"].status == "wrong"


def test_without_transformers_the_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda _: None)
    found = rows("dynamic", "static")
    assert {(row.status, row.reason) for row in found.values()} == {("skipped", "transformers is not installed")}
