"""Makes docs/gallery, with the picture of README.md: what the commands draw of clips made here. Needs Chromium.

python benchmarks/pages/gallery.py
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.pages.in_browser import command_of, find_chromium
from videoanchor_triton.app import cli
from videoanchor_triton.app.room_scan_demo import SEED
from videoanchor_triton.app.room_scans import CHECKPOINT, COLOURS, FPS, SHAPES, RoomScan
from videoanchor_triton.app.video.reader import write_video

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "gallery"
SIZE = (1280, 1020)
"""Of the README's picture, in pixels."""
CHOOSE = """
const box = document.querySelector("#stage canvas").getBoundingClientRect();
document.getElementById("stage").dispatchEvent(new MouseEvent("click", { bubbles: true,
  clientX: box.left + box.width * COLUMN, clientY: box.top + box.height * ROW }));
"""
KEPT = {
    "demo": {
        "viz.html": "demo.html",
        "anchors.png": "anchors.webp",
        "affinity.png": "affinity.webp",
        "attention.png": "attention.webp",
        "frames/0004_scores.png": "frame-scores.webp",
        "frames/0004_subspaces.png": "frame-subspaces.webp",
    },
    "room": {"viz.html": "room.html", "subspaces.png": "room-subspaces.webp"},
    "cuts": {"viz.html": "cuts.html", "subspaces.png": "cuts-subspaces.webp", "affinity.png": "cuts-affinity.webp"},
    "two": {"viz.html": "two.html", "subspaces.png": "two-subspaces.webp"},
}
"""What of a run's pictures is kept, and under which name."""


Clips = Sequence[np.ndarray]
"""Frames (T, H, W, 3) uint8 of each video of a prompt."""


def room() -> tuple[Clips, str, str]:
    """Frames of a scan, a question about it and the right answer."""
    scan = RoomScan(SEED)
    asked = next(one for one in scan.questions() if one.kind == "first")
    return [scan.frames], asked.text, asked.answer


def cuts() -> tuple[Clips, str, str]:
    """A scan with another in its middle; asked for is what only the other shows."""
    (first, other), question, truth = two()
    return [np.concatenate([first[:4], other, first[4:]])], question, truth


def two() -> tuple[Clips, str, str]:
    """Two scans, each a video; asked for is what only the second shows."""
    first, other = RoomScan(SEED), RoomScan(SEED + 5)
    known = first.objects.tolist()
    colour, shape = next(pair for pair in other.objects.tolist() if pair not in known)
    return [first.frames, other.frames], f"Is there a {list(COLOURS)[colour]} {SHAPES[shape]}?", "yes"


def command(*words: object) -> None:
    """`videoanchor` with these words.

    Raises:
        SystemExit: it failed.
    """
    if code := cli.main([str(word) for word in words]):
        raise SystemExit(code)


def asked_about(name: str, clips: Clips, question: str, truth: str, folder: Path) -> Path:
    """A run of the trained model on these clips.

    Raises:
        SystemExit: its answer is not the truth.
    """
    out, videos = folder / name, [folder / f"{name}{n}.mp4" for n in ([""] if len(clips) == 1 else range(1, 3))]
    for video, frames in zip(videos, clips, strict=True):
        write_video(video, frames, FPS)
    files = ("--model", CHECKPOINT, "--video", *videos, "--question", question, "--out", out)
    gate = ("--alpha-k", 1, "--alpha-v", 0, "--n-clusters", 12, "--pca-rank", 32)
    command("run", *files, *gate, "--max-frames", len(clips[0]), "--max-new-tokens", 4)
    answer = json.loads((out / "result.json").read_text())["answer"]
    if answer != truth:
        raise SystemExit(f"{name}: {question} {answer!r}, and the truth is {truth!r}: show another question")
    return out


def screenshot(page: Path, row: float, column: float, to: Path) -> None:
    """Of a page after a click at this part of the frame's height and width."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        script = CHOOSE.replace("COLUMN", str(column)).replace("ROW", str(row))
        shot = Path(folder, "shot.png")
        options = (f"--screenshot={shot}", f"--window-size={SIZE[0]},{SIZE[1]}", "--hide-scrollbars")
        text = page.read_text(encoding="utf-8")
        command_line = command_of(find_chromium(), text, script, Path(folder), *options)
        subprocess.run(command_line, check=True, stderr=subprocess.DEVNULL)
        save_small(shot, to)


def save_small(picture: Path, to: Path) -> None:
    """As WebP, at most 1,600 pixels wide."""
    with Image.open(picture) as found:
        small = found.convert("RGB")
        small.thumbnail((1600, 10_000))
        small.save(to, quality=88, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: docs/gallery")
    args = parser.parse_args()
    find_chromium()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command("demo", "--out", folder / "demo")
        runs = {"demo": folder / "demo"}
        runs |= {make.__name__: asked_about(make.__name__, *make(), folder) for make in (room, cuts, two)}
        for name, run in runs.items():
            command("viz", run, "--what", "page,sheet,montage,frames,affinity,attention")
            for made, kept in KEPT[name].items():
                if made.endswith(".png"):
                    save_small(run / "viz" / made, args.out / kept)
                else:
                    shutil.copy(run / "viz" / made, args.out / kept)
    screenshot(args.out / "room.html", 0.25, 0.75, args.out / "page.webp")
    kilobytes = sum(path.stat().st_size for path in args.out.iterdir()) // 1000
    print(f"{args.out}: {len([*args.out.iterdir()])} files, {kilobytes} kB")


if __name__ == "__main__":
    main()
