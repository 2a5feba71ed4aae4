"""The process that reads a video hangs, crashes, is interrupted, or loses its parent: nobody else is hurt; whether a
clip is read, its frames one at a time, or those of a finished run for its pictures."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from videoanchor_triton.app import cli
from videoanchor_triton.app.commands import run
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video import process
from videoanchor_triton.app.video.reader import read_video, stream_video, write_video
from videoanchor_triton.app.viz.finished_run import FinishedRun, read_clip, source_frames
from videoanchor_triton.integrations.errors import InputError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (60, 240, 320, 3), dtype=np.uint8), fps=8)
    return path


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """The processes that are started."""
    started: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
            started.append(self)

    monkeypatch.setattr("videoanchor_triton.app.video.process.subprocess.Popen", Recorded)
    return started


def on_first_frame(action: Callable[[], None]) -> Callable[[str, int, int], None]:
    done: list[int] = []

    def progress(stage: str, n: int, _total: int) -> None:
        if stage == "decode" and n == 1 and not done:
            done.append(n)
            action()

    return progress


def test_a_decoder_that_hangs_is_ended(clip: Path, children: list[subprocess.Popen]) -> None:
    stop = on_first_frame(lambda: os.kill(children[0].pid, signal.SIGSTOP))
    with pytest.raises(InputError, match=r"clip\.mp4: .* no progress for 2 s .*--timeout"):
        read_video(clip, max_frames=60, timeout=2, progress=stop)
    assert children[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("sent", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_decoder_that_crashes_is_wrong_input(
    sent: signal.Signals, clip: Path, children: list[subprocess.Popen]
) -> None:
    crash = on_first_frame(lambda: os.kill(children[0].pid, sent))
    with pytest.raises(InputError, match=rf"clip\.mp4: the process that reads it died \({sent.name}"):
        read_video(clip, max_frames=60, progress=crash)


def test_frames_one_at_a_time(clip: Path, children: list[subprocess.Popen]) -> None:
    """All of them, with their times, and never many of them in memory."""
    whole, n = read_video(clip, max_frames=60), -1
    tracemalloc.start()
    try:
        for n, (seconds, frame) in enumerate(stream_video(clip)):
            assert seconds == whole.timestamps[n]
            np.testing.assert_array_equal(frame, whole.frames[n])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 59
    assert peak < whole.frames.nbytes / 6
    assert len(children) == 2


def test_a_generator_that_is_closed_ends_the_child(clip: Path, children: list[subprocess.Popen]) -> None:
    frames = stream_video(clip)
    assert children == []
    next(frames)
    assert children[0].poll() is None
    frames.close()
    assert children[0].returncode == -signal.SIGKILL


@pytest.fixture
def finished(clip: Path) -> FinishedRun:
    """A run on three frames of the clip."""
    indices, nothing = np.array([5, 30, 55]), np.zeros(3, np.float32)
    return FinishedRun(Path("run"), {"video": str(clip)}, TokenGrid(3, 1, 1), nothing, nothing, indices / 8, indices)


HINT = "where the run's video is elsewhere, give --video FILE"


def test_a_hanging_video_ends_the_pictures(clip: Path, finished: FinishedRun, children: list[subprocess.Popen]) -> None:
    stop = on_first_frame(lambda: os.kill(children[0].pid, signal.SIGSTOP))
    with pytest.raises(InputError, match=rf"clip\.mp4: .* no progress for 2 s .*{HINT}"):
        read_clip(finished, clip, progress=stop, timeout=2)
    frames = source_frames(finished, clip, timeout=2)
    assert next(frames)[0] == 0.0
    os.kill(children[1].pid, signal.SIGSTOP)
    with pytest.raises(InputError, match=rf"clip\.mp4: .* no progress for 2 s .*{HINT}"):
        list(frames)
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


def test_a_crashing_video_ends_the_pictures(
    clip: Path, finished: FinishedRun, children: list[subprocess.Popen]
) -> None:
    crash = on_first_frame(lambda: os.kill(children[0].pid, signal.SIGSEGV))
    with pytest.raises(InputError, match=rf"the process that reads it died \(SIGSEGV.*{HINT}"):
        read_clip(finished, clip, progress=crash)
    frames = source_frames(finished, clip)
    next(frames)
    os.kill(children[1].pid, signal.SIGABRT)
    with pytest.raises(InputError, match=rf"the process that reads it died \(SIGABRT.*{HINT}"):
        list(frames)


def test_a_bug_in_the_decoder_names_itself(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_MODULE", "videoanchor_triton.app.no_such_module")
    with pytest.raises(InputError, match=r"clip\.mp4: .*\(exit code 1, .*No module named"):
        read_video(clip)


def test_an_interruption_ends_the_child(clip: Path, children: list[subprocess.Popen]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_video(clip, max_frames=60, progress=on_first_frame(interrupt))
    assert children[0].returncode == -signal.SIGKILL


def test_ctrl_c_does_not_reach_the_child(clip: Path, children: list[subprocess.Popen]) -> None:
    read_video(clip, max_frames=1, progress=on_first_frame(lambda: groups.append(os.getpgid(children[0].pid))))
    assert groups
    assert os.getpgid(0) not in groups


groups: list[int] = []


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed while the child hangs in a library and writes nothing that could fail."""
    hang = """
        import pathlib, time
        import PIL.Image
        def hanging(path):
            pathlib.Path(path).with_name("hangs").touch()
            time.sleep(600)
        PIL.Image.open = hanging
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hang))
    (tmp_path / "view.png").touch()
    program = f"""
        import subprocess
        from videoanchor_triton.app.video import reader, process
        class Shown(subprocess.Popen):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                print(self.pid, flush=True)
        process.subprocess.Popen = Shown
        reader.read_video({str(tmp_path / "view.png")!r})
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), *sys.path)))}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        while not (tmp_path / "hangs").exists():  # the test's own time limit ends this
            time.sleep(0.02)
        parent.kill()
    while _runs(child):
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_is_left_behind(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[subprocess.Popen]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read_video(clip, progress=on_first_frame(lambda: seen.extend(tmp_path.iterdir())))
    assert seen == []
    assert list(tmp_path.iterdir()) == []
    assert len(children) == 1
    assert len(os.listdir("/proc/self/fd")) == _open_files_after_another(clip)


seen: list[Path] = []


def _open_files_after_another(clip: Path) -> int:
    read_video(clip, max_frames=1)
    return len(os.listdir("/proc/self/fd"))


def test_what_a_library_prints_does_not_mix_with_the_frames(clip: Path, tmp_path: Path) -> None:
    """Each interpreter, this one's child among them, says something at its start."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(1, b'noise\\n')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = (
        f"from videoanchor_triton.app.video.reader import read_video; print(read_video({str(clip)!r}).frames.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "noise\n(32, 240, 320, 3)\n"


def test_the_command_line_says_it_in_one_line(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "make_planner", lambda *_args: None)  # it looks at the model first
    monkeypatch.setattr(process, "_MODULE", "videoanchor_triton.app.no_such_module")
    command = ["run", "--model", "m", "--video", str(clip), "--question", "?", "--out", "out", "--alpha-k", "1"]
    assert cli.main([*command, "--alpha-v", "1"]) == 2
    *stages, line = capsys.readouterr().err.splitlines()
    assert [stage.strip() for stage in stages] == ["import", "checkpoint", "decode"]
    assert json.dumps(str(clip))[1:-1] in line
