"""The progress line of a batch: how far it is, how long it will take, tokens per second, memory, time by stage."""

import sys
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from .results import Record

STAGES = ("decode_video", "vision", "ssc", "prefill", "decode")


class BatchProgress:
    """A line on standard error that is written over, once a minute where nobody watches; and the sums of a run.

    Args:
        enabled: False shows nothing.

    Attributes:
        n_done, n_failed: rows that this run has finished.
        n_tokens: generated.
        seconds: summed over rows, by stage.
        peak_memory_bytes: the largest of any row: of the GPUs, or without one of the process.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._start = time.monotonic()
        self.n_done = self.n_failed = self.n_tokens = self.peak_memory_bytes = 0
        self.seconds: Counter[str] = Counter()
        self._stage = ""

    def start(self, total: int, finished: int) -> None:
        """`finished` of `total` rows are there already."""
        interval = 0.2 if sys.stderr.isatty() else 60.0
        self._bar = tqdm(
            total=total,
            initial=finished,
            disable=not self._enabled,
            mininterval=interval,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} rows{desc} {bar:10} {elapsed}<{remaining}{postfix}",
        )

    def stage(self, stage: str, done: int, total: int) -> None:
        """What the current row is at; for `progress` arguments."""
        self._stage = f"{stage} {done}/{total}, " if total else f"{stage} {done}, "
        self._show(0)

    def finished(self, record: Record) -> None:
        """Counts a row."""
        self.n_done += record["status"] == "done"
        self.n_failed += record["status"] == "failed"
        if record["status"] == "done":
            self.n_tokens += record["tokens"]["generated"]
            self.seconds.update({stage: record["seconds"][stage] or 0.0 for stage in STAGES})
            memory = record["peak_memory_bytes"] or record["peak_host_memory_bytes"] or 0
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory)
        self._show(1)

    def _show(self, n: int) -> None:
        """What a narrow terminal cuts off comes last."""
        failures = f", {self.n_failed} failed" if self.n_failed else ""
        self._bar.set_description_str(failures, refresh=False)
        self._bar.set_postfix_str(f"{self._stage}{self.text()}", refresh=False)
        self._bar.update(n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def text(self) -> str:
        """Tokens per second of wall time, peak memory, mean seconds of a row by stage."""
        rows = max(self.n_done, 1)
        stages = " ".join(f"{stage} {self.seconds[stage] / rows:.2f}" for stage in STAGES)
        rate = self.n_tokens / (time.monotonic() - self._start)
        return f"{rate:.1f} tokens/s, peak {self.peak_memory_bytes / 2**30:.2f} GiB, s/row {stages}"
