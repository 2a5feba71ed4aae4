"""`videoanchor check` on the emulated card, which its children have too."""

import json
import sys
from pathlib import Path

import pytest
import torch
from emulated_cuda.device import EmulatedCuda

from videoanchor_triton.app import cli
from videoanchor_triton.app.check import children
from videoanchor_triton.kernels import sanity

CHILD = """
import sys
sys.path.insert(0, sys.argv[-3])
from emulated_cuda.device import EmulatedCuda
with EmulatedCuda(devices=2):
    from videoanchor_triton.anchor import iterates
    from videoanchor_triton.app.check import child
    iterates._runs_triton = lambda _: False
    child.main()
"""
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("form", list(sanity._forms("triton", torch.float32, large=False)), ids=lambda form: form.name)
def test_forms_on_another_card(form: sanity.Form, two_cards: EmulatedCuda) -> None:
    """A launch on the card that is current raises there."""
    assert two_cards.current == 0
    found = form.check(torch.device("cuda:1"))
    assert found.right, found
    assert two_cards.launches


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = "cuda:1"
    monkeypatch.setattr(children, "COMMAND", [sys.executable, "-P", "-c", CHILD, str(TESTS)])
    code = cli.main(["check", "--device", device, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["right"]) == (0, True), found["verdict"]
    assert found["devices"][0]["device"] == device
    assert {row["status"] for row in (*found["forms"], *found["times"], found["scores"])} == {"right"}
