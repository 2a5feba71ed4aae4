"""Runs a batch: results that are there stay, the rest is answered and each written as it finishes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .progress import BatchProgress
from .results import Record, ResultsLog
from .rows import BatchRow, by_video
from .worker import BatchJob, BatchWorker, failed

if TYPE_CHECKING:  # it imports torch
    from ...anchor.timing import Progress

Groups = Sequence[Sequence[BatchRow]]
"""The rows of each video."""

Engine = Callable[[BatchJob, Groups], Iterable[Record]]
"""Answers rows in any order and yields each result as it is there."""


def local_engine(job: BatchJob, groups: Groups, *, progress: "Progress | None" = None) -> Iterator[Record]:
    """One model in this process."""
    worker = BatchWorker(job, progress)
    for rows in groups:
        yield from worker.answer(rows)


def run_batch(
    job: BatchJob,
    rows: Sequence[BatchRow],
    log: ResultsLog,
    engine: Engine,
    progress: BatchProgress,
    *,
    retry_failed: bool = False,
) -> None:
    """Answers the rows that `log` has no result for and appends each result to it.

    Args:
        rows: without repeats.
        retry_failed: rows whose result is a failure are answered again.

    Raises:
        InputError: the engine cannot start.
        OSError: a result could not be written; those before it stay.
    """
    settings_hash = job.settings_hash()
    keys = {row.key(settings_hash): row for row in rows}
    failures = {key for key in keys if key in log.records and log.records[key]["status"] == "failed"}
    if retry_failed and failures:
        log.drop(failures)
    waiting = [row for key, row in keys.items() if key not in log.records]
    progress.start(len(rows), len(rows) - len(waiting))
    if not waiting:
        return
    for record in engine(job, by_video(waiting)):
        if log.append(record):
            progress.finished(record)
    for row in waiting:
        record = failed(row, settings_hash, "the engine gave no result")
        if log.append(record):
            progress.finished(record)
