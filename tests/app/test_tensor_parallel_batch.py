"""`--tensor-parallel`: two processes on a CPU that split a model, or hold fake parts."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensor_parallel_dying
import tensor_parallel_parts as parts
import tiny_models as tiny
import torch
from safetensors.numpy import load_file
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton import VideoAnchorConfig
from videoanchor_triton.app import checkpoint, cli, pipeline, tensor_parallel, video_model
from videoanchor_triton.app.batch.rows import BatchRow
from videoanchor_triton.app.batch.worker import BatchJob, BatchWorker
from videoanchor_triton.app.budget import Planner
from videoanchor_triton.app.video.reader import read_video, write_video
from videoanchor_triton.integrations.errors import InputError

GATE = ("--alpha-k", "0.5", "--alpha-v", "0.3", "--scorer", "kmeans", "--n-clusters", "3", "--pca-rank", "8")
SIZE = ("--max-frames", "4", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two clips, and six questions: about a missing file, about the clips, and one that kills."""
    folder = tmp_path_factory.mktemp("job")
    save_checkpoint("internvl", folder / "checkpoint")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", generator.integers(0, 255, (8, 32, 48, 3), dtype=np.uint8), fps=4)
    rows = [("gone", "word7"), *(("a", q) for q in ("word5 word6", "word8 word9 word10", "word7")), ("b", "word20")]
    rows.append(("b", tensor_parallel_dying.DEADLY))
    lines = [json.dumps({"video": f"{video}.mp4", "question": question}) for video, question in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def batch(folder: Path, out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    command = ("batch", folder / "questions.jsonl", "--model", folder / "checkpoint", "--out", out)
    code = cli.main([*map(str, command), *GATE, *SIZE, "--json", *options])
    return code, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def gone(pid: int) -> bool:
    """Also where nobody has asked for its exit code."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rows and answers of one process; then one of the two dies, and its row fails."""
    folder_of_pids = tmp_path / "pids"
    folder_of_pids.mkdir()
    monkeypatch.setenv("VIDEOANCHOR_TEST_PIDS", str(folder_of_pids))
    monkeypatch.setattr(video_model, "VideoModel", tensor_parallel_dying.DyingModel)
    code, split = batch(folder, tmp_path / "split", "--tensor-parallel", "2")
    assert code == 1
    assert json.loads(capfd.readouterr().out)["answered_by_this_run"] == 4
    monkeypatch.undo()
    code, whole = batch(folder, tmp_path / "whole")
    for name in ("key", "line", "question", "settings"):
        assert [record[name] for record in split] == [record[name] for record in whole]
    assert split[0]["reason"] == whole[0]["reason"]
    for name in ("status", "answer", "tokens", "notes"):
        assert [record[name] for record in split[1:5]] == [record[name] for record in whole[1:5]]
    assert len({record["answer"] for record in whole}) == 6, "answers tell prompts apart"
    assert [record["ssc"]["cached"] for record in split[1:5]] == [False, False, False, False]
    assert [record["seconds"]["vision"] > 0 for record in split[1:5]] == [True, False, False, True]
    assert split[5]["status"] == "failed"
    assert "process 2 of 2: Signal 9 (SIGKILL)" in split[5]["reason"]
    entries = [sorted((tmp_path / name / "scores").iterdir()) for name in ("split", "whole")]
    assert [path.name for path in entries[0]] == [path.name for path in entries[1]]
    assert len(entries[0]) == 2
    for ours, theirs in zip(*entries, strict=True):
        np.testing.assert_array_equal(load_file(ours)["scores"], load_file(theirs)["scores"])
    shares = [path.read_text() for path in folder_of_pids.iterdir()]
    assert shares == ["32", "32"], "each process holds half of the query projection"
    assert all(gone(int(path.name)) for path in folder_of_pids.iterdir())


def test_run(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ("run", "--model", folder / "checkpoint", "--video", folder / "a.mp4", "--question", "word5 word6")
    results = []
    for name, options in (("whole", ()), ("split", ("--tensor-parallel", "2"))):
        assert cli.main([*map(str, (*command, "--out", tmp_path / name)), *GATE, *SIZE, *options, "--json"]) == 0
        results.append(json.loads(capfd.readouterr().out))
        assert results[-1] == json.loads((tmp_path / name / "result.json").read_text())
    whole, split = results
    for name in ("answer", "tokens", "grid", "frames", "config"):
        assert whole[name] == split[name]
    assert split["budget"]["device"] == "each of 2 processes"
    assert split["budget"]["weights"] == whole["budget"]["weights"] // 2
    scores = [load_file(tmp_path / name / "anchors.safetensors")["scores"] for name in ("whole", "split")]
    np.testing.assert_array_equal(scores[0], scores[1])


# Fake parts in the processes


def worker(folder: Path, model: str = "model", progress: Any = None) -> BatchWorker:
    job = BatchJob(model, "cpu", "auto", parts.Settings(), {}, False, 1, folder, 0, tensor_parallel=2)  # pyright: ignore[reportArgumentType]
    return BatchWorker(job, progress)


def rows(*questions: str) -> list[BatchRow]:
    return [BatchRow(number, Path("/a.mp4"), question) for number, question in enumerate(questions)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    parts.use_fakes(monkeypatch.setattr)


def pids(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


SHARE = "the processes that share the model"
TWO = f"{SHARE} ended: process 2 of 2:"


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("mishap", "reason", "failure"),
    [
        pytest.param("dies", f"{TWO} Signal 9 (SIGKILL)", "other", id="dies"),
        pytest.param("exits", f"{TWO} exit code 3", "other", id="exits"),
        pytest.param("hangs", f"{TWO[:-1]} did nothing for 3 s", "other", id="hangs"),
        pytest.param("fails", "process 2 of 2: KeyError: 'weights'", "other", id="fails"),
        pytest.param("loses the device", "process 1 of 2: RuntimeError: CUDA error: an", "other", id="no-stop"),
        pytest.param("needs too much", "process 1 of 2: OutOfMemoryError: CUDA out", "input", id="memory"),
        pytest.param("refuses", "not enough memory", "input", id="refuses"),
        pytest.param("differs", f"{SHARE} have generated different answers", "other", id="text"),
        pytest.param("differs in tokens", f"{SHARE} have generated different answers", "other", id="tokens"),
    ],
)
def test_others_answer_the_rows_after_a_mishap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mishap: str, reason: str, failure: str
) -> None:
    monkeypatch.setattr(tensor_parallel, "_SILENCE", 3.0 if mishap == "hangs" else 60.0)
    progress = []
    if mishap == "hangs":
        monkeypatch.setattr(tensor_parallel.SplitModel, "_start", started_patiently(tensor_parallel.SplitModel._start))
    with closing(worker(tmp_path, progress=lambda *of: progress.append(of))) as some:
        records = [*some.answer(rows("q0", mishap, "q2")), *some.answer(rows("q3", "q4"))]
    assert [record["question"] for record in records] == ["q0", mishap, "q2", "q3", "q4"]
    assert [record["status"] for record in records] == ["done", "failed", "done", "done", "done"]
    assert records[1]["reason"].startswith(reason)
    assert records[1]["failure"] == failure
    assert [record["peak_memory_bytes"] for record in records if record["status"] == "done"] == [1234] * 4
    starts = ["2 processes", "q0", mishap, "2 processes", "q2", "q3", "q4"]
    assert (tmp_path / "begun").read_text().splitlines() == starts, "each row once"
    assert progress.count(("tokens", 1, 0)) in (4, 5), "of the first process alone, perhaps of the mishap too"
    assert len(pids(tmp_path)) == 4
    assert all(gone(pid) for pid in pids(tmp_path))


def started_patiently(start: Any) -> Any:
    """Importing takes longer than a process may be silent here."""

    def patient(self: Any) -> None:
        silence, tensor_parallel._SILENCE = tensor_parallel._SILENCE, 60.0
        start(self)
        tensor_parallel._SILENCE = silence

    return patient


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        pytest.param("missing", InputError, "model missing cannot be loaded", id="refused"),
        pytest.param("too-large", ChildProcessError, "process 2 of 2: OutOfMemoryError", id="dead"),
    ],
)
def test_processes_that_do_not_start(tmp_path: Path, model: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        worker(tmp_path, model)
    assert all(gone(pid) for pid in pids(tmp_path))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("at", ["load", "tokens"])
def test_ctrl_c(tmp_path: Path, at: str) -> None:
    def interrupt(stage: str, *_: int) -> None:
        if stage == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(worker(tmp_path, progress=interrupt).answer(rows("q0", "q1")))
    assert pids(tmp_path)
    assert all(gone(pid) for pid in pids(tmp_path))


@pytest.mark.usefixtures("fake")
def test_processes_that_do_not_start_again(tmp_path: Path) -> None:
    """The rows that are left stay unanswered: the next run asks them."""
    with closing(worker(tmp_path, "once")) as some:
        answers = some.answer(rows("q0", "dies", "q2"))
        assert [next(answers)["status"] for _ in range(2)] == ["done", "failed"]
        with pytest.raises(ChildProcessError, match="OutOfMemoryError"):
            next(answers)


@pytest.mark.usefixtures("fake")
def test_ctrl_c_is_for_the_first_process_alone(tmp_path: Path) -> None:
    """A terminal sends it to all of them."""
    with closing(worker(tmp_path)) as some:
        for pid in pids(tmp_path):
            os.kill(pid, signal.SIGINT)
        assert [record["status"] for record in some.answer(rows("q0", "q1"))] == ["done", "done"]


PARENT = """
import sys
from functools import partial
from pathlib import Path
from tensor_parallel_parts import FakePart, run_fake_part
from videoanchor_triton.app import tensor_parallel
make = partial(FakePart, model=sys.argv[2], scores=(Path(sys.argv[1]), 0))
if __name__ == "__main__":
    tensor_parallel._run_part = run_fake_part
    tensor_parallel.SplitModel(make, 2, "cpu")
    sys.stdin.read()
"""


@pytest.mark.parametrize("model", ["waits", "loads for ever"])
def test_kill_9(tmp_path: Path, model: str) -> None:
    """Of the process that has started the others: they end as well, at work or waiting for it."""
    (tmp_path / "parent.py").write_text(PARENT)
    paths = os.pathsep.join(filter(None, sys.path))
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path, model],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stderr is not None
    while len(pids(tmp_path)) < 2:
        time.sleep(0.05)
        assert parent.poll() is None, parent.stderr.read().decode()
    parent.kill()
    parent.stderr.read()  # ends when nobody is left who could write
    parent.communicate()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("--tensor-parallel", "0"), "--tensor-parallel: expected 1 or more, got 0", id="none"),
        pytest.param(("--tensor-parallel", "4"), "expected a divisor of num_key_value_heads 2", id="heads"),
        pytest.param(("--tensor-parallel", "2", "--device", "cuda:0"), "CUDA_VISIBLE_DEVICES", id="one-gpu"),
        pytest.param(
            ("--tensor-parallel", "2", "--engine", "ray", "--gpus-per-actor", "1"), "--gpus-per-actor 1", id="ray-gpus"
        ),
    ],
)
def test_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    command = ("batch", folder / "questions.jsonl", "--model", folder / "checkpoint", "--out", tmp_path / "out")
    assert cli.main([*map(str, command), *GATE, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "batch", "eval", "tune", "viz", "demo"])
