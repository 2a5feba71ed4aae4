"""Runs a batch: results that are there stay, the rest is answered and each written as it finishes."""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ..video.names import name_of
from .progress import BatchProgress
from .results import Record, ResultsLog
from .rows import BatchRow, by_video
from .stopping import StopRule
from .worker import BatchJob, BatchWorker, failed

if TYPE_CHECKING:  # it imports torch
    from ...anchor.timing import Progress

Groups = Sequence[Sequence[BatchRow]]
"""The rows of each video."""

Engine = Callable[[BatchJob, Groups], Iterable[Record]]
"""Answers rows in any order and yields each result as it is there."""


def local_engine(job: BatchJob, groups: Groups, *, progress: "Progress | None" = None) -> Iterator[Record]:
    """One model, in this process or split among others of this machine."""
    with closing(BatchWorker(job, progress)) as worker:
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
    """Answers the rows that `log` has no result for and appends each result to it. Rows of one video and question are
    asked once, and each has the result.

    Args:
        rows: as `matching.matched` gives them.
        retry_failed: rows whose result is a failure are answered again, after all others; the failure stays until the
            new result is there.

    Raises:
        InputError: the engine cannot start.
        OSError: a result could not be written; those before it stay.
        StoppedError: further rows would fail as well, see `StopRule`; those are not asked, and have no result.
    """
    results = _Results(job, rows, log, retry_failed)
    waiting, failures = results.waiting()
    progress.start(results.n_asked, results.n_asked - len(waiting) - len(failures))
    if not waiting and not failures:
        return
    groups = [*by_video(waiting), *by_video(failures)]
    rule = StopRule(len({row.video for group in groups for row in group}))
    answers = iter(engine(job, groups))
    try:
        for record in answers:
            if not results.keep(record):
                continue
            progress.finished(record)
            if record["status"] == "done":
                rule.answered()
            else:
                rule.failed(record.get("failure"), record["reason"], name_of(record["video"]))
    finally:
        if isinstance(answers, Generator):
            answers.close()
    for row in waiting:
        record = failed(row, job.settings_hash(), "the engine gave no result")
        if results.keep(record):
            progress.finished(record)


class _Results:
    """The log, as far as it concerns some rows in one setting; a result is kept for each copy of its row."""

    def __init__(self, job: BatchJob, rows: Sequence[BatchRow], log: ResultsLog, retry_failed: bool) -> None:
        self._log, self._settings_hash, self._columns = log, job.settings_hash(), job.columns()
        copies: defaultdict[tuple[str, str, str | None], list[BatchRow]] = defaultdict(list)
        for row in rows:
            copies[row.asked].append(row)
        self._copies = {some[0].key(self._settings_hash): some for some in copies.values()}
        self.n_asked = len(copies)
        """Different questions."""
        there = self._copies.keys() & log.records.keys() if retry_failed else ()
        self._again = {key for key in there if log.records[key]["status"] == "failed"}

    def waiting(self) -> tuple[list[BatchRow], list[BatchRow]]:
        """The rows to ask, and those to ask again."""
        for key in self._copies:
            if key in self._log.records:
                self._keep_copies(self._log.records[key])  # of a row that was added, or after a kill
        waiting = [rows[0] for key, rows in self._copies.items() if key not in self._log.records]
        return waiting, [rows[0] for key, rows in self._copies.items() if key in self._again]

    def keep(self, record: Record) -> bool:
        """Writes a result, also for the copies of its row; False if there is one."""
        again = record["key"] in self._again
        if not self._log.append({**record, **self._columns}, again=again):
            return False
        self._again.discard(record["key"])
        self._keep_copies(record)
        return True

    def _keep_copies(self, record: Record) -> None:
        for row in self._copies[record["key"]][1:]:
            about = {"key": row.key(self._settings_hash), "line": row.number, "copy": row.copy, "input": row.columns}
            spent = {"seconds": dict.fromkeys(record["seconds"], 0.0)} if "seconds" in record else {}
            kept = self._log.records.get(about["key"], {})
            if any(kept.get(name, self) != record[name] for name in ("status", "answer", "reason")):
                self._log.append({**record, **self._columns, **about, **spent}, again=True)
