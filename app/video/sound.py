"""The sound of a video under pictures that were made from it, packet by packet; runs in the child of process.py."""

from collections.abc import Iterator
from contextlib import closing
from heapq import merge
from operator import itemgetter
from typing import Any

import av
import av.error

from ...integrations.errors import InputError
from . import limits
from .decoding import VideoFile, open_container
from .sampling import Progress, SoundRequest

_MORE_BYTES = 2**24
"""Of the file that is written, beside what the two that are read have: tables of its packets."""


def put_together(request: SoundRequest, report: Progress) -> dict[str, Any]:
    """Writes the pictures and, as it is, the sound of the source as MP4; nothing is decoded.

    Returns:
        "sound": the codec, None where there is no sound; "left_out": why it is not in the file, None where it is.

    Raises:
        InputError: the source cannot be read.
    """
    sizes = [path.stat().st_size for path in (request.source, request.pictures)]
    limits.limit_process(file_bytes=sum(sizes) + _MORE_BYTES)
    try:
        with closing(VideoFile(request.source, report)) as file:
            start = file.start + request.start
        with closing(open_container(request.source)) as source:
            sound = source.streams.best("audio")
            name = None if sound is None else getattr(sound.codec_context, "name", "of an unknown kind")
            try:
                if sound is not None and sound.codec_context is None:
                    raise ValueError("PyAV has no decoder for it")
                _write(request, source, sound, start, report)
            except (ValueError, av.error.FFmpegError) as error:
                if sound is None:
                    raise
                _write(request, source, None, start, report)
                return {"sound": name, "left_out": str(error)}
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{request.name} cannot be read for its sound ({error}): check the file") from error
    return {"sound": name, "left_out": None}


def _write(request: SoundRequest, source: Any, sound: Any, start: float, report: Progress) -> None:
    with av.open(str(request.pictures)) as pictures, av.open(str(request.out), "w", format="mp4") as out:
        tracks = [_timed(pictures, pictures.streams.video[0], out, 0.0)]
        if sound is not None:
            tracks.append(_timed(source, sound, out, start))
        for n, (_, packet) in enumerate(merge(*tracks, key=itemgetter(0))):
            report("sound", n, 0)
            out.mux(packet)


def _timed(container: Any, stream: Any, out: Any, start: float) -> Iterator[tuple[float, Any]]:
    """When each packet is due, with what is over before `start` left out; damage ends them."""
    copy = out.add_stream_from_template(stream)
    shift = round(start / stream.time_base)

    def packets() -> Iterator[tuple[float, Any]]:
        try:
            for packet in container.demux(stream):
                if packet.dts is None or packet.pts is None or packet.pts + (packet.duration or 0) <= shift:
                    continue
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                yield float(packet.dts * stream.time_base), packet
        except av.error.InvalidDataError:
            return

    return packets()
