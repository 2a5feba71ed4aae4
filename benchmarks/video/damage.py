"""Of damaged videos that are read, how many say so?

    python benchmarks/video/damage.py --out DIR [--files N] [--quick]

A short pan over a photograph is written in every format of `SEEDS`; each file is damaged in five ways, N times each,
at places drawn at random, and eight frames are read. A file is "changed" where a frame that came back is not, pixel for
pixel, the original's of the same time, or is missing, or where the file was taken for shorter or longer. It is
"noted" where `VideoClip.notes` is not empty, "refused" where there is an error. The whole files have to be read
without a note.

Writes DIR/video-damage.csv, .json and .md.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from videoanchor_triton.app.video.reader import VideoClip, read_video
from videoanchor_triton.integrations.errors import InputError

NAME = "video-damage"
FRAMES, HEIGHT, WIDTH = 80, 120, 160
SEEDS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "H.264, mp4": ("mp4", "libx264", "yuv420p", {"bf": "2"}),
    "H.264, mov, index first": ("mov", "libx264", "yuv420p", {"bf": "2", "movflags": "faststart"}),
    "H.264, mkv": ("mkv", "libx264", "yuv420p", {"bf": "2"}),
    "H.264, ts": ("ts", "libx264", "yuv420p", {"bf": "2"}),
    "HEVC, mp4": ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "MPEG-4, mp4": ("mp4", "mpeg4", "yuv420p", {"b": "400000"}),
    "MPEG-4, avi": ("avi", "mpeg4", "yuv420p", {"b": "400000"}),
    "Motion JPEG, avi": ("avi", "mjpeg", "yuvj420p", {}),
    "VP8, webm": ("webm", "libvpx", "yuv420p", {"b": "400000", "deadline": "realtime"}),
    "VP9, webm": ("webm", "libvpx-vp9", "yuv420p", {"b": "400000", "deadline": "realtime"}),
    "AV1, mp4": ("mp4", "libsvtav1", "yuv420p", {"preset": "12"}),
    "GIF": ("gif", "gif", "rgb8", {}),
}
"""Container, encoder, pixel format, options."""


@dataclass(frozen=True)
class Row:
    """What became of the files of one format that were damaged in one way."""

    format: str
    damage: str
    files: int
    refused: int = 0
    changed: int = 0
    changed_noted: int = 0
    same_noted: int = 0


def write_seed(path: Path, codec: str, pixels: str, options: dict[str, str]) -> None:
    photo = np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((3 * WIDTH, 2 * HEIGHT)))
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=10, options={"g": "20", **options})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for n in range(FRAMES):
            view = np.ascontiguousarray(photo[n : n + HEIGHT, 3 * n : 3 * n + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode(None))


def bytes_at_random(data: bytearray, generator: np.random.Generator, n: int) -> None:
    for place in generator.integers(len(data) // 10, len(data), n):
        data[place] = generator.integers(256)


def zeros(data: bytearray, generator: np.random.Generator) -> None:
    start = int(generator.integers(len(data) // 10, len(data) - 400))
    data[start : start + 400] = bytes(400)


def hole(data: bytearray, generator: np.random.Generator) -> None:
    start = int(generator.integers(len(data) // 10, len(data) - 400))
    del data[start : start + 400]


def cut(data: bytearray, generator: np.random.Generator) -> None:
    del data[int(generator.uniform(0.2, 0.98) * len(data)) :]


DAMAGE: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "200 bytes": lambda data, generator: bytes_at_random(data, generator, 200),
    "5 bytes": lambda data, generator: bytes_at_random(data, generator, 5),
    "400 zeros": zeros,
    "400 bytes missing": hole,
    "cut": cut,
}


def same(clip: VideoClip, whole: VideoClip) -> bool:
    return np.array_equal(clip.timestamps, whole.timestamps) and np.array_equal(clip.frames, whole.frames)


def measure(name: str, folder: Path, n_files: int) -> list[Row]:
    """Raises ValueError where the whole file has a note."""
    suffix, codec, pixels, options = SEEDS[name]
    path = folder / f"seed.{suffix}"
    write_seed(path, codec, pixels, options)
    whole, data = read_video(path, max_frames=8), path.read_bytes()
    if whole.notes or len(whole.frames) != 8:
        raise ValueError(f"{name}: the whole file has {len(whole.frames)} frames and the notes {whole.notes}")
    rows = []
    for number, (damage, apply) in enumerate(DAMAGE.items()):
        counts = {"refused": 0, "changed": 0, "changed_noted": 0, "same_noted": 0}
        for n in range(n_files):
            damaged = bytearray(data)
            apply(damaged, np.random.default_rng((number, n)))
            path.write_bytes(damaged)
            try:
                clip = read_video(path, max_frames=8, timeout=30)
            except InputError:
                counts["refused"] += 1
                continue
            kind = "same" if same(clip, whole) else "changed"
            if kind == "changed":
                counts["changed"] += 1
            if clip.notes:
                counts[f"{kind}_noted"] += 1
        rows.append(Row(name, damage, n_files, **counts))
    return rows


def summary(rows: list[Row]) -> str:
    def total(of: list[Row], damage: str) -> Row:
        numbers = ("files", "refused", "changed", "changed_noted", "same_noted")
        return Row(of[0].format, damage, *(sum(getattr(row, number) for row in of) for number in numbers))

    formats = [
        total([row for row in rows if row.format == name], "all") for name in dict.fromkeys(r.format for r in rows)
    ]
    columns: dict[str, Callable[[Row], object]] = {
        "format": lambda row: row.format,
        "damage": lambda row: row.damage,
        "files": lambda row: row.files,
        "refused": lambda row: row.refused,
        "changed": lambda row: row.changed,
        "changed and noted": lambda row: row.changed_noted,
        "unchanged and noted": lambda row: row.same_noted,
    }
    everything = total(rows, "all")
    said = (
        f"Of {everything.files} damaged files {everything.refused} are refused; {everything.changed} are read and "
        f"changed, {everything.changed_noted} of them with a note. No whole file has one."
    )
    tables = f"{report.table(formats, columns)}\n\n{report.table(rows, columns)}"
    return f"# Damaged videos: what is said about them\n\n{said}\n\n{tables}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--files", type=int, default=6, help="of each format and damage; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one file of one format, to see that everything runs")
    options = parser.parse_args(arguments)
    names, n_files = (list(SEEDS)[2:3], 1) if options.quick else (list(SEEDS), options.files)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = measure(name, Path(folder), n_files)
            rows += found
            print(
                name,
                *(f"{row.damage}: {row.changed_noted} of {row.changed} noted" for row in found),
                sep=", ",
                flush=True,
            )
    measured_on = environment(torch.device("cpu"), processor()) | {
        "av": av.__version__,
        "FFmpeg": av.ffmpeg_version_info,
    }
    report.write(options.out, NAME, measured_on, rows, summary(rows))
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
