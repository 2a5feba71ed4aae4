"""What shows that a video file is damaged: FFmpeg's messages, and containers whose end is missing."""

import mmap
import os
import re
from collections.abc import Collection
from pathlib import Path

import av.logging

_MESSAGE = re.compile(r"\[([^\]@]+) @ 0x[0-9a-f]+\] +([^\[\n][^\n]*)")
_HARMLESS = "mmco: unref short failure"
"""The H.264 decoder says it after a seek to a keyframe that is no fresh start."""
_TS_PACKETS = (188, 192, 204)
_SHOWN = 100
"""Characters of a message that are shown."""


class Messages:
    """The error messages of FFmpeg, which it writes to standard error from now on: that has to be a file. Its own
    callback does that: PyAV's would wait for the interpreter's lock in threads of a decoder that the interpreter waits
    for."""

    def __init__(self) -> None:
        av.logging.restore_default_callback()
        av.logging.set_libav_level(av.logging.ERROR)
        self._read_to = 0
        self.found: list[str] = []

    def collect(self, names: Collection[str]) -> None:
        """Adds to `found` what one of `names` (a format, a decoder) has written since the last call."""
        data = os.pread(2, os.fstat(2).st_size - self._read_to, self._read_to)
        self._read_to += len(data)
        for name, text in _MESSAGE.findall(data.decode("ascii", errors="replace")):
            if name in names and _HARMLESS not in text:
                self.found.append(f"{name.split(',')[0]}: {text.strip()[:_SHOWN]}")


def ends_well(path: Path, container: str) -> bool:
    """False for a GIF whose blocks do not lead to its end mark, and for a transport stream that ends within a packet:
    FFmpeg takes both for whole. True for all others."""
    if container == "gif":
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _gif_ends(data)
    return container != "mpegts" or any(path.stat().st_size % size == 0 for size in _TS_PACKETS)


def _gif_ends(data: mmap.mmap) -> bool:
    def colours(flags: int) -> int:
        return 3 << (1 + (flags & 7)) if flags & 0x80 else 0

    try:
        at = 13 + colours(data[10])
        while (kind := data[at : at + 1]) in (b"!", b","):
            at += 2 if kind == b"!" else 11 + colours(data[at + 9])
            while data[at]:
                at += 1 + data[at]
            at += 1
    except IndexError:
        return False
    return kind == b";"
