"""What the gate costs in a decoding step: for the whole model, not for each layer."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import pseudo_scores
from transformers import DynamicCache

import videoanchor_triton as va

decode_step: Any = importlib.import_module("benchmarks.attention.decode_step")


def step_operations(name: str, layers: int, alpha: float, prompts: list[tiny.Prompt]) -> Any:
    model = tiny.build(name, num_hidden_layers=layers)
    batch = tiny.inputs(name, prompts)
    config = va.VideoAnchorConfig(alpha_k=alpha, alpha_v=alpha, scorer=pseudo_scores)
    with va.enable(model, config), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        n = batch["input_ids"].shape[1]
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        later: dict[str, Any] = {} if tiny.V5 else {"cache_position": torch.tensor([n])}
        if name.startswith("qwen"):
            later["position_ids"] = torch.full((3, len(prompts), 1), n)
        one = batch["input_ids"][:, -1:]
        with decode_step.kernels_as_on_a_gpu():
            return decode_step.operations_of(
                lambda: model(input_ids=one, attention_mask=mask, past_key_values=cache, use_cache=True, **later)
            )


@pytest.mark.parametrize(
    "prompts", [[[3, 4, "V", 5]], [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11]]], ids=["batch-1", "left-padded"]
)
@pytest.mark.parametrize("name", tiny.BACKBONES)
def test_gate_of_a_step(name: str, prompts: list[tiny.Prompt]) -> None:
    """Fewer than five operations more than ungated, however many layers, and no further value read on the host."""
    more = []
    for layers in (1, 3):
        gated, ungated = (step_operations(name, layers, alpha, prompts) for alpha in (1.5, 0.0))
        assert gated.count["videoanchor.anchored_attention.default"] == layers
        assert gated.waits == ungated.waits, gated.count
        more.append(gated.count.total() - ungated.count.total())
    assert 0 <= more[0] == more[1] < 5


def test_reads_on_the_host_are_seen() -> None:
    x = torch.arange(3)
    assert decode_step.operations_of(lambda: (x.sum().item(), x.view(3, 1), bool(x.any()))).waits == 2
    assert decode_step.operations_of(lambda: x.view(3, 1)).count.total() == 0


def test_benchmark_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert decode_step.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "decode_step.json").read_text())["rows"]
    assert [row["host_reads"] for row in rows] == [0, 0, 0]
    assert rows[2]["operations"] - rows[1]["operations"] < 5
    assert "ms" not in rows[0]
