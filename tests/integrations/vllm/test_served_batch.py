"""`videoanchor batch --engine vllm`: the answers of the engine in this package, each row once, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import vllm_checkpoints
from vllm_media import A, B, C
from vllm_runs import environment

from videoanchor_triton.app import cli
from videoanchor_triton.app.video.reader import write_video

pytestmark = pytest.mark.timeout(1500)
GATE = ("--alpha-k", "9.5", "--alpha-v", "2.5", "--dtype", "float32", "--max-frames", "8", "--tables", "csv")
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32, "skip_mm_profiling": True}
VLLM = ("--engine", "vllm", "--engine-options", json.dumps({**SMALL, "max_model_len": 1024}))
COMMAND = (sys.executable, "-m", "videoanchor_triton.app.cli")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    vllm_checkpoints.llava_onevision(folder / "checkpoint")
    (folder / "clips").mkdir()
    for name, frames in (("a", A), ("b", B), ("c", C)):
        write_video(folder / "clips" / f"{name}.mp4", frames, fps=4)
    (folder / "clips" / "broken.mp4").write_bytes(b"no video")
    questions = [f"Which of the {n} roofs is left?" for n in range(12)]
    rows = [
        {"video": f"clips/{name}.mp4", "question": text} for name in ("a", "b", "broken", "c") for text in questions
    ]
    rows.append({"video": "clips/a.mp4", "question": "left " * 2000})
    rows = [{"id": str(n), **row, **({"system": "Answer from left to right."} if n % 3 == 0 else {})}
            for n, row in enumerate(rows)]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(job: Path, out: Path, *options: str) -> list[str]:
    return [
        "batch",
        str(job / "questions.jsonl"),
        "--model",
        str(job / "checkpoint"),
        "--out",
        str(out),
        *GATE,
        *options,
    ]


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def answered(out: Path) -> dict[str, Any]:
    records = lines(out)
    assert set(Counter(record["input"]["id"] for record in records).values()) == {1}
    return {one["input"]["id"]: (one["status"], one["answer"], one["failure"], one.get("tokens")) for one in records}


def run(job: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *arguments(job, out, *options)]
    with said_by(out).open("a") as said:  # a pipe that nobody reads would stop it
        return subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT)


def said_by(out: Path) -> Path:
    return out.with_name(f"{out.name}.said")


def of_engine(pid: int) -> list[int]:
    """Processes below `pid` that compute."""
    found, names = [], {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().partition("(")[2].rsplit(")", 1)
        except OSError:
            continue
        names[int(path.parent.name)] = (name, int(rest.split()[1]))
    for one, (name, _) in names.items():
        parent = one
        while parent in names and parent != pid:
            parent = names[parent][1]
        if parent == pid and one != pid and name.startswith("VLLM::"):
            found.append(one)
    return found


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(n: int, out: Path, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 500
    while len(lines(out)) < n:
        assert process.poll() is None, said_by(out).read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def local(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("local")
    assert cli.main(arguments(job, out, "--scorer", "uniform", "--max-new-tokens", "24")) == 1
    return answered(out)


def test_answers_of_the_local_engine(job: Path, local: dict[str, Any], tmp_path: Path) -> None:
    """And the same command again asks nothing, in no time."""
    options = ("--scorer", "uniform", "--max-new-tokens", "24", *VLLM)
    process = run(job, tmp_path, *options)
    assert process.wait() == 1, said_by(tmp_path).read_text()[-3000:]
    found = answered(tmp_path)
    assert found == local
    assert Counter(status for status, *_ in found.values()) == {"done": 36, "failed": 13}
    assert {one["system"] for one in lines(tmp_path)} == {None, "Answer from left to right."}
    record = next(one for one in lines(tmp_path) if one["status"] == "done")
    assert record["engine"] == "vllm"
    assert record["tokens"]["visual"] > 0
    before = (tmp_path / "results.jsonl").read_bytes()
    assert cli.main(arguments(job, tmp_path, *options)) == 1
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("whole", [False, True], ids=["engine", "command"])
def test_kill_9(job: Path, local: dict[str, Any], tmp_path: Path, whole: bool) -> None:
    """No row is lost and none is there twice."""
    options = ("--scorer", "uniform", "--max-new-tokens", "24", *VLLM)
    process = run(job, tmp_path, *options)
    wait_for(16, tmp_path, process)  # 13 of them fail without the engine
    engine = of_engine(process.pid)
    assert engine
    for pid in [process.pid] if whole else engine:
        os.kill(pid, signal.SIGKILL)
    process.wait(500)
    if whole:
        assert len(lines(tmp_path)) < 49
        end = time.monotonic() + 60
        while any(map(runs, engine)):
            assert time.monotonic() < end, "the engine outlives the command"
            time.sleep(0.1)
        process = run(job, tmp_path, *options)
        process.wait(500)
    assert process.returncode == 1, said_by(tmp_path).read_text()[-3000:]
    assert answered(tmp_path) == local


def test_refused(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (("--device", "cpu"), "--device: not with --engine vllm"),
        (("--fit",), "--fit: not with --engine vllm"),
        (("--cache", str(tmp_path)), "--cache: not with --engine vllm"),
        (("--whole-prompts",), "--whole-prompts: not with"),
        (("--decode", "prefill"), "--decode prefill: not with"),
        (("--engine-options", '{"dtype": "float16"}'), "dtype: given by the command's own options"),
        (("--engine-options", '{"disable_log_stats": true}'), "disable_log_stats: given by the command's own options"),
        (("--engine-options", '{"pipeline_parallel_size": 2}'), "videoanchor: the gate does not work with pipeline"),
        (("--engine-options", '{"no_such_option": 2}'), "vLLM cannot start"),
        (("--engine-options", json.dumps({**SMALL, "kv_cache_memory_bytes": 1024})), "vLLM cannot start"),
    ):
        given = (*VLLM[:2], *options) if options[0] == "--engine-options" else (*VLLM, *options)
        assert cli.main(arguments(job, tmp_path, *given)) == 2
        assert said in capsys.readouterr().err
