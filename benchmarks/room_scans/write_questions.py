"""Writes room scans and questions about them, for `videoanchor eval`, `tune` and `batch`.

    python benchmarks/room_scans/write_questions.py --out DIR [--scans 40] [--frames 8] [--seed 0] [--travel PIXELS]
    videoanchor eval DIR/questions.jsonl --model DIR/checkpoint --max-frames 8 --n-clusters 12 --pca-rank 32 \\
        --alpha-k 0.5 --alpha-v 0 --ablate control --out DIR/eval

None of the scans was in the training; --frames 1 makes pictures; --travel is how far the camera goes, 150 to 200 in the
training. Puts the checkpoint beside them.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from videoanchor_triton.app.room_scans import CHECKPOINT, TEST_SEED, RoomScan, write_scans


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("scans", 40), ("frames", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--travel", type=int)
    args = parser.parse_args()
    start = TEST_SEED + args.seed * 10**6
    path = write_scans(args.out, [RoomScan(start + n, args.frames, args.travel) for n in range(args.scans)])
    shutil.copytree(CHECKPOINT, args.out / "checkpoint", dirs_exist_ok=True)
    print(f"{len(path.read_text().splitlines())} questions about {args.scans} scans: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
