"""Every command of `videoanchor` on the emulated card, in this process; those that decode do not wait in a step."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda.budgets import of_the_package
from emulated_cuda.device import EmulatedCuda
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import videoanchor_triton as va
from videoanchor_triton.anchor import iterates
from videoanchor_triton.app.cli import main
from videoanchor_triton.kernels import dispatch

SMALL = (
    "--max-frames",
    "2",
    "--max-new-tokens",
    "3",
    "--scorer",
    "kmeans",
    "--n-clusters",
    "4",
    "--pca-rank",
    "8",
    "--tol",
    "0.1",
)
GATE = ("--alpha-k", "9.5", "--alpha-v", "2.5")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """No kernel in Triton's interpreter, and no solver for the demo's 648 tokens: test_scores.py has it."""
    preset = va.VideoAnchorConfig.preset("internvl2-8b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "triton_refusal", lambda *_: "the kernels are not the point of these tests")
        patch.setattr(iterates, "_runs_triton", lambda _: False)
        kmeans = replace(preset, scorer="kmeans")
        patch.setattr(va.VideoAnchorConfig, "preset", lambda _name, **others: replace(kmeans, **others))
        yield


@pytest.fixture(scope="module")
def demo(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001 (first)
    """What `videoanchor demo` made: a checkpoint, a clip, and questions about it and a copy."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(folder)]) == 0
    (folder / "copy.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    rows = [
        {"video": f"{name}.mp4", "question": question, "options": ["a chair", "a table"], "answer": "A"}
        for name in ("clip", "copy")
        for question in ("Which is nearer?", "What is left?")
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def waits(card: EmulatedCuda) -> Iterator[list[dict[tuple[str, str], int]]]:
    """What the package read and uploaded between each step of decoding and the pass before it."""
    found: list[dict[tuple[str, str], int]] = []
    before = of_the_package(card.reads + card.uploads)

    def passed(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal before
        if type(module).__name__ == "Qwen2_5_VLTextModel":
            now = of_the_package(card.reads + card.uploads)
            if output.last_hidden_state.shape[1] == 1:
                found.append(dict(now - before))
            before = now

    hook = register_module_forward_hook(passed)
    yield found
    hook.remove()


def run_options(demo: Path, out: Path, *more: str) -> list[str]:
    model, video = str(demo / "checkpoint"), str(demo / "clip.mp4")
    return ["run", "--model", model, "--video", video, "--question", "Where?", "--out", str(out), *SMALL, *GATE, *more]


@pytest.mark.usefixtures("card")
def test_info_names_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["device"] == "cuda:0"


@pytest.mark.usefixtures("card")
def test_demo(demo: Path) -> None:
    result = json.loads((demo / "result.json").read_text())
    assert result["device"] == torch.cuda.get_device_name()
    assert result["tokens"]["visual"] == 648
    assert (demo / "anchors.png").stat().st_size > 10_000


@pytest.mark.parametrize("options", [(), ("--fit",)], ids=["run", "fit"])
def test_run_and_its_pictures(demo: Path, tmp_path: Path, waits: list[Any], options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    assert main(run_options(demo, out, *options)) == 0
    assert waits == [{}, {}]
    seconds = json.loads((out / "result.json").read_text())["seconds"]
    assert 0 < seconds["decode"] < seconds["generate"]
    assert 0 < seconds["prefill"] < seconds["generate"]
    if not options:
        assert main(["viz", str(out), "--what", "all"]) == 0
        assert {"affinity.png", "attention.png"} <= {path.name for path in (out / "viz").iterdir()}


@pytest.fixture
def layers() -> Iterator[set[str]]:
    """Where the layers of the language model computed."""
    found: set[str] = set()

    def computed(module: nn.Module, _args: Any, output: Any) -> None:
        if type(module).__name__ == "Qwen2_5_VLDecoderLayer":
            found.add(str(output.device))

    hook = register_module_forward_hook(computed)
    yield found
    hook.remove()


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize(
    ("device", "places", "scorer"),
    [("cuda", {"cuda:0"}, "kmeans"), ("cuda:1", {"cuda:1"}, "ssc"), ("auto", {"cuda:0", "cuda:1"}, "kmeans")],
)
def test_an_answer_is_the_cpus(
    demo: Path, tmp_path: Path, waits: list[Any], layers: set[str], device: str, places: set[str], scorer: str
) -> None:
    answers = []
    for place in (device, "cpu"):
        layers.clear()
        options = ("--device", place, "--scorer", scorer, "--tol", "1e-6")  # where solutions are one, on any device
        assert main(run_options(demo, tmp_path / place, *options)) == 0
        assert layers == (places if place == device else {"cpu"})
        assert torch.cuda.current_device() == 0
        answers.append(json.loads((tmp_path / place / "result.json").read_text()))
    ours, cpus = answers
    assert ours["answer"] == cpus["answer"]
    assert waits == [{}, {}] * 2
    assert 0 < ours["seconds"]["decode"] < ours["seconds"]["generate"]


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (("batch", *GATE, "--tables", "csv"), ("results.jsonl", "results.csv")),
        (("eval", *GATE), ("eval.json", "eval.png")),
        (("tune", "--grid-k", "0,2", "--grid-v", "0,2"), ("tune.json", "tune.png")),
    ],
    ids=["batch", "eval", "tune"],
)
def test_questions(
    demo: Path, tmp_path: Path, waits: list[Any], command: tuple[str, ...], files: tuple[str, ...]
) -> None:
    name, *options = command
    arguments = [name, str(demo / "questions.jsonl"), "--model", str(demo / "checkpoint"), "--out", str(tmp_path)]
    assert main([*arguments, *SMALL, *options]) == 0
    assert all((tmp_path / file).stat().st_size for file in files)
    assert waits
    assert not any(waits)


def test_convert_needs_no_card(tmp_path: Path, card: EmulatedCuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "convert" in capsys.readouterr().err
    assert not card.reads
