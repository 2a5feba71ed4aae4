"""How long viz.html takes in a headless Chromium: to open, and for a step of its sliders until it is painted.

python benchmarks/pages/in_browser.py --out benchmarks/results/page-in-browser
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import tempfile
from base64 import b64encode
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videoanchor_triton import __version__
from videoanchor_triton.anchor.solver import SelfExpression
from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import VideoClip
from videoanchor_triton.app.viz.attention_share import SharesRecord, VisualShare
from videoanchor_triton.app.viz.finished_run import FinishedRun
from videoanchor_triton.app.viz.run_page import FromModel, run_page

GRIDS = {"2,048 tokens in all": TokenGrid(32, 8, 8), "2,048 tokens a frame": TokenGrid(32, 32, 64)}
N_FRAMES, N_LAYERS, N_HEADS = 32, 28, 28
LIMITS_MS = {"shown": 1000, "frame": 50, "opacity": 50}
_SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def made_page(grid: TokenGrid, video: Path) -> str:
    """Frames of 640 x 360 that look like photographs to the encoder, and random numbers for all that is found."""
    rng, n = np.random.default_rng(0), grid.n_tokens
    coarse = torch.from_numpy(rng.random((N_FRAMES, 3, 36, 64)))
    frames = torch.nn.functional.interpolate(coarse, (360, 640), mode="bicubic").clamp(0, 1).mul(255).byte()
    indices = np.arange(N_FRAMES)
    record = {"video": "clip.mp4", "model": "made", "question": "Where?", "answer": "left", "config": {}}
    labels, scores = rng.integers(0, 24, n), rng.random(n, dtype=np.float32)
    run = FinishedRun(video.parent, record, grid, scores, labels, indices / 4, indices)
    clip = VideoClip(frames.permute(0, 2, 3, 1).numpy(), run.timestamps, indices, N_FRAMES, 4.0)
    links = SelfExpression(
        torch.from_numpy(rng.integers(0, n, (n, 8))),
        torch.from_numpy(rng.normal(size=(n, 8))),
        torch.zeros(n),
        1,
        1.0,
        n,
    )
    levels = rng.integers(0, 256, (2, 1 + N_HEADS, n), dtype=np.uint8)
    ones = np.ones(N_HEADS)
    layers = [VisualShare(layer, ones, ones, levels, np.ones(1 + N_HEADS)) for layer in range(N_LAYERS)]
    return run_page(run, clip.frames, [video], FromModel(links, SharesRecord(layers, 9, 2 * n, n), "right"))


def find_chromium() -> str:
    """
    Raises:
        SystemExit: there is none.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("needs Chromium (Debian's package chromium)")
    return chromium


def command_of(chromium: str, text: str, script: str, folder: Path, *options: str) -> list[str]:
    """What opens a page, written into `folder`, with a script after it, which its policy lets run too."""
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    page = folder / "viz.html"
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    usual = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}")
    return [chromium, *usual, *options, f"file://{page}"]


def measured(text: str, folder: Path, chromium: str) -> dict[str, Any]:
    """What `_SCRIPT` tells of the page."""
    command = command_of(chromium, text, _SCRIPT, folder, "--enable-logging=stderr", "--remote-debugging-port=0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "MEASURED" in line)
        process.terminate()
    return json.JSONDecoder().raw_decode(line.split("MEASURED ")[1].replace('\\"', '"'))[0]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    quantiles = {
        name: dict(zip(("p50", "p95", "max"), np.quantile(times, (0.5, 0.95, 1)).round(1).tolist(), strict=True))
        for name, times in found["times"].items()
    }
    return {
        "opened_ms": round(found["opened"]),
        "shown_ms": round(found["shown"]),
        "asked": found["asked"],
        **quantiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    chromium = find_chromium()
    version = subprocess.run([chromium, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    rows = {}
    for name, grid in GRIDS.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            video = Path(folder, "clip.mp4")
            video.touch()
            text = made_page(grid, video)
            rows[name] = {
                "megabytes": round(len(text.encode()) / 1e6, 2),
                **summary(measured(text, video.parent, chromium)),
            }
    about = {"browser": version, "machine": platform.processor() or platform.machine(), "date": str(date.today())}
    args.out.mkdir(parents=True, exist_ok=True)
    record = {**about, "version": __version__, "limits_ms": LIMITS_MS, "pages": rows}
    (args.out / "page-in-browser.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
