"""How much memory a measured run takes."""

import ctypes
from pathlib import Path


class PeakMemory:
    """The most memory that the process held since this was made, beyond what it held then (Linux with glibc)."""

    def __init__(self) -> None:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it counts when it is taken again
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = self._kib("VmRSS")
        except (OSError, AttributeError):
            self.before = None

    @staticmethod
    def _kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def mib(self) -> float | None:
        return None if self.before is None else max(0, self._kib("VmHWM") - self.before) / 1024
