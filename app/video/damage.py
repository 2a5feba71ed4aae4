"""What shows that a video file is damaged: FFmpeg's messages, and containers that promise more than they hold."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import av.logging

_MESSAGE = re.compile(r"\[([^\]@]+) @ 0x[0-9a-f]+\] +([^\[\n][^\n]*)")
_HARMLESS = "mmco: unref short failure"
"""The H.264 decoder says it after a seek to a keyframe that is no fresh start."""
_TS_PACKETS = (188, 192, 204)
_SHOWN = 100
"""Characters of a message that are shown."""


class Messages:
    """The error messages of FFmpeg that stand in a file.

    Args:
        descriptor: of the file, to which this process writes them; None where nobody reads them.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._read_to = 0
        self.found: list[str] = []

    @classmethod
    def of_this_process(cls) -> "Messages":
        """From now on FFmpeg writes its errors to standard error, which has to be a file. Its own callback does that:
        PyAV's would wait for the interpreter's lock in threads of a decoder that the interpreter waits for."""
        av.logging.restore_default_callback()
        av.logging.set_libav_level(av.logging.ERROR)
        return cls(2)

    def collect(self, names: Collection[str]) -> None:
        """Adds to `found` what one of `names` (a format, a decoder) has written since the last call."""
        for name, text in self._new():
            if name in names and _HARMLESS not in text:
                self.found.append(f"{name.split(',')[0]}: {text.strip()[:_SHOWN]}")

    def _new(self) -> Iterator[tuple[str, str]]:
        if self._descriptor is None:
            return iter(())
        size = os.fstat(self._descriptor).st_size
        data = os.pread(self._descriptor, size - self._read_to, self._read_to)
        self._read_to += len(data)
        return iter(_MESSAGE.findall(data.decode("ascii", errors="replace")))


def ends_well(path: Path, container: str) -> bool:
    """False for a GIF whose blocks do not lead to its end mark, and for a transport stream that ends within a packet:
    FFmpeg takes both for whole. True for all others."""
    if container == "gif":
        return _gif_ends(path)
    return container != "mpegts" or any(path.stat().st_size % size == 0 for size in _TS_PACKETS)


def _gif_ends(path: Path) -> bool:
    with path.open("rb") as file:
        header = file.read(13)
        if len(header) < 13:
            return False
        _skip_colours(file, header[10])
        while (kind := file.read(1)) != b";":
            if kind == b"!":
                file.seek(1, os.SEEK_CUR)
            elif kind == b"," and len(place := file.read(9)) == 9:
                _skip_colours(file, place[8])
                file.seek(1, os.SEEK_CUR)
            else:
                return False
            while (length := file.read(1)) not in (b"\0", b""):
                file.seek(length[0], os.SEEK_CUR)
    return True


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << (1 + (flags & 7)), os.SEEK_CUR)
