"""The section "model" of gpu_check.py on emulated cards: tokens equal to the CPU's, on one card and split over two."""

import importlib
from typing import Any

import pytest
import torch

generation: Any = importlib.import_module("benchmarks.model.helpers.generation")


def row_of(mode: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    # the interpreter is slow, and the kernels are not the point
    monkeypatch.setattr("videoanchor_triton.kernels.dispatch.triton_refusal", lambda *_, **__: "emulated")
    tasks = generation.model_tasks(torch.device("cuda"))
    task = next(task for task in tasks if (task.row.case, task.row.contender) == ("internvl", mode))
    return task.run(task.row)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("mode", ["dynamic", "chunked", "assisted"])
def test_tokens_of_one_card(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(mode, monkeypatch)
    assert row.status == "ok", row


@pytest.mark.usefixtures("two_cards")
def test_tokens_of_two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("two cards", monkeypatch)
    assert row.status == "ok", row
