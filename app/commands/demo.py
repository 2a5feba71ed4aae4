"""`videoanchor demo`: the whole pipeline on what is made on the spot."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..libraries import prepare_libraries
from ..text import json_text
from .run import answer, report
from .shared import Commands, ProgressLine, check_extras


def add(commands: Commands) -> None:
    """Adds the command."""
    demo = commands.add_parser(
        "demo",
        help="a small trained model answers about a made-up scan of a room, and the pipeline draws; downloads nothing",
        description="Asks a small trained Qwen2.5-VL, which comes with the package, about a made-up scan of a room "
        "whose answers are known, without a gate and with. Then makes a clip with known camera motion and a tiny "
        "random Qwen2.5-VL, runs `videoanchor run` on them, and compares its attention calls with a dense fp64 "
        "reference.",
    )
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")
    demo.set_defaults(command=_demo)


def _demo(args: argparse.Namespace) -> int:
    from ..output import check_folder

    check_extras()
    check_folder(args.out)
    import torch

    if not torch.cuda.is_available():  # before Triton is imported: its kernels run in Triton's interpreter here
        os.environ.setdefault("TRITON_INTERPRET", "1")
    prepare_libraries()
    from ...anchor.config import VideoAnchorConfig
    from .. import demo, room_scan_demo
    from ..video.limits import MAX_PIXELS

    progress = ProgressLine(not args.json)
    args.out.mkdir(parents=True, exist_ok=True)
    scan = room_scan_demo.ask_about_a_scan(args.out / "scan", progress)
    if not args.json:
        progress.close()
        print("\n".join(room_scan_demo.lines(scan)), end="\n\n")
    video = args.out / "clip.mp4"
    args.video = args.local = [video]
    args.model = args.out / "checkpoint"
    cameras = demo.make_clip(video)
    demo.write_cameras(args.out / "cameras.json", cameras)
    demo.make_checkpoint(args.model)
    args.question, args.system, args.fps, args.max_frames = demo.QUESTION, None, None, 12
    args.sampling, args.timeout, args.fit = "uniform", 120.0, False
    args.max_pixels, args.strict, args.max_download = MAX_PIXELS, True, 0.0
    args.device, args.dtype, args.max_new_tokens, args.gate_effect, args.drawn = "auto", "auto", 12, False, None
    with demo.record_attention() as calls:
        (clip,), result, record = answer(args, VideoAnchorConfig.preset("internvl2-8b"), progress)
    kernels: dict[str, dict[str, Any]] = {}
    interpreted = not torch.cuda.is_available()
    for backend in ("sdpa", "triton"):
        # The interpreter is slow: one prefill, and one decoding step of every layer.
        n_layers = sum(call.q.shape[2] > 1 for call in calls)
        some = calls if backend == "sdpa" or not interpreted else [calls[0], *calls[-n_layers:]]
        try:
            error, largest = demo.compare_with_reference(some, backend, progress)
        except ValueError as problem:
            kernels[backend] = {"refused": str(problem)}
        else:
            kernels[backend] = {"error": error, "calls": len(some), "largest": largest}
        progress.close()
    agree, chance, n_pairs = demo.agreement(result.anchor.labels.cpu().numpy(), cameras[clip.indices], result.grid)
    camera = {"agree": agree, "chance": chance, "pairs": n_pairs}
    if args.json:
        print(json_text({**record, "kernels": kernels, "camera": camera, "scan": scan}))
        return 0
    report(result, record, args.out)
    print("kernels   largest |output - dense fp64 reference| over attention calls of this run")
    for backend, found in kernels.items():
        where = ", in Triton's interpreter" if backend == "triton" and interpreted else ""
        shown = found.get("refused") or (
            f"{found['error']:.1e}  ({found['calls']} calls, largest |output| {found['largest']:.1f}{where})"
        )
        print(f"          {backend:7s} {shown}")
    print(
        f"camera    {100 * agree:.0f}% of {n_pairs} token pairs that show the same place in neighbouring steps share a "
        f"subspace ({100 * chance:.0f}% would by chance)"
    )
    print(
        "The weights of this clip's model are random, so its answer is noise and the times are not a model's; the "
        "model of the scan above is trained. On a checkpoint of yours:"
    )
    print("videoanchor run --model NAME_OR_PATH --video FILE --question '...' --alpha-k A --alpha-v A --out DIR")
    return 0
