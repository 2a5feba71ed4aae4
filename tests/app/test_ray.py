"""`--engine ray` on two actors of this machine, one of them killed at work: no row is lost and none comes twice."""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.app import cli
from videoanchor_triton.app.batch.job import run_batch
from videoanchor_triton.app.batch.progress import STAGES, BatchProgress
from videoanchor_triton.app.batch.results import Record, ResultsLog
from videoanchor_triton.app.batch.rows import BatchRow
from videoanchor_triton.app.batch.stopping import StoppedError
from videoanchor_triton.app.batch.worker import BatchJob, failed
from videoanchor_triton.app.video.reader import write_video
from videoanchor_triton.integrations.errors import InputError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from videoanchor_triton.app.batch.ray_engine import MAX_DEATHS, ray_engine  # noqa: E402

TESTS = str(Path(__file__).parent)
NUMBERS = {
    "tokens": {"generated": 2},
    "seconds": dict.fromkeys(STAGES, 0.5),
    "peak_memory_bytes": None,
    "peak_host_memory_bytes": 5,
}


class Settings:
    """In place of a `VideoAnchorConfig`, so that no actor imports torch."""

    def to_dict(self) -> dict[str, Any]:
        return {}


class Worker:
    """In place of a `BatchWorker`: leaves a line for each row it begins, and dies where it is told to."""

    def __init__(self, job: BatchJob) -> None:
        if job.model == "missing":
            raise InputError("model missing cannot be loaded")
        self._settings_hash, self._folder = job.settings_hash(), job.score_folder
        (self._folder / f"actor-{os.getpid()}").touch()

    def answer(self, rows: Sequence[BatchRow]) -> Iterator[Record]:
        for row in rows:
            begun = self._folder / row.question
            with begun.open("a") as file:
                file.write(f"{os.getpid()}\n")
            n = len(begun.read_text().splitlines())
            if row.question == "kills-all" or (row.question == "kills-once" and n == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            if row.question == "loses-the-device":
                yield failed(row, self._settings_hash, RuntimeError("CUDA error: an illegal memory access"))
            else:
                yield {**failed(row, self._settings_hash, ""), "status": "done", **NUMBERS}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def make_job(folder: Path, model: str = "model") -> BatchJob:
    return BatchJob(model, "cpu", "auto", Settings(), {}, False, 1, folder, 0)  # pyright: ignore[reportArgumentType]


def test_two_actors_and_one_killed(tmp_path: Path) -> None:
    """A row that kills every actor fails; the rows beside it, and those of the killed actor, are all there once."""
    questions = [[f"{video}-{n}" for n in range(3)] for video in range(6)]
    questions[1][1], questions[3][1] = "kills-once", "kills-all"
    rows = [
        BatchRow(10 * v + n, Path(f"/{v}.mp4"), q, {"n": n})
        for v, some in enumerate(questions)
        for n, q in enumerate(some)
    ]
    job, seen = make_job(tmp_path), []

    def engine(job: BatchJob, groups: Any) -> Iterator[Record]:
        for record in ray_engine(job, groups, n_actors=2, make_worker=Worker):
            seen.append(record["question"])
            yield record

    with ResultsLog(tmp_path / "out" / "results.jsonl") as log:
        run_batch(job, rows, log, engine, progress := BatchProgress(enabled=False))
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    expected = {question for some in questions for question in some}
    assert Counter(record["question"] for record in records) == Counter(expected)
    assert Counter(seen) == Counter(expected), "Ray hands over no row twice"
    reasons = {record["question"]: record["reason"] for record in records if record["status"] == "failed"}
    assert reasons == {"kills-all": f"{MAX_DEATHS} actors died at this row: see Ray's logs"}
    assert (progress.n_done, progress.n_failed) == (17, 1)
    assert len((tmp_path / "kills-all").read_text().splitlines()) == MAX_DEATHS
    assert len((tmp_path / "kills-once").read_text().splitlines()) == 2
    assert len(list(tmp_path.glob("actor-*"))) >= 2 + 1 + MAX_DEATHS
    assert all(record["input"] == {"n": record["line"] % 10} for record in records)


def test_an_actor_that_loses_its_device(tmp_path: Path) -> None:
    """The batch stops there; a rerun asks the others."""
    questions = ["q0", "loses-the-device", "q2", "q3"]
    rows = [BatchRow(n, Path(f"/{n}.mp4"), question) for n, question in enumerate(questions)]
    job, engine = make_job(tmp_path), partial(ray_engine, n_actors=1, make_worker=Worker)
    with ResultsLog(tmp_path / "out" / "results.jsonl") as log:
        with pytest.raises(StoppedError, match="CUDA error: an illegal memory access"):
            run_batch(job, rows, log, engine, BatchProgress(enabled=False))
        assert [record["failure"] for record in log.records.values() if record["status"] == "failed"] == ["accelerator"]
        assert len(log.records) < 4
        run_batch(job, rows, log, engine, BatchProgress(enabled=False))
        assert Counter(record["question"] for record in log.records.values()) == Counter(questions)


def test_what_is_there_is_not_asked_again(tmp_path: Path) -> None:
    rows = [BatchRow(n, Path("/a.mp4"), f"q{n}") for n in range(4)]
    job = make_job(tmp_path)

    def engine(job: BatchJob, groups: Any) -> Iterator[Record]:
        assert [[row.question for row in some] for some in groups] == [["q0", "q2"]]
        return ray_engine(job, groups, n_actors=1, make_worker=Worker)

    with ResultsLog(tmp_path / "out" / "results.jsonl") as log:
        for row in (rows[1], rows[3]):
            log.append(failed(row, job.settings_hash(), "before"))
        run_batch(job, rows, log, engine, BatchProgress(enabled=False))
        assert [record["question"] for record in log.records.values()] == ["q1", "q3", "q0", "q2"]


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    rows = [[BatchRow(1, Path("/a.mp4"), "q")]]
    with pytest.raises(InputError, match="model missing cannot be loaded"):
        list(ray_engine(make_job(tmp_path, "missing"), rows, n_actors=2, make_worker=Worker))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way with a model, on one actor."""
    save_checkpoint("internvl", tmp_path / "checkpoint")
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 48, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "a.mp4", frames, fps=4)
    command = ("batch", tmp_path / "clips", "--model", tmp_path / "checkpoint", "--max-new-tokens", "3")
    gate = ("--alpha-k", "2", "--alpha-v", "1", "--scorer", "uniform", "--max-frames", "4")
    questions = ("--question", "word5", "--question", "word6 word7", "--json")
    for engine in ("ray", "local"):
        options = (*gate, *questions, "--engine", engine, "--out", tmp_path / engine)
        assert cli.main([*map(str, (*command, *options))]) == 0
        assert json.loads(capsys.readouterr().out)["done"] == 2
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / engine / "results.jsonl").read_text().splitlines()]
        for engine in ("ray", "local")
    )
    for name in ("key", "answer", "tokens", "input"):
        assert [record[name] for record in ours] == [record[name] for record in theirs]


def split_worker(job: BatchJob) -> Any:
    sys.path.append(TESTS)
    from tensor_parallel_parts import fake_worker

    return fake_worker(job)


def test_an_actor_whose_processes_die(tmp_path: Path) -> None:
    """The actor lives and starts others."""
    rows = [BatchRow(n, Path("/a.mp4"), question) for n, question in enumerate(("q0", "dies", "q2"))]
    job = replace(make_job(tmp_path), tensor_parallel=2)
    records = list(ray_engine(job, [rows], n_actors=1, make_worker=split_worker))
    assert [(record["question"], record["status"]) for record in records] == [
        ("q0", "done"),
        ("dies", "failed"),
        ("q2", "done"),
    ]
    starts = ["2 processes", "q0", "dies", "2 processes", "q2"]
    assert (tmp_path / "begun").read_text().splitlines() == starts, "each row once"


def test_more_processes_than_a_machine_has_cores(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 cores, room for 0 of them, each on one machine with 3 cores"):
        list(ray_engine(replace(make_job(tmp_path), tensor_parallel=3), []))


def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 actors with 64 GPUs each: the cluster has"):
        list(ray_engine(make_job(tmp_path), [], n_actors=2, gpus_per_actor=64, make_worker=Worker))
