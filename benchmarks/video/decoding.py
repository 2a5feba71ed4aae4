"""Is torchcodec faster than the package's own video reading, which is PyAV in a process of its own?

    python benchmarks/video/decoding.py --out DIR [--quick]

A camera pans over two photographs with grain: H.264 with three B-frames, a keyframe every 30 s in one file and every
2 s in the other. Frames in the middles of equal shares of the duration are read by their indices, each time from
opening the file to their pixels:

    read_video    what the commands use: a child process, and the pixels through a pipe
    VideoFile     the same decoding without the process
    torchcodec    VideoDecoder and get_frames_at without a process, by seek mode; as in VideoFile FFmpeg chooses how
                  many threads decode

The time of every frame has to be that of `read_video`, to 1 microsecond, and its pixels within 2 of 255 (versions of
FFmpeg round differently); a contender for which this is not so gets no time. torchcodec needs FFmpeg's libraries. What
a child process with torchcodec would wait for its imports is measured apart.

Writes DIR/video-decoding.csv, .json and .md.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from videoanchor_triton.app.video import sampling
from videoanchor_triton.app.video.decoding import VideoFile
from videoanchor_triton.app.video.reader import read_video

NAME = "video-decoding"
FPS = 20
KEYFRAME_SECONDS = (30, 2)
OURS = "VideoFile"
Found = tuple[np.ndarray, np.ndarray]
"""(T,) float64 seconds and (T, H, W, 3) uint8."""


@dataclass(frozen=True)
class Row:
    """One contender on one file. `seconds` is the median of the runs, `cpu_seconds` that of the processors' time in all
    threads and processes, which says more where other programs run; `speedup` and `cpu_speedup` are those of VideoFile
    over it."""

    keyframe_seconds: int
    frames: int
    contender: str
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    cpu_seconds: float | None = None
    speedup: float | None = None
    cpu_speedup: float | None = None
    reason: str = ""


def write_clip(path: Path, seconds: int, height: int, keyframe_seconds: int) -> None:
    """A pan over two photographs in turn, 10 s each, with grain that changes from frame to frame."""
    width = height * 16 // 9
    generator = np.random.default_rng(0)
    images = [Image.fromarray(photo).resize((2 * width, height * 5 // 4)) for photo in load_sample_images().images]
    photos = [np.asarray(image, dtype=np.int16) for image in images]
    grain = generator.normal(0, 4, (2 * height, 2 * width, 1)).astype(np.int16)
    group = str(keyframe_seconds * FPS)
    options = {"preset": "veryfast", "crf": "23", "bf": "3", "g": group, "keyint_min": group, "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for n in range(seconds * FPS):
            across, y, x = (n * width // (10 * FPS)) % width, *generator.integers(0, height, 2)
            view = photos[n // (10 * FPS) % 2][height // 8 :][:height, across : across + width]
            picture = (view + grain[y : y + height, x : x + width]).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def by_read_video(path: Path, indices: list[int]) -> Found:
    clip = read_video(path, indices=indices)
    return clip.timestamps, clip.frames


def by_video_file(path: Path, indices: list[int]) -> Found:
    with closing(VideoFile(path, lambda *_: None)) as file:
        frames = np.empty((0, 0, 0, 3), np.uint8)
        for n, (_, frame) in enumerate(file.frames(np.array(indices))):
            picture = file.picture(frame)
            if n == 0:
                frames = np.empty((len(indices), *picture.shape), np.uint8)
            frames[n] = picture
        return file.table.seconds[indices], frames


def by_torchcodec(path: Path, indices: list[int], *, seek_mode: Any) -> Found:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0, seek_mode=seek_mode)
    batch = decoder.get_frames_at(indices)
    return batch.pts_seconds.numpy(), batch.data.numpy()


CONTENDERS: dict[str, Callable[[Path, list[int]], Found]] = {
    "read_video": by_read_video,
    OURS: by_video_file,
    **{f"torchcodec {mode}": partial(by_torchcodec, seek_mode=mode) for mode in ("exact", "approximate")},
}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(path: Path, indices: list[int], keyframe_seconds: int, repeats: int) -> list[Row]:
    """Every contender in turn, `repeats` times."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    reasons: dict[str, str] = {}
    times, pixels = by_read_video(path, indices)
    pixels = pixels[:, ::8, ::8].astype(np.int16)
    for _ in range(repeats):
        for name in [name for name in CONTENDERS if name not in reasons]:
            try:
                start, cpu_start = time.perf_counter(), cpu_seconds()
                found_times, found_pixels = CONTENDERS[name](path, indices)
                seconds[name].append((time.perf_counter() - start, cpu_seconds() - cpu_start))
            except (ImportError, OSError, RuntimeError) as error:
                reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            if found_times.shape != times.shape or np.abs(found_times - times).max() > 1e-6:
                reasons[name] = "other times"
            elif np.abs(found_pixels[:, ::8, ::8] - pixels).max() > 2:
                reasons[name] = "other pixels"
            del found_pixels
    rows = []
    ours, cpu_ours = map(statistics.median, zip(*seconds[OURS], strict=True))
    for name, measured in seconds.items():
        if name in reasons:
            rows.append(Row(keyframe_seconds, len(indices), name, reason=reasons[name]))
            continue
        walls, cpus = zip(*measured, strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        times_of = (wall, min(walls), max(walls), cpu, ours / wall, cpu_ours / cpu)
        rows.append(Row(keyframe_seconds, len(indices), name, *times_of))
    return rows


def summary(rows: list[Row], what: str, repeats: int) -> str:
    """Markdown: what was read, and a table."""
    columns: dict[str, Callable[[Row], object]] = {
        "keyframe every (s)": lambda row: row.keyframe_seconds,
        "frames": lambda row: row.frames,
        "contender": lambda row: row.contender,
        f"seconds, median of {repeats}": lambda row: row.seconds,
        "fastest": lambda row: row.fastest,
        "slowest": lambda row: row.slowest,
        "CPU seconds": lambda row: row.cpu_seconds,
        "speed against VideoFile": lambda row: row.speedup,
        "by CPU seconds": lambda row: row.cpu_speedup,
        "why not": lambda row: row.reason,
    }
    return f"# Video reading: PyAV in a child process, and torchcodec\n\n{what}\n\n{report.table(rows, columns)}"


def import_seconds(module: str) -> float:
    """The median of three fresh interpreters, after one that is not counted; NaN if it cannot be imported."""
    measured = []
    for _ in range(4):
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode:
            return float("nan")
        measured.append(time.perf_counter() - start)
    return statistics.median(measured[1:])


def versions() -> dict[str, str]:
    """Of PyAV, torchcodec, and the FFmpeg of each."""
    found = {"av": av.__version__, "FFmpeg of av": av.ffmpeg_version_info}
    try:
        import torchcodec  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):
        return {**found, "torchcodec": "none", "FFmpeg of torchcodec": "none"}
    return {**found, "torchcodec": torchcodec.__version__, "FFmpeg of torchcodec": str(torchcodec.ffmpeg_major_version)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small clips of 4 s, to see that everything runs")
    options = parser.parse_args(arguments)
    seconds, height, counts, repeats = (4, 72, (8,), 1) if options.quick else (120, 1080, (64, 512), 3)
    measured_on = environment(torch.device("cpu"), processor()) | versions()
    rows: list[Row] = []
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for keyframe_seconds in KEYFRAME_SECONDS:
            path = Path(folder, f"{keyframe_seconds}.mp4")
            write_clip(path, seconds, height, keyframe_seconds)
            sizes.append(f"{8 * path.stat().st_size / seconds / 1e6:.1f}")
            for count in counts:
                indices = sampling.uniform(np.arange(seconds * FPS) / FPS, count).tolist()
                found = measure(path, indices, keyframe_seconds, repeats)
                rows += found
                for row in found:
                    took = row.reason or f"{row.seconds:.2f} s, {row.speedup:.2f}x, by CPU time {row.cpu_speedup:.2f}x"
                    print(f"{row.keyframe_seconds:2} s, {row.frames} frames, {row.contender}: {took}", flush=True)
    what = (
        f"{seconds} s of {height * 16 // 9} x {height} pixels, {FPS} frames a second, H.264, {' and '.join(sizes)} "
        "Mbit/s; frames by index, with the file opened each time. Times and pixels are those of read_video. A fresh "
        f"interpreter imports torchcodec in {import_seconds('torchcodec.decoders'):.2f} s, PyAV in "
        f"{import_seconds('av'):.2f} s; that is not in the table."
    )
    report.write(options.out, NAME, measured_on, rows, summary(rows, what, repeats))
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
