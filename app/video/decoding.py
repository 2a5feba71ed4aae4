"""Frames out of a video file by PyAV; runs in the child process of process.py.

Of a long video only what lies between a wanted frame and the keyframe before it is decoded.

torchcodec is not used: for the same frames of 1080p H.264, with the same times, it was 1.00 to 1.44 times as fast as
this module, by CPU time 0.96 to 1.26 times (benchmarks/results/video-decoding); a fresh process, as each video gets
here, imported it in 4.8 s and PyAV in 0.2 s; and it needs FFmpeg's libraries on the machine, which PyAV brings along.

Damage is looked for where it costs nothing: in what the reading of all packets finds, in what FFmpeg says of the frames
that are decoded anyway, and in what the container promises. There is no sign of it where a format has no redundancy:
inside the frames of VP8 and VP9, mostly not in HEVC and AV1.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from ...integrations.errors import InputError
from . import limits, sampling
from .damage import Messages
from .packets import PacketFile, Report

Send = Callable[[np.ndarray, float, int], None]
"""Called with a kept frame, (H, W, 3) uint8 RGB, its time in seconds, and how many there will be."""
THUMBNAIL = 32
"""Height and width in pixels of the grey pictures that scene changes are found on."""
NEAR = 32
"""A keyframe no more frames ahead than this is reached by decoding on: the threads of the decoder are there already."""


class VideoFile(PacketFile):
    """A video file, its frame table, and a decoder that goes from wanted frame to wanted frame."""

    def __init__(self, path: Path, report: Report, messages: Messages | None = None) -> None:
        """See `PacketFile`."""
        super().__init__(path, report, messages)
        self.n_decoded = 0
        """Packets given to the decoder so far."""
        self.n_failed = 0
        """Those of them that gave an error."""
        self._reformatter = VideoReformatter()

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
        self._heed(decoder=True)
        for keyframe in keyframes[::-1]:
            try:
                self._container.seek(int(keyframe), stream=self._stream)
            except (av.error.FFmpegError, OSError):
                break
            decoder = self._decode(after_seek=True)
            frame = next(decoder, None)
            if frame is not None and frame.pts <= target:
                return frame, decoder
        self._reopen()
        decoder = self._decode()
        return next(decoder, None), decoder

    def _decode(self, only_keyframes: bool = False, after_seek: bool = False) -> Iterator[Any]:
        """Frames from the next keyframe on. What refers to frames before it cannot be decoded, and is no damage: the
        packets until then, and after a seek those that follow it and are shown before it."""
        start = None
        for packet in self._packets("decode"):
            if packet.size and self.table.has_times:
                if start is None and (packet.is_keyframe or not len(self.table.keyframes)):
                    start = packet.pts
                    self._heed(decoder=False)
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
            yield from (frame for frame in decoded if frame.pts is not None or not self.table.has_times)
        self._heed(decoder=not only_keyframes)

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
            small = self._reformatter.reformat(frame, THUMBNAIL, THUMBNAIL, "gray", interpolation="AREA")
            small = small.to_ndarray().astype(np.float64)
            difference = 0.0 if before is None else float(np.abs(small - before).mean()) / 255
            before = small
            if difference >= sampling.SCENE_THRESHOLD and 0 < index < len(self.table.times):
                indices.append(index)
                strengths.append(difference)
        return np.array(indices, dtype=np.int64), np.array(strengths)

    def picture(self, frame: Any, max_pixels: int = limits.MAX_PIXELS) -> np.ndarray:
        """(H, W, 3) uint8 RGB as a player shows it: upright, with square pixels, scaled to at most `max_pixels`."""
        width, height = limits.bounded(*self._shown_size(frame), max_pixels)
        pixels = self._reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
        side = frame.side_data.get(SideData.DISPLAYMATRIX)
        if side is not None:
            return apply_display_matrix(pixels, np.frombuffer(bytes(side), dtype=np.int32)[:9].reshape(3, 3))
        tags = {name.lower(): value for name, value in self._stream.metadata.items()}
        turns = {"90": 1, "180": 2, "270": 3}.get(tags.get("rotate", ""), 0)  # clockwise; before FFmpeg had the matrix
        return np.rot90(pixels, -turns)

    def _shown_size(self, frame: Any) -> tuple[int, int]:
        """Width and height with square pixels, before it is turned upright."""
        ratio = self._stream.sample_aspect_ratio
        return (max(round(frame.width * ratio), 1) if ratio else frame.width), frame.height

    def scaled(self, frame: Any, max_pixels: int) -> str:
        """What `picture` does to the size; empty where it keeps it."""
        size = self._shown_size(frame)
        new = limits.bounded(*size, max_pixels)
        if new == size:
            return ""
        return f"frames of {size[0]} x {size[1]} pixels scaled to {new[0]} x {new[1]} (--max-pixels {max_pixels})"


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


def decode_video(
    path: Path,
    choice: sampling.Choice,
    max_pixels: int,
    report: Report,
    send: Send,
    messages: Messages | None = None,
) -> dict[str, Any]:
    """Calls `send` with each kept frame; returns the other fields of `VideoClip`, and of its notes under "damage" those
    that speak of damage. Bounds the memory of this process.

    Raises:
        InputError: the file is no video or no frame can be decoded.
        MemoryError: it takes more than that.
    """
    n_corrupt, notes = 0, list[str]()
    try:
        with closing(VideoFile(path, report, messages)) as file:
            limits.limit_memory(file.picture_bytes)
            gc.freeze()
            table = file.table
            seconds = table.seconds
            choice.check_known_times(seconds, path)
            wanted, indices = _choose(file, choice), []
            for index, frame in file.frames(wanted):
                gc.collect()  # a frame and its side data refer to each other: those before this one would pile up
                send(file.picture(frame, max_pixels), float(seconds[index]), len(wanted))
                indices.append(index)
                n_corrupt += frame.is_corrupt
                notes.append(file.scaled(frame, max_pixels))
            problems = file.problems
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}): check the file, or convert it to MP4") from error
    if not indices:
        most = f"of at most {limits.SOURCE_PIXELS:,} pixels"
        raise InputError(f"{path} holds no frame that can be decoded, {most}: check the file, or convert it to MP4")
    left_out = sorted({*wanted.tolist()} - {*indices})
    n_before = sum(table.times[index] < table.keyframes.min(initial=table.times[-1]) for index in left_out)
    if n_before:
        notes.append(f"it begins in the middle: {n_before} of {len(wanted)} frames are before its first keyframe")
    damage = [table.damage]
    if n_lost := len(left_out) - n_before:
        damage.append(f"damaged: {n_lost} of {len(wanted)} frames cannot be decoded and are left out")
    elif file.n_failed:
        damage.append("damaged: frames between those that are kept cannot be decoded")
    if n_corrupt:
        damage.append(f"damaged: the decoder marks {n_corrupt} of {len(indices)} frames as corrupt")
    if problems:
        damage.append(f"damaged: FFmpeg reports: {problems[0]}")
    return {
        "timestamps": seconds[indices].tolist(),
        "indices": indices,
        "n_source_frames": len(table.times),
        "source_fps": table.fps,
        "n_decoded": file.n_decoded,
        "damage": list(filter(None, damage)),
        "notes": list(dict.fromkeys(filter(None, notes))),
    }


def _choose(file: VideoFile, choice: sampling.Choice) -> np.ndarray:
    seconds = file.table.seconds
    if choice.indices is not None:
        return sampling.check_indices(choice.indices, len(seconds))
    count = choice.count(seconds)
    if choice.sampling == "scene":
        return sampling.by_scene(seconds, *file.scene_cuts(count), count)
    return sampling.uniform(seconds, count)
