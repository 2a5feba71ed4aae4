"""How much a file may cost: pixels of a frame, and memory of the process that reads it."""

import os
import resource
from math import sqrt
from pathlib import Path

from ...integrations.errors import InputError

MAX_PIXELS = 2**24
"""Default of `read_video`: more than 4K and 5K video have, and far more than any processor gives to a model (Qwen's
602,112 a frame of a video, 12.8 million an image)."""
SOURCE_PIXELS = 2**26
"""Frames and images with more are refused before they are decoded: 8192 x 8192, twice what 8K video has."""
_BASE_BYTES = 2**30
"""For the interpreter, the libraries, the table of frames and the stacks of threads."""
_FRAMES = 40
"""Pictures that a decoder holds at once: up to 16 references, one a thread, and what is on its way. 16 threads held 36
of 4K HEVC with 10 bits."""
_MOST_BYTES = 2**32
_THREADS = 16
_THREAD_BYTES = 2**29
"""What the pictures of all threads may take: 4K keeps 16 threads, larger frames get fewer."""
_MESSAGE_BYTES = 2**24


def check_size(path: Path, width: int, height: int) -> None:
    """
    Raises:
        InputError: it is too large to be decoded.
    """
    if width * height > SOURCE_PIXELS:
        most = f"{SOURCE_PIXELS:,}"
        raise InputError(f"{path}: {width} x {height} pixels are more than the {most} that are decoded: scale it down")


def bounded(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Width and height of the largest picture of this shape with at most `max_pixels`."""
    scale = sqrt(max_pixels / (width * height))
    return (width, height) if scale >= 1 else (max(int(width * scale), 1), max(int(height * scale), 1))


def limit_process(picture_bytes: int = SOURCE_PIXELS * 3 // 2, file_bytes: int = _MESSAGE_BYTES) -> None:
    """Bounds what this process can allocate, for decoded pictures of this size, and what it can write into a file.

    The limit is that of RLIMIT_DATA: address space (RLIMIT_AS) counts what allocators reserve for each thread and never
    touch, two to three times as much as is used with 16 threads, and differs with the number of processors.
    """
    for what, most in {
        resource.RLIMIT_DATA: memory_bytes(picture_bytes),
        resource.RLIMIT_FSIZE: file_bytes,
    }.items():
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def memory_bytes(picture_bytes: int) -> int:
    return min(_BASE_BYTES + _FRAMES * picture_bytes, _MOST_BYTES)


def threads(picture_bytes: int) -> int:
    """How many threads decode: as FFmpeg chooses by itself, but fewer for large pictures."""
    n_processors = len(os.sched_getaffinity(0))
    chosen = 1 if n_processors == 1 else min(n_processors + 1, _THREADS)
    return max(min(chosen, _THREAD_BYTES // max(picture_bytes, 1)), 1)
