"""A video file as packets: which frames it has, and what it promises."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.stream import Disposition

from ...integrations.errors import InputError
from . import limits
from .damage import Messages, ends_well

Report = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""
SAYS_DURATION = frozenset({"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "flv", "asf"})
"""Containers whose header says how long they last; of others FFmpeg estimates it."""
SHORTER = 0.5
"""Seconds by which a file ends too soon from which it is cut short."""


@dataclass(frozen=True, eq=False)
class FrameTable:
    """What the packets of a file tell about its frames; nothing was decoded for it.

    Args:
        times: (N,) int64, ascending: when each frame is shown, in units of `time_base`.
        keyframes: (K,) int64, ascending: those of `times` at which decoding can start.
        time_base: seconds.
        has_times: frames carry these times; otherwise (AVI) the n-th decoded frame has the n-th time.
        fps: frames per second, on average.
        damage: why the file is taken to be cut short or damaged; empty where it is not.
    """

    times: np.ndarray
    keyframes: np.ndarray
    time_base: float
    has_times: bool
    fps: float
    damage: str

    @property
    def seconds(self) -> np.ndarray:
        """(N,) float64 from the start of the video."""
        return (self.times - self.times[0]) * self.time_base


class PacketFile:
    """A video file that is opened for decoding, and its frame table."""

    def __init__(self, path: Path, report: Report, messages: Messages | None = None) -> None:
        """
        Args:
            messages: where FFmpeg's messages can be read; None for nowhere.

        Raises:
            InputError: the file has no video, no frame with a time, or frames that are too large.
            FFmpegError, OSError: the file cannot be read.
        """
        self._path, self._report, self._messages = path, report, messages or Messages()
        self._broke_off = False
        self._open()
        self.table = self._read_table()

    def _open(self, **options: str) -> None:
        local = {"protocol_whitelist": "file"}  # a playlist reaches no network
        bounds = {"max_pixels": str(limits.SOURCE_PIXELS)}
        path = str(self._path.absolute())
        self._container = av.open(path, options=local | bounds | options, metadata_errors="replace")
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise InputError(f"{self._path} has no video stream: give a file with pictures")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise InputError(f"{self._path}: PyAV has no decoder for its video: convert it to H.264 in MP4")
        limits.check_size(self._path, context.width, context.height)
        bits = context.format.padded_bits_per_pixel if context.format is not None else 24
        self.picture_bytes = context.width * context.height * bits // 8
        """Of a decoded frame."""
        context.options = bounds | {"err_detect": "crccheck"}
        context.thread_type = "AUTO"
        context.thread_count = limits.threads(self.picture_bytes)

    def close(self) -> None:
        self._container.close()

    def _reopen(self, **options: str) -> None:
        self.close()
        self._open(**options)

    def _heed(self, decoder: bool) -> None:
        """Takes notice of FFmpeg's new messages: the container's, and with `decoder` the decoder's too."""
        codec = self._stream.codec_context.codec
        self._messages.collect({self._container.format.name, *((codec.name, codec.canonical_name) if decoder else ())})

    @property
    def problems(self) -> list[str]:
        """What FFmpeg has said so far about damage in the container and in what was decoded."""
        self._heed(decoder=True)
        return self._messages.found

    def _packets(self, stage: str) -> Iterator[Any]:
        """The packets of the stream, then the empty one that flushes the decoder; damage in the file ends them."""
        try:
            for n, packet in enumerate(self._container.demux(self._stream)):
                self._report(stage, n, self._stream.frames)
                yield packet
        except av.error.InvalidDataError:
            self._broke_off = True

    def _read_table(self) -> FrameTable:
        rows, n_packets, n_corrupt, end = [], 0, 0, 0
        for packet in self._packets("read"):
            n_packets += packet.dts is not None or packet.size > 0
            n_corrupt += packet.is_corrupt
            if packet.size and not packet.is_discard:
                rows.append((packet.pts, packet.dts, packet.is_keyframe))
                end = max(end, (packet.pts or packet.dts or 0) + (packet.duration or 0))
        self._heed(decoder=False)  # a recording that begins in the middle is no damage
        has_times = all(pts is not None for pts, _, _ in rows)
        column = 0 if has_times else 1
        rows = [row for row in rows if row[column] is not None]
        if not rows:
            raise InputError(
                f"{self._path} holds no frame with a timestamp: give a video with at least one (a bare stream has to "
                "be put into a container first: ffmpeg -i FILE out.mp4)"
            )
        times = np.unique(np.array([row[column] for row in rows], dtype=np.int64))
        keyframes = np.unique(np.array([row[column] for row in rows if row[2]], dtype=np.int64))
        time_base = float(self._stream.time_base or 1.0)
        span = float(times[-1] - times[0]) * time_base
        fps = (len(times) - 1) / span if span > 0 else float(self._stream.average_rate or 0) or 1.0
        gap = float(np.diff(times).max(initial=0)) * time_base
        damage = self._cut_short(n_packets, end * time_base, gap)
        if n_corrupt and not damage:
            damage = f"damaged: {n_corrupt} of {n_packets} packets are incomplete"
        return FrameTable(times, keyframes, time_base, has_times, fps, damage)

    def _cut_short(self, n_packets: int, end: float, gap: float) -> str:
        """Why the file does not hold what it promises; empty where it does. Edit lists may hide frames, and other
        streams may last longer: where it looks as if something were missing, all that there is is read again.

        Args:
            n_packets: that were read of the video.
            end: of the last frame, in seconds.
            gap: seconds between frames, at most.
        """
        if not ends_well(self._path, self._container.format.name):
            return "cut short or damaged: its end is missing"
        name, declared = self._container.format.name, self._stream.frames
        if name != "avi" and n_packets < declared:
            n_packets = self._read_all(ignore_editlist="1")[0]
            if n_packets < declared:
                return f"cut short: {n_packets} of the {declared} frames that it declares can be read"
        promised, missing = self._promised_seconds(name, gap)
        if end + missing < promised:
            end = self._read_all()[1]
            if end + missing < promised:
                return f"cut short: it says that it lasts {promised:.1f} s, and ends at {end:.1f} s"
        return "cut short: reading it ended with an error" if self._broke_off else ""

    def _promised_seconds(self, container: str, gap: float) -> tuple[float, float]:
        """How long the header says that the file lasts, 0 where FFmpeg would have to guess; and by how much a whole
        file may be shorter, whose frames are up to `gap` seconds apart."""
        if container == "avi":  # it declares frames, and repeats of them where there are gaps
            tick = float(self._stream.time_base or 0)
            return self._stream.frames * tick, 2 * gap if gap > 1.5 * tick else 0.5 * tick
        promised = (self._container.duration or 0) / av.time_base if container in SAYS_DURATION else 0.0
        return promised, max(SHORTER, 2 * gap)

    def _read_all(self, **options: str) -> tuple[int, float]:
        """How many packets of the video there are, and when the last packet of any stream ends."""
        self._reopen(**options)
        n_packets, end = 0, 0.0
        try:
            for n, packet in enumerate(self._container.demux()):
                self._report("read", n, 0)
                n_packets += packet.stream is self._stream and (packet.dts is not None or packet.size > 0)
                start = packet.dts if packet.pts is None else packet.pts
                if start is not None:
                    end = max(end, float((start + (packet.duration or 0)) * packet.time_base))
        except av.error.InvalidDataError:
            pass
        self._reopen()
        return n_packets, end
