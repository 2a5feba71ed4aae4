"""When to stop asking: after failures that the rows after them would share."""

import re
from typing import Literal

from ...integrations.errors import InputError
from ..video.names import names_in

SAME_FAILURES = 5
"""Equal failures in a row that end a batch, where they are not the input's."""

Failure = Literal["input", "accelerator", "other"]
"""What a row failed by: itself or its video (also by its size), a device that cannot be used any more, or else."""

_LOST = re.compile(
    r"CUDA (?:driver )?error|HIP error|NCCL error|Triton Error \[|device-side assert|illegal memory access"
    r"|illegal instruction|misaligned address|unspecified launch failure|uncorrectable ECC|device[ _]lost"
    r"|cudaError|hipError|CUDA_ERROR_|HSA_STATUS_ERROR|UR_RESULT_ERROR|(?:nccl|rccl)\w*Error"
    r"|(?:cu|hip|roc)(?:BLAS|DNN|FFT|SOLVER|SPARSE|RAND)(?: error|_STATUS_)|miopen(?: error|Status)",
    re.I,
)
_LOST_NAMES = frozenset({"AcceleratorError", "CUDARuntimeError", "CUDADriverError", "CudaAPIError", "HIPRuntimeError"})
_USABLE = re.compile(
    r"_STATUS_(?:NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM)|invalid (?:configuration )?argument|too many resources", re.I
)
"""What a device refuses, and can be used after."""
_MEMORY = re.compile(r"out[ _]?of[ _]?memory|ALLOC_FAILED|MemoryAllocation", re.I)
"""A device without room for one row has room for another."""


class StoppedError(Exception):
    """Nothing more is asked. The message is one line that says why."""


def failure_of(error: BaseException) -> Failure:
    """What kind of failure an exception is, by itself and by those that it was raised from. A device that was lost by
    another process (`ChildProcessError`) can be used by the next one."""
    kind: Failure = "input" if isinstance(error, InputError) or _is_memory(error) else "other"
    link: BaseException | None = error
    for _ in range(20):
        if link is None:
            break
        if not isinstance(link, InputError | ChildProcessError) and _is_lost(link):
            return "accelerator"
        link = link.__cause__ or link.__context__
    return kind


def _is_lost(error: BaseException) -> bool:
    if _is_memory(error) or _USABLE.search(str(error)):
        return False
    return type(error).__name__ in _LOST_NAMES or bool(_LOST.search(str(error)))


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(_MEMORY.search(f"{type(error).__name__}: {error}"))


class StopRule:
    """Looks at failures in the order in which they come, and stops where the next rows would fail as well: the device
    is lost, or `SAME_FAILURES` in a row are equal, not the input's, and not all of one video.

    Args:
        n_videos: that will be asked about; of a single one, equal failures stop as well.
    """

    def __init__(self, n_videos: int) -> None:
        self._least_videos = min(n_videos, 2)
        self._reason, self._count, self._videos = "", 0, set[str]()

    def answered(self) -> None:
        self._reason = ""

    def failed(self, kind: Failure | None, reason: str, video: str) -> None:
        """
        Raises:
            StoppedError: nothing more should be asked.
        """
        line = reason.split("\n", 1)[0][:300]
        if kind == "accelerator":
            raise StoppedError(f"stopped, as the device failed and this process cannot use it any more ({line})")
        if kind == "input":
            return
        for name in names_in(video):
            reason = reason.replace(name, "#")
        same = re.sub(r"0x[0-9a-f]+|\d+", "#", reason)
        if same != self._reason:
            self._reason, self._count, self._videos = same, 0, set()
        self._count += 1
        self._videos.add(video)
        if self._count >= SAME_FAILURES and len(self._videos) >= self._least_videos:
            raise StoppedError(f"stopped after {self._count} equal failures in a row that are not the input's ({line})")
