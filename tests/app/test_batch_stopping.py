"""When a batch stops instead of failing row after row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from videoanchor_triton.app.batch.job import run_batch
from videoanchor_triton.app.batch.progress import STAGES, BatchProgress
from videoanchor_triton.app.batch.results import Record, ResultsLog
from videoanchor_triton.app.batch.rows import BatchRow
from videoanchor_triton.app.batch.stopping import SAME_FAILURES, StoppedError, failure_of
from videoanchor_triton.app.batch.worker import BatchJob, failed
from videoanchor_triton.integrations.errors import InputError

LOST = [
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("HIP error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, ...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error, NCCL version 2.27"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("UR backend failed. UR backend returns:20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    torch.AcceleratorError("worded in another way"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[:30])
def test_a_device_that_is_lost_is_known_however_it_is_worded(error: Exception) -> None:
    assert failure_of(error) == "accelerator"
    for outer in (ValueError("could not generate"), InputError("visual tokens cannot be scored")):
        outer.__cause__ = error
        assert failure_of(outer) == "accelerator"
    while_handling = KeyError("cleanup")
    while_handling.__context__ = error
    assert failure_of(while_handling) == "accelerator"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "input"),
        (RuntimeError("CUDA error: out of memory"), "input"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "input"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "input"),
        (MemoryError(), "input"),
        (InputError("no video file at /CUDA error/illegal memory access.mp4: check the path"), "input"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This may happen for a non-contiguous input"), "other"),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), "other"),
        (RuntimeError("out of resource: shared memory, Required: 300000"), "other"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "other"),
        (KeyError("cuda"), "other"),
    ],
)
def test_what_is_no_lost_device(error: Exception, kind: str) -> None:
    assert failure_of(error) == kind


class Settings:
    """In place of a `VideoAnchorConfig`."""

    def to_dict(self) -> dict[str, Any]:
        return {}


def ask(folder: Path, rows: list[tuple[str, str]], reasons: dict[str, Exception]) -> tuple[list[Record], str]:
    """The results of (video, question) rows, those of some questions failures; and why it stopped."""
    job = BatchJob("m", "cpu", "auto", Settings(), {}, False, 1, folder, 0)  # pyright: ignore[reportArgumentType]
    closed = []

    def engine(job: BatchJob, groups: Any) -> Iterator[Record]:
        try:
            for row in (row for group in groups for row in group):
                if row.question in reasons:
                    yield failed(row, job.settings_hash(), reasons[row.question])
                else:
                    about = failed(row, job.settings_hash(), "")
                    numbers = {"tokens": {"generated": 1}, "seconds": dict.fromkeys(STAGES, 0.5)}
                    memory = {"peak_memory_bytes": 1, "peak_host_memory_bytes": 1}
                    yield {**about, "status": "done", "answer": "a", **numbers, **memory}
        finally:
            closed.append(True)

    asked = [BatchRow(n, Path(video), question) for n, (video, question) in enumerate(rows)]
    why = ""
    with ResultsLog(folder / "results.jsonl") as log:
        try:
            run_batch(job, asked, log, engine, BatchProgress(enabled=False))
        except StoppedError as error:
            why = str(error)
        assert closed, "actors and processes end"
        return list(log.records.values()), why


def rows_of(n: int, per_video: int = 1) -> list[tuple[str, str]]:
    return [(f"/{k // per_video}.mp4", f"q{k}") for k in range(n)]


def test_a_lost_device_stops_at_its_first_failure(tmp_path: Path) -> None:
    for n, error in enumerate(LOST):
        records, why = ask(tmp_path / str(n), rows_of(9), {f"q{k}": error for k in range(3, 9)})
        assert [record["status"] for record in records] == ["done"] * 3 + ["failed"]
        assert records[-1]["failure"] == "accelerator"
        assert "the device failed" in why
        assert "\n" not in why


def test_equal_failures_in_a_row_stop(tmp_path: Path) -> None:
    """Addresses, numbers and the video's name do not make them different."""
    reasons: dict[str, Exception] = {
        f"q{k}": RuntimeError(f"kernel {k} failed at 0x7f{k}a for /{k}.mp4") for k in range(2, 30)
    }
    records, why = ask(tmp_path / "a", rows_of(30), reasons)
    assert len(records) == 2 + SAME_FAILURES
    assert f"{SAME_FAILURES} equal failures in a row" in why
    again, _ = ask(tmp_path / "a", rows_of(30), reasons)
    assert len(again) == 2 + 2 * SAME_FAILURES, "a rerun goes on after them"


@pytest.mark.parametrize(
    "reasons",
    [
        pytest.param({f"q{k}": InputError("no video file: check the path") for k in range(30)}, id="input"),
        pytest.param({f"q{k}": torch.OutOfMemoryError("CUDA out of memory") for k in range(30)}, id="memory"),
        pytest.param({f"q{k}": RuntimeError("odd" + "x" * k) for k in range(30)}, id="different"),
        pytest.param({f"q{k}": RuntimeError("odd") for k in range(30) if k % SAME_FAILURES}, id="not-in-a-row"),
        pytest.param({f"q{k}": RuntimeError("odd") for k in range(10, 20)}, id="all-of-one-video"),
    ],
)
def test_other_failures_do_not_stop(tmp_path: Path, reasons: dict[str, Exception]) -> None:
    records, why = ask(tmp_path, rows_of(30, per_video=10), reasons)
    assert (len(records), why) == (30, "")
    assert sum(record["status"] == "failed" for record in records) == len(reasons)


def test_of_a_single_video_equal_failures_stop(tmp_path: Path) -> None:
    records, why = ask(tmp_path, rows_of(30, per_video=30), {f"q{k}": RuntimeError("odd") for k in range(30)})
    assert len(records) == SAME_FAILURES
    assert "odd" in why


def test_a_narrow_terminal_shows_failures(capsys: pytest.CaptureFixture[str]) -> None:
    progress = BatchProgress(enabled=True)
    progress.start(1200, 0)
    for _ in range(123):
        progress.finished({"status": "failed"})
    progress.stage("self_expression", 123, 1000)
    progress.close()
    line = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "123/1200 rows, 123 failed" in line[:30]
    assert "self_expression 123/1000" in line[:80]
