"""The commands as a user runs them, in a process of their own."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import GATE, SMALL, run_arguments, videoanchor

from videoanchor_triton.anchor import memory
from videoanchor_triton.anchor.scores import AnchorResult
from videoanchor_triton.app import cli
from videoanchor_triton.app.commands import run as run_command
from videoanchor_triton.app.commands import shared
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import write_video
from videoanchor_triton.app.viz import contact_sheet


def test_run_again_on_the_demo_checkpoint(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = demo
    arguments = ("run", "--model", folder / "checkpoint", "--video", folder / "clip.mp4", "--question", "What is left?")
    options = ("--preset", "internvl2-8b", "--fps", "1", "--max-new-tokens", "3", "--scorer", "kmeans", "--json")
    done = videoanchor(*arguments, *options, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["question"] == "What is left?"
    assert result["config"]["scorer"] == "kmeans"
    assert len(result["frames"]["timestamps"]) == 6
    sampled = {"fps": 1.0, "max_frames": 32, "sampling": "uniform", "fit": False, "strict": False}
    assert (result["sampled"], result["dtype"]) == (sampled, "auto")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.json", "anchors.safetensors", "anchors.png", "viz.html",
    }  # fmt: skip


def test_run_with_a_solver_of_ones_choice(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = demo
    arguments = ("run", "--model", folder / "checkpoint", "--video", folder / "clip.mp4", "--question", "What is left?")
    solver = (
        "--assign-labels",
        "kmeans",
        "--score",
        "projector",
        "--tol",
        "0.05",
        "--memory-budget",
        "0.5",
        "--n-clusters",
        "auto",
    )
    options = (*GATE, "--max-frames", "4", "--max-new-tokens", "1", "--json")
    done = videoanchor(*arguments, *options, *solver, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["config"]["assign_labels"], result["config"]["score"]) == ("kmeans", "projector")
    assert result["ssc"]["eigengap"] >= 0
    assert result["ssc"]["in_gap"] in (True, False)
    assert 0.001 < result["ssc"]["residual"] <= 0.05
    assert (result["config"]["n_clusters"], result["config"]["memory_budget"]) == ("auto", 2**29)
    refused = videoanchor(*arguments, *options, "--memory-budget", "0.001", "--out", tmp_path / "none", cwd=tmp_path)
    assert refused.returncode == 2
    assert "may use 0.001 GiB" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        (("--scorer", "knn"), {"scorer": "knn", "score": "published", "assign_labels": "cluster_qr"}),
        (("--scorer", "knn", "--score", "projector"), {"scorer": "knn", "score": "projector"}),
        (("--scorer", "ssc", "--score", "projector"), {"scorer": "ssc", "score": "projector"}),
        (("--scorer", "ssc", "--assign-labels", "discretize"), {"assign_labels": "discretize"}),
        (("--scorer", "kmeans"), {"scorer": "kmeans"}),
    ],
    ids=" ".join,
)
def test_scores_of_ones_choice(
    demo: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: tuple[str, ...],
    recorded: dict[str, str],
) -> None:
    assert cli.main(run_arguments(demo[0], tmp_path / "out", *settings)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert recorded.items() <= result["config"].items()
    shown = capsys.readouterr().out
    eigengap, in_gap = result["ssc"]["eigengap"], result["ssc"]["in_gap"]
    if recorded.get("scorer") == "kmeans":
        assert eigengap is in_gap is None
    else:
        assert eigengap >= 0
        assert in_gap in (True, False)
    assert ("labels are one choice of several" in shown) == (in_gap is False)


@pytest.mark.parametrize("in_gap", [False, True, None])
def test_the_report_says_where_the_tokens_do_not_choose_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_gap: bool | None
) -> None:
    anchor = AnchorResult(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), in_gap=in_gap)
    counts = {"n_prompt_tokens": 3, "n_visual_tokens": 2, "n_generated_tokens": 1}
    result: Any = SimpleNamespace(text="left", anchor=anchor, grids=[TokenGrid(1, 1, 2)], gate_effect=None, **counts)
    run_command.report(result, {"seconds": defaultdict(float)}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (number,) = (number for number, line in enumerate(lines) if line.startswith("scores "))
    assert "2 subspaces" in lines[number]
    expected = "the tokens do not say that there are so many subspaces: labels are one choice of several"
    assert (lines[number + 1].strip() == expected) == (in_gap is False)
    assert sum(expected in line for line in lines) == (in_gap is False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("--video", "missing.mp4", *GATE), "no video file at missing.mp4", id="missing-video"),
        pytest.param(("--video", "broken.mp4", *GATE), "cannot be read as a video", id="broken-video"),
        pytest.param(("--video", "clip.mp4"), "--alpha-k and --alpha-v", id="no-alphas"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "1"), "--alpha-k and --alpha-v", id="one-alpha"),
        pytest.param(("--video", "clip.mp4", "--preset", "gpt"), "internvl2-8b", id="unknown-preset"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "-1", "--alpha-v", "1"), "alpha_k", id="negative-alpha"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "nan", "--alpha-v", "1"), "alpha_k", id="alpha-nan"),
        pytest.param(("--video", "clip.mp4", *GATE, "--max-frames", "0"), "max_frames", id="no-frames"),
        pytest.param(("--video", "clip.mp4", *GATE, "--fps", "-2"), "fps", id="negative-fps"),
        pytest.param(("--video", "clip.mp4", *GATE, "--max-new-tokens", "0"), "--max-new-tokens", id="no-new-tokens"),
        pytest.param(("--video", "clip.mp4", *GATE, "--dtype", "int3"), "dtype", id="dtype"),
        pytest.param(("--video", "clip.mp4", *GATE, "--model", "nowhere"), "hub cannot be reached", id="missing-model"),
        pytest.param(("--video", "broken.mp4", *GATE, "--model", "./no/model"), "no such folder", id="typo-first"),
        pytest.param(("--video", "clip.mp4", *GATE, "--model", "clip.mp4"), "is a file", id="model-is-a-file"),
        pytest.param(("--video", "clip.mp4", *GATE, "--model", "."), "no config.json", id="no-checkpoint"),
        pytest.param(("--video", "clip.mp4", *GATE, "--question", " "), "question is empty", id="no-question"),
        pytest.param(("--video", "clip.mp4", "--alpha-k", "1e9", "--alpha-v", "1"), "alpha_k", id="alpha-beyond"),
        pytest.param(("--video", "clip.mp4", *GATE, "--model", "text"), "no visual tokens", id="text-model"),
        pytest.param(("--video", "clip.mp4", *GATE, "--out", "clip.mp4"), "is a file", id="out-is-a-file"),
        pytest.param(("--video", "clip.mp4", *GATE, "--max-new-tokens", "4090"), "lower --max-new-tokens", id="answer"),
        pytest.param(
            ("--video", "long.mp4", *GATE, "--max-frames", "48", "--max-new-tokens", "2000"),
            "try --max-frames 38",
            id="context",
        ),
        pytest.param(("--video", "clip.mp4", *GATE, "--n-clusters", "0"), "n_clusters", id="clusters"),
        pytest.param(
            ("--video", "clip.mp4", *GATE, "--scorer", "kmeans", "--n-clusters", "auto"), 'or "knn"; give', id="auto"
        ),
        pytest.param(
            ("--video", "clip.mp4", *GATE, "--scorer", "kmeans", "--score", "projector"),
            'score=\'projector\' needs scorer="ssc" or "knn"',
            id="projector",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    demo: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    write_video(tmp_path / "clip.mp4", np.zeros((8, 48, 64, 3), np.uint8), fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    (tmp_path / "long.mp4").symlink_to(demo[0] / "clip.mp4")
    if "text" in options:
        _save_text_model(tmp_path / "text")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--model", str(demo[0] / "checkpoint"), "--question", "?", "--out", "out", *options]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing may be left behind"


def test_wrong_input_in_a_process_of_its_own(demo: tuple[Path, str], tmp_path: Path) -> None:
    done = videoanchor(*run_arguments(demo[0], Path("out"), "--video", "missing.mp4"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "videoanchor run: no video file at missing.mp4: check the path"
    assert list(tmp_path.iterdir()) == []


def _save_text_model(folder: Path) -> None:
    import transformers as hf

    config = hf.Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    hf.Qwen2ForCausalLM(config).save_pretrained(folder)


def test_too_many_tokens_for_the_memory(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With little memory left, the run says before the model works how to need less."""
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _device: 1000)
    monkeypatch.chdir(tmp_path)
    run = ("run", "--model", demo[0] / "checkpoint", "--video", demo[0] / "clip.mp4", "--question", "?", "--out", "out")
    assert cli.main([*map(str, run), *GATE]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1728 tokens" in line
    assert "--max-frames" in line
    assert list(tmp_path.iterdir()) == []


def test_results_that_cannot_be_written(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stood there stays, the line names the file, and the answer is not lost."""
    (tmp_path / "result.json").write_text("from before")

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(run_arguments(demo[0], tmp_path)) == 1
    shown = capsys.readouterr().err.splitlines()
    assert "No space left on device" in shown[-1]
    assert str(tmp_path) in shown[-1]
    assert "answer" in shown[-2]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "from before"
    assert cli.main(run_arguments(demo[0], tmp_path / "new")) == 1
    assert not (tmp_path / "new").exists()


def test_a_picture_that_fails_is_a_warning(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("anchors.png", "viz.html"):
        (tmp_path / name).write_text("of another run")

    def failing(path: Path, *_args: object) -> None:
        path.write_text("half")
        raise RuntimeError("no font")

    monkeypatch.setattr(contact_sheet, "draw", failing)
    assert cli.main(run_arguments(demo[0], tmp_path)) == 0
    shown = capsys.readouterr()
    assert "no font" in shown.err
    assert "anchors.png" not in shown.out
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "anchors.safetensors"}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "name",
    ["fig $x_{$ .mp4", "cost $5^ vs $6{ 会议 \u202e.mp4", b"a\n\x1b[31m\xff\x9b.mp4".decode(errors="surrogateescape")],
)
def test_any_file_name(demo: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).symlink_to(demo[0] / "clip.mp4")
    run = ("run", "--model", demo[0] / "checkpoint", "--video", tmp_path / name, "--question", "\x1b[2J?")
    assert cli.main([*map(str, run), *SMALL, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["viz", str(tmp_path / "out"), "--what", "sheet", "--format", "pdf"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.json", "anchors.safetensors", "anchors.png", "viz.html", "viz",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "result.json").read_text())["video"] == str(tmp_path / name)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))
    assert cli.main([*map(str, run), *SMALL, "--out", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


def test_nothing_is_written_through_links(demo: tuple[Path, str], tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    out.mkdir()
    theirs.write_text("precious")
    for name in ("result.json", "anchors.safetensors", "anchors.png", "viz.html"):
        (out / name).symlink_to(theirs)
    assert cli.main(run_arguments(demo[0], out)) == 0
    assert theirs.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.iterdir())
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert cli.main(run_arguments(demo[0], tmp_path / "dangling" / "out")) == 2


def test_sigterm(demo: tuple[Path, str], tmp_path: Path) -> None:
    """Ends with a word and 143, however often it is sent; nothing half-written is left."""
    command = run_arguments(demo[0], tmp_path / "out", "--max-new-tokens", "3000")
    process = subprocess.Popen(
        [sys.executable, "-m", "videoanchor_triton.app.cli", *command], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("  tokens"):
            break
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    _, rest = process.communicate()
    assert process.returncode == 143
    assert rest.splitlines()[-1] == "videoanchor run: terminated"
    assert not (tmp_path / "out").exists()


def test_missing_extras_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: None if name == "matplotlib" else name)
    run = ("run", "--model", "m", "--video", "v.mp4", "--question", "?", "--out", tmp_path / "out")
    assert cli.main([*map(str, run), *GATE]) == 2
    line = capsys.readouterr().err
    assert line == "videoanchor run: missing matplotlib: pip install 'videoanchor-triton[video,viz]'\n"
