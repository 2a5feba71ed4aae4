"""Frames out of a video file by PyAV; runs in the child process of process.py.

Of a long video only what lies between a wanted frame and the keyframe before it is decoded.

torchcodec is not used: for the same frames of 1080p H.264, with the same times, it was 1.00 to 1.44 times as fast as
this module, by CPU time 0.96 to 1.26 times (benchmarks/results/video-decoding); a fresh process, as each video gets
here, imported it in 4.8 s and PyAV in 0.2 s; and it needs FFmpeg's libraries on the machine, which PyAV brings along.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

from ..errors import InputError
from . import sampling

Report = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""
Send = Callable[[np.ndarray, float, int], None]
"""Called with a kept frame, (H, W, 3) uint8 RGB, its time in seconds, and how many there will be."""
THUMBNAIL = 32
"""Height and width in pixels of the grey pictures that scene changes are found on."""
NEAR = 32
"""A keyframe no more frames ahead than this is reached by decoding on: the threads of the decoder are there already."""


@dataclass(frozen=True, eq=False)
class FrameTable:
    """What the packets of a file tell about its frames; nothing was decoded for it.

    Args:
        times: (N,) int64, ascending: when each frame is shown, in units of `time_base`.
        keyframes: (K,) int64, ascending: those of `times` at which decoding can start.
        time_base: seconds.
        has_times: frames carry these times; otherwise (AVI) the n-th decoded frame has the n-th time.
        fps: frames per second, on average.
        declared: frames that the file says it has, 0 where it does not say.
    """

    times: np.ndarray
    keyframes: np.ndarray
    time_base: float
    has_times: bool
    fps: float
    declared: int

    @property
    def seconds(self) -> np.ndarray:
        """(N,) float64 from the start of the video."""
        return (self.times - self.times[0]) * self.time_base


class VideoFile:
    """A video file, its frame table, and a decoder that goes from wanted frame to wanted frame."""

    def __init__(self, path: Path, report: Report) -> None:
        """
        Raises:
            InputError: the file has no video, or no frame with a time.
            FFmpegError, OSError: the file cannot be read.
        """
        self._path, self._report = path, report
        self.n_decoded = 0
        """Packets given to the decoder so far."""
        self._open()
        self.table = self._read_table()

    def _open(self) -> None:
        local = {"protocol_whitelist": "file"}  # a playlist reaches no network
        self._container = av.open(str(self._path.absolute()), options=local)
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise InputError(f"{self._path} has no video stream: give a file with pictures")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"

    def close(self) -> None:
        self._container.close()

    def _packets(self, stage: str) -> Iterator[Any]:
        """The packets of the stream, then the empty one that flushes the decoder; damage in the file ends them."""
        try:
            for n, packet in enumerate(self._container.demux(self._stream)):
                self._report(stage, n, self._stream.frames)
                yield packet
        except av.error.InvalidDataError:
            return

    def _read_table(self) -> FrameTable:
        rows = [(p.pts, p.dts, p.is_keyframe) for p in self._packets("read") if p.size and not p.is_discard]
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
        return FrameTable(times, keyframes, time_base, has_times, fps, self._stream.frames)

    def frames(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """The frames at `wanted`, ascending indices into the table, with their index; those that cannot be decoded
        are left out."""
        times, keyframes = self.table.times, self.table.keyframes
        if not self.table.has_times:
            self._reopen()
            chosen = set(wanted.tolist())
            yield from (
                (n, frame) for n, frame in zip(range(wanted[-1] + 1), self._decode(), strict=False) if n in chosen
            )
            return
        frame, decoder, position = None, iter(()), 0
        for index in wanted:
            target = int(times[index])
            key = int(np.searchsorted(keyframes, target, side="right")) - 1
            if frame is None or (key >= 0 and keyframes[key] > times[min(position + NEAR, len(times) - 1)]):
                frame, decoder = self._start_before(target, keyframes[max(key - 1, 0) : key + 1])
            while frame is not None and frame.pts < target:
                frame = next(decoder, None)
            position = index
            if frame is not None and frame.pts == target:
                yield int(index), frame

    def _start_before(self, target: int, keyframes: np.ndarray) -> tuple[Any, Iterator[Any]]:
        """The first frame from the last of `keyframes`, and the decoder behind it. A container whose seek goes past
        `target` is read from an earlier keyframe, or else from its start."""
        for keyframe in keyframes[::-1]:
            try:
                self._container.seek(int(keyframe), stream=self._stream)
            except (av.error.FFmpegError, OSError):
                break
            decoder = self._decode()
            frame = next(decoder, None)
            if frame is not None and frame.pts <= target:
                return frame, decoder
        self._reopen()
        decoder = self._decode()
        return next(decoder, None), decoder

    def _reopen(self) -> None:
        self.close()
        self._open()

    def _decode(self, only_keyframes: bool = False) -> Iterator[Any]:
        for packet in self._packets("decode"):
            if only_keyframes and packet.size and not packet.is_keyframe:
                continue
            self.n_decoded += packet.size > 0
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:  # damage in one frame
                continue
            yield from (frame for frame in decoded if frame.pts is not None or not self.table.has_times)

    def scene_cuts(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where scenes begin, found between keyframes where there are at least 2 * `count` of them (an encoder starts
        a scene with one), else between all frames.

        Returns:
            (C,) int64 ascending indices into the table; (C,) float64 differences to the picture before.
        """
        sparse = self.table.has_times and len(self.table.keyframes) >= 2 * count
        self._reopen()
        indices, strengths, before = [], [], None
        for n, frame in enumerate(self._decode(only_keyframes=sparse)):
            index = int(np.searchsorted(self.table.times, frame.pts)) if self.table.has_times else n
            small = frame.reformat(THUMBNAIL, THUMBNAIL, "gray", interpolation="AREA").to_ndarray().astype(np.float64)
            difference = 0.0 if before is None else float(np.abs(small - before).mean()) / 255
            before = small
            if difference >= sampling.SCENE_THRESHOLD and 0 < index < len(self.table.times):
                indices.append(index)
                strengths.append(difference)
        return np.array(indices, dtype=np.int64), np.array(strengths)

    def picture(self, frame: Any) -> np.ndarray:
        """(H, W, 3) uint8 RGB as a player shows it: upright, with square pixels."""
        ratio = self._stream.sample_aspect_ratio
        width = max(round(frame.width * ratio), 1) if ratio else frame.width
        pixels = frame.reformat(width, frame.height, "rgb24").to_ndarray()
        side = frame.side_data.get(SideData.DISPLAYMATRIX)
        if side is not None:
            return apply_display_matrix(pixels, np.frombuffer(bytes(side), dtype=np.int32)[:9].reshape(3, 3))
        tags = {name.lower(): value for name, value in self._stream.metadata.items()}
        turns = {"90": 1, "180": 2, "270": 3}.get(tags.get("rotate", ""), 0)  # clockwise; before FFmpeg had the matrix
        return np.rot90(pixels, -turns)


