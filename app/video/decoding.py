"""Frames out of a video file by PyAV; runs in the child of process.py.

Of a long video only what lies between a wanted frame and the keyframe before it is decoded. Damage is looked for where
it costs nothing: in what the reading of all packets finds, in what FFmpeg says of the frames that are decoded anyway,
and in what the container promises (docs/video.md). Why not torchcodec: docs/design/video.md.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from ...integrations.errors import InputError
from . import limits
from .damage import Messages, ends_well
from .sampling import SCENE_THRESHOLD, Progress, Request
from .views import letterbox

SAYS_DURATION = frozenset({"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "flv", "asf"})
"""Containers whose header says how long they last; of others FFmpeg estimates it."""
SHORTER = 0.5
"""Seconds by which a file ends too soon from which it is cut short."""
THUMBNAIL = 32
"""Height and width in pixels of the grey pictures that scene changes are found on."""
NEAR = 32
"""A keyframe no more frames ahead than this is reached by decoding on: the threads of the decoder are there already."""


_BOUNDS = {"max_pixels": str(limits.SOURCE_PIXELS)}


def open_container(path: Path, **options: str) -> Any:
    """A file that nobody has looked at, by PyAV; a playlist in it reaches no network."""
    options |= {"protocol_whitelist": "file", **_BOUNDS}
    return av.open(str(path.absolute()), options=options, metadata_errors="replace")


class VideoFile:
    """A video file: what its packets tell about its frames, and a decoder that goes from wanted frame to wanted frame.

    Attributes:
        times: (N,) int64, ascending: when each frame is shown, in units of the stream's time base.
        seconds: (N,) float64: the same from the start of the video.
        start: seconds of the first of them on the clock of the file.
        keyframes: (K,) int64, ascending: those of `times` at which decoding can start.
        has_times: frames carry these times; otherwise (AVI) the n-th decoded frame has the n-th time.
        fps: frames per second, on average.
        damage: why the file is taken to be cut short or damaged; empty where it is not.
        picture_bytes: of a decoded frame.
        n_decoded, n_failed: packets given to the decoder so far, and those of them that gave an error.
        scaled: notes of how frames were scaled so far.
    """

    def __init__(self, path: Path, report: Progress, messages: Messages | None = None) -> None:
        """
        Args:
            messages: FFmpeg's; None where nobody reads them.

        Raises:
            InputError: the file has no video, no frame with a time, or frames that are too large.
            FFmpegError, OSError: the file cannot be read.
        """
        self._path, self._report, self._messages = path, report, messages
        self.n_decoded = self.n_failed = 0
        self.scaled = dict[str, bool]()
        self._reformatter = VideoReformatter()
        self._broke_off = False
        self._container: Any = None
        self._open()
        self._read_packets()

    def _open(self, **options: str) -> None:
        """Opens the file, from its start where it is open."""
        self.close()
        self._container = open_container(self._path, **options)
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
        context.options = _BOUNDS | {"err_detect": "crccheck"}
        context.thread_type = "AUTO"
        context.thread_count = limits.threads(self.picture_bytes)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    def problems(self, decoder: bool = True) -> list[str]:
        """What FFmpeg has said so far about damage in the container, and with `decoder` in what was decoded since the
        last call."""
        if self._messages is None:
            return []
        codec = self._stream.codec_context.codec
        self._messages.collect({self._container.format.name, *((codec.name, codec.canonical_name) if decoder else ())})
        return self._messages.found

    def _packets(self, stage: str) -> Iterator[Any]:
        """The packets of the stream, then the empty one that flushes the decoder; damage in the file ends them."""
        total = self._stream.frames
        try:
            for n, packet in enumerate(self._container.demux(self._stream)):
                self._report(stage, n, total)
                yield packet
        except av.error.InvalidDataError:
            self._broke_off = True

    def _read_packets(self) -> None:
        rows, n_packets, n_corrupt, end = [], 0, 0, 0
        for packet in self._packets("read"):
            pts, dts, size = packet.pts, packet.dts, packet.size
            n_packets += dts is not None or size > 0
            n_corrupt += packet.is_corrupt
            if size and not packet.is_discard:
                rows.append((pts, dts, packet.is_keyframe))
                end = max(end, (pts or dts or 0) + (packet.duration or 0))
        self.problems(decoder=False)  # a recording that begins in the middle is no damage
        self.has_times = all(pts is not None for pts, _, _ in rows)
        column = 0 if self.has_times else 1
        rows = [row for row in rows if row[column] is not None]
        if not rows:
            raise InputError(
                f"{self._path} holds no frame with a timestamp: give a video with at least one (a bare stream has to "
                "be put into a container first: ffmpeg -i FILE out.mp4)"
            )
        self.times = np.unique(np.array([row[column] for row in rows], dtype=np.int64))
        self.keyframes = np.unique(np.array([row[column] for row in rows if row[2]], dtype=np.int64))
        time_base = float(self._stream.time_base or 1)
        self.start = float(self.times[0] * time_base)
        self.seconds = (self.times - self.times[0]) * time_base
        span = self.seconds[-1]
        self.fps = float((len(self.times) - 1) / span if span > 0 else self._stream.average_rate or 1)
        self.damage = self._cut_short(n_packets, end * time_base, np.diff(self.seconds).max(initial=0))
        if n_corrupt and not self.damage:
            self.damage = f"damaged: {n_corrupt} of {n_packets} packets are incomplete"

    def _cut_short(self, n_packets: int, end: float, gap: float) -> str:
        """Why the file does not hold what it promises; empty where it does. Edit lists may hide frames, and other
        streams may last longer: where it looks as if something were missing, all that there is is read again.

        Args:
            n_packets: that were read of the video.
            end: of the last frame, in seconds.
            gap: seconds between frames, at most.
        """
        name, declared = self._container.format.name, self._stream.frames
        if not ends_well(self._path, name):
            return "cut short or damaged: its end is missing"
        if name == "avi":  # it declares frames, and repeats of them where there are gaps
            tick = float(self._stream.time_base or 0)
            promised, missing = declared * tick, 2 * gap if gap > 1.5 * tick else 0.5 * tick
        else:
            promised = (self._container.duration or 0) / av.time_base if name in SAYS_DURATION else 0.0
            missing = max(SHORTER, 2 * gap)
            if n_packets < declared:
                n_packets, _ = self._read_again(ignore_editlist="1")
            if n_packets < declared:
                return f"cut short: {n_packets} of the {declared} frames that it declares can be read"
        if end + missing < promised:
            _, end = self._read_again()
        if end + missing < promised:
            return f"cut short: it says that it lasts {promised:.1f} s, and ends at {end:.1f} s"
        return "cut short: reading it ended with an error" if self._broke_off else ""

    def _read_again(self, **options: str) -> tuple[int, float]:
        """How many packets of the video there are, and when the last packet of any stream ends."""
        self._open(**options)
        n_packets, end = 0, 0.0
        with suppress(av.error.InvalidDataError):
            for n, packet in enumerate(self._container.demux()):
                self._report("read", n, 0)
                n_packets += packet.stream is self._stream and (packet.dts is not None or packet.size > 0)
                start = packet.dts if packet.pts is None else packet.pts
                if start is not None:
                    end = max(end, float((start + (packet.duration or 0)) * packet.time_base))
        self._open()
        return n_packets, end

    def frames(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """The frames at `wanted`, ascending indices into `times`, with their index; those that cannot be decoded are
        left out."""
        times, keyframes = self.times, self.keyframes
        if not self.has_times:
            self._open()
            counted = zip(range(wanted[-1] + 1), self._decode(), strict=False)
            chosen = set(wanted.tolist())
            yield from ((n, frame) for n, frame in counted if n in chosen)
            return
        frame, decoder, position = None, iter(()), 0
        for index in wanted.tolist():
            target = int(times[index])
            key = int(np.searchsorted(keyframes, target, side="right")) - 1
            if frame is None or (key >= 0 and keyframes[key] > times[min(position + NEAR, len(times) - 1)]):
                frame, decoder = self._start_before(target, keyframes[max(key - 1, 0) : key + 1])
            while frame is not None and frame.pts < target:
                frame = next(decoder, None)
            position = index
            if frame is not None and frame.pts == target:
                yield index, frame

    def _start_before(self, target: int, keyframes: np.ndarray) -> tuple[Any, Iterator[Any]]:
        """The first frame from the last of `keyframes`, and the decoder behind it. A container whose seek goes past
        `target` is read from an earlier keyframe, or else from its start."""
        self.problems()
        for keyframe in keyframes[::-1]:
            try:
                self._container.seek(int(keyframe), stream=self._stream)
            except (av.error.FFmpegError, OSError):
                break
            decoder = self._decode(after_seek=True)
            frame = next(decoder, None)
            if frame is not None and frame.pts <= target:
                return frame, decoder
        self._open()
        decoder = self._decode()
        return next(decoder, None), decoder

    def _decode(self, only_keyframes: bool = False, after_seek: bool = False) -> Iterator[Any]:
        """Frames from the next keyframe on. What refers to frames before it cannot be decoded, and is no damage: the
        packets until then, and after a seek those that follow it and are shown before it."""
        start = None
        for packet in self._packets("decode"):
            if packet.size and self.has_times:
                if start is None and (packet.is_keyframe or not len(self.keyframes)):
                    start = packet.pts
                    self.problems(decoder=False)
                if start is None or (after_seek and packet.pts < start):
                    continue
            if only_keyframes and packet.size and not packet.is_keyframe:
                continue
            self.n_decoded += packet.size > 0
            try:
                decoded = packet.decode()
            except (MemoryError, BlockingIOError):
                raise
            except av.error.FFmpegError:  # damage in one frame
                self.n_failed += not only_keyframes
                continue
            yield from (frame for frame in decoded if frame.pts is not None or not self.has_times)
        self.problems(decoder=not only_keyframes)

    def scene_cuts(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where scenes begin, found between keyframes where there are at least 2 * `count` of them (an encoder starts
        a scene with one), else between all frames.

        Returns:
            (C,) int64 ascending indices into `times`; (C,) float64 differences to the picture before.
        """
        sparse = self.has_times and len(self.keyframes) >= 2 * count
        self._open()
        cuts, before = dict[int, float](), None
        for n, frame in enumerate(self._decode(only_keyframes=sparse)):
            index = int(np.searchsorted(self.times, frame.pts)) if self.has_times else n
            small = self._reformatter.reformat(frame, THUMBNAIL, THUMBNAIL, "gray", interpolation="AREA")
            small = small.to_ndarray().astype(np.float64)
            difference = 0.0 if before is None else float(np.abs(small - before).mean()) / 255
            before = small
            if difference >= SCENE_THRESHOLD and 0 < index < len(self.times):
                cuts[index] = difference
        return np.array([*cuts], dtype=np.int64), np.array([*cuts.values()])

    def picture(self, frame: Any, max_pixels: int = limits.MAX_PIXELS) -> np.ndarray:
        """(H, W, 3) uint8 RGB as a player shows it: upright, with square pixels, scaled to at most `max_pixels`."""
        ratio = self._stream.sample_aspect_ratio
        shown = (max(round(frame.width * ratio), 1) if ratio else frame.width), frame.height
        width, height = limits.bounded(*shown, max_pixels)
        if shown != (width, height):
            sizes = f"{shown[0]} x {shown[1]} pixels scaled to {width} x {height}"
            self.scaled[f"frames of {sizes} (--max-pixels {max_pixels})"] = True
        pixels = self._reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
        side = frame.side_data.get(SideData.DISPLAYMATRIX)
        if side is not None:
            return apply_display_matrix(pixels, np.frombuffer(bytes(side), dtype=np.int32)[:9].reshape(3, 3))
        tags = {name.lower(): value for name, value in self._stream.metadata.items()}
        turns = {"90": 1, "180": 2, "270": 3}.get(tags.get("rotate", ""), 0)  # clockwise; before FFmpeg had the matrix
        return np.rot90(pixels, -turns)