def test_torchrun_around_a_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    needed = {
        "run": ("--model", "m", "--video", "v", "--question", "q", "--out", "o"),
        "batch": ("rows.jsonl", "--model", "m", "--out", "o"),
        "eval": ("rows.jsonl", "--model", "m", "--out", "o"),
        "tune": ("rows.jsonl", "--model", "m", "--out", "o"),
        "viz": ("o",),
        "demo": (),
    }
    assert cli.main([command, *needed[command]]) == 2
    assert "2 processes (WORLD_SIZE, as torchrun sets it)" in capsys.readouterr().err


def test_a_model_without_a_plan(tmp_path: Path) -> None:
    tiny.build("qwen3_vl").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="transformers has no tensor-parallel plan for qwen3_vl_text"):
        pipeline.load(str(tmp_path), "cpu", tensor_parallel=2)


def test_fewer_gpus_than_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda"):
        with pytest.raises(InputError, match="each process needs a GPU of its own, and 1 are visible"):
            checkpoint.check_splits(str(folder / "checkpoint"), 2, device)
    checkpoint.check_splits(str(folder / "checkpoint"), 2, "cpu")


def test_the_budget_is_that_of_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videoanchor_triton.anchor.memory.available_memory_bytes", lambda _: 10**9)
    clip = read_video(folder / "a.mp4", max_frames=4)
    config = VideoAnchorConfig(alpha_k=1, alpha_v=1)
    options: dict[str, Any] = {"max_new_tokens": 6, "device": "cpu"}
    whole, half = (
        Planner(str(folder / "checkpoint"), config, **options, tensor_parallel=n).budget(clip, "word7") for n in (1, 2)
    )
    assert whole.weights is not None
    assert (half.weights, half.kv_cache, half.available) == (whole.weights // 2, whole.kv_cache // 2, 10**9 // 2)
    assert (half.activations, half.scores) == (whole.activations, whole.scores), "of the vision tower; of one process"
    assert "free on each of 2 processes" in half.lines()[1]