def apply_display_matrix(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turns and mirrors `pixels` by quarter turns as FFmpeg's display matrix says (libavutil/display.h).

    Args:
        pixels: (H, W, 3).
        matrix: (3, 3) int32; a pixel at (x, y) is shown at (a x + c y, b x + d y), a to d by rows.

    Returns:
        a view of `pixels`, (H, W, 3) or (W, H, 3); other angles are rounded to the nearest quarter turn.
    """
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        to_right, down = a, d
    else:
        pixels, to_right, down = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if to_right < 0 else 1]


def decode_video(path: Path, choice: sampling.Choice, report: Report, send: Send) -> dict[str, Any]:
    """Calls `send` with each kept frame; returns the other fields of `VideoClip`.

    Raises:
        InputError: the file is no video or no frame can be decoded.
    """
    try:
        with closing(VideoFile(path, report)) as file:
            table = file.table
            seconds = table.seconds
            choice.check_known_times(seconds, path)
            wanted, indices = _choose(file, choice), []
            for index, frame in file.frames(wanted):
                send(file.picture(frame), float(seconds[index]), len(wanted))
                indices.append(index)
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}): check the file, or convert it to MP4") from error
    if not indices:
        raise InputError(f"{path} holds no frame that can be decoded: check the file, or convert it to MP4")
    notes = []
    if table.declared > len(table.times):
        notes.append(f"cut short: {len(table.times)} of the {table.declared} frames that it declares can be read")
    if len(indices) < len(wanted):
        notes.append(
            f"damaged: {len(wanted) - len(indices)} of {len(wanted)} frames cannot be decoded and are left out"
        )
    return {
        "timestamps": seconds[indices].tolist(),
        "indices": indices,
        "n_source_frames": len(table.times),
        "source_fps": table.fps,
        "n_decoded": file.n_decoded,
        "notes": notes,
    }


def _choose(file: VideoFile, choice: sampling.Choice) -> np.ndarray:
    seconds = file.table.seconds
    if choice.indices is not None:
        return sampling.check_indices(choice.indices, len(seconds))
    count = choice.count(seconds)
    if choice.sampling == "scene":
        return sampling.by_scene(seconds, *file.scene_cuts(count), count)
    return sampling.uniform(seconds, count)