def apply_display_matrix(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A view of `pixels`, (H, W, 3) or (W, H, 3), turned and mirrored by quarter turns as FFmpeg's display matrix says:
    a pixel at (x, y) is shown at (a x + c y, b x + d y). Other angles are rounded (libavutil/display.h)."""
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        to_right, down = a, d
    else:
        pixels, to_right, down = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if to_right < 0 else 1]


def decode_video(request: Request, report: Progress, send: Callable[..., None]) -> dict[str, Any]:
    """Calls `send` with "frame", each kept one, its time and how many there will be; returns the other fields of the
    clip. Frames of a size unlike the first's are scaled into it, with black bars. Bounds the memory of this process.

    Raises:
        InputError: the file is no video, no frame can be decoded, or it is damaged and that is to be refused.
        MemoryError: it takes more than that.
    """
    path, max_pixels = request.source, request.max_pixels
    assert isinstance(path, Path)  # images are read by views.py
    n_corrupt, n_resized, size, indices = 0, 0, None, list[int]()
    try:
        with closing(VideoFile(path, report, Messages())) as file:
            limits.limit_process(file.picture_bytes)
            gc.freeze()
            wanted = request.frames(file.seconds, file.scene_cuts)
            for index, frame in file.frames(wanted):
                gc.collect()  # a frame and its side data refer to each other: those before this one would pile up
                picture = file.picture(frame, max_pixels)
                size = size or picture.shape[:2]
                n_resized += picture.shape[:2] != size
                pixels = np.ascontiguousarray(letterbox(picture, *size))
                send("frame", pixels, float(file.seconds[index]), len(wanted))
                indices.append(index)
                n_corrupt += frame.is_corrupt
            problems = file.problems()
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}): check the file, or convert it to MP4") from error
    if not indices:
        most = f"of at most {limits.SOURCE_PIXELS:,} pixels"
        raise InputError(f"{path} holds no frame that can be decoded, {most}: check the file, or convert it to MP4")
    left_out = np.setdiff1d(wanted, indices)
    n_before = int((file.times[left_out] < file.keyframes.min(initial=file.times[-1])).sum())
    n_lost = len(left_out) - n_before
    damage: dict[str, Any] = {
        file.damage: file.damage,
        f"damaged: {n_lost} of {len(wanted)} frames cannot be decoded and are left out": n_lost,
        "damaged: frames between those that are kept cannot be decoded": file.n_failed and not n_lost,
        f"damaged: the decoder marks {n_corrupt} of {len(indices)} frames as corrupt": n_corrupt,
        f"damaged: FFmpeg reports: {''.join(problems[:1])}": problems,
    }
    if request.strict and any(damage.values()):
        raise InputError(f"{path} is refused (--strict): {'; '.join(note for note in damage if damage[note])}")
    notes = damage | file.scaled
    notes[f"it begins in the middle: {n_before} of {len(wanted)} frames are before its first keyframe"] = n_before
    notes[f"{n_resized} frames of another size scaled into the first's with black bars"] = n_resized
    return {
        "timestamps": file.seconds[indices],
        "indices": np.array(indices),
        "n_source_frames": len(file.times),
        "source_fps": file.fps,
        "n_decoded": file.n_decoded,
        "notes": tuple(note for note, holds in notes.items() if holds),
    }
