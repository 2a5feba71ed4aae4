"""`videoanchor viz`: pictures and tables of a finished run."""

import argparse
from pathlib import Path

from ...integrations.errors import InputError
from ..libraries import prepare_libraries
from ..text import json_text, printable
from ..video.remote import path_or_url
from .shared import Commands, ProgressLine, add_timeout_option, check_extras, download_limit

MODEL_FREE = ("sheet", "montage", "overlay", "csv", "page")
PARTS = (*MODEL_FREE, "frames", "affinity", "attention")


def add(commands: Commands) -> None:
    """Adds the command."""
    viz = commands.add_parser(
        "viz",
        help="pictures and tables of a finished run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draws what `videoanchor run` left in a folder. A subspace has one colour in all frames.",
        epilog="what can be made:\n"
        "  sheet      anchors.png: frames with scores and with subspaces; of a run with --keep also\n"
        "             groups.png: the groups of merged tokens, outlined, with their members counted\n"
        "  montage    subspaces.png: a row for each subspace with its size and share, its tokens over frames\n"
        "  overlay    overlay_scores.mp4, overlay_subspaces.mp4: the same as videos\n"
        "  csv        tokens.csv: frame, time, row, column, score and subspace (as in the pictures)\n"
        "             of each token, and its label in anchors.safetensors\n"
        "  page       viz.html: one file to send around, with a player and, where affinity and attention\n"
        "             are made too, links between tokens, maps of attention, and the answer ungated\n"
        "  frames     frames/: each sampled frame with scores and with subspaces, as PNG\n"
        "  affinity   affinity.png, .csv: the share of |W| between each two frames (loads the model)\n"
        "  attention  attention.png, .csv: the share of attention that visual tokens get before and after\n"
        "             the gate, layer by layer (loads the model)\n"
        "\nexample: videoanchor viz out/demo --what sheet,attention --format pdf",
    )
    viz.add_argument("run", type=Path, metavar="RUN_DIR", help="the --out folder of a finished run")
    viz.add_argument(
        "--what",
        default=",".join(MODEL_FREE),
        metavar="A,B,...",
        help="of what is listed below, or all; default: %(default)s",
    )
    viz.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/viz")
    viz.add_argument(
        "--video",
        nargs="+",
        type=path_or_url,
        metavar="FILE",
        help="where the run's video is now, of several all in their order; default: where the run had it",
    )
    add_timeout_option(viz)
    viz.add_argument("--format", choices=("png", "pdf"), default="png", help="of the figures; default: %(default)s")
    viz.add_argument(
        "--all-frames",
        action="store_true",
        help="overlay: every frame of the video, at its own time and with the video's sound, with the tokens of the "
        "nearest sampled frame; default: the sampled frames, four a second, without sound",
    )
    model = viz.add_argument_group("affinity and attention")
    model.add_argument("--model", metavar="NAME_OR_PATH", help="where the checkpoint is now; default: the run's")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: the checkpoint's")
    viz.add_argument("--json", action="store_true", help="print what was made as JSON")
    viz.set_defaults(command=_viz)


def _viz(args: argparse.Namespace) -> int:
    from ..output import check_folder

    check_extras()
    parts = _parts(args.what)
    if args.all_frames and "overlay" not in parts:
        raise InputError("--all-frames is about the overlay: add it to --what")
    from ..viz.finished_run import read_run

    run, out = read_run(args.run), args.out or args.run / "viz"
    check_folder(out)
    if args.all_frames and len(run.n_frames) > 1:
        raise InputError("--all-frames: this run is about several videos, of which the sampled frames are shown")
    from ..viz.render import Gallery

    affinity, attention = "affinity" in parts, "attention" in parts
    model = args.model or run.record["model"]
    if affinity or attention:
        prepare_libraries()
        from ..checkpoint import read_config, read_processor

        read_config(model)  # what is refused is refused before a picture is drawn
        read_processor(model)
    progress = ProgressLine(not args.json)
    reading = {"timeout": args.timeout, "strict": args.strict, "max_download": download_limit(args)}
    gallery = Gallery(run, out, args.video, args.format, progress, progress.say, **reading)
    found = None
    try:
        if "sheet" in parts:
            gallery.sheet()
        if "montage" in parts:
            gallery.montage()
        if "overlay" in parts:
            gallery.overlay(all_frames=args.all_frames)
        if "csv" in parts:
            gallery.csv()
        if "frames" in parts:
            gallery.frames()
        if affinity or attention:
            options = {"affinity": affinity, "attention": attention, "ungated": attention and "page" in parts}
            found = gallery.from_model(model, args.device, args.dtype, **options)
        if "page" in parts:
            gallery.page(found)
    finally:
        progress.close()
    if args.json:
        print(json_text({"run": str(args.run), **gallery.report}))
        return 0
    for name, value in gallery.report.items():
        if name != "files":
            print(f"{name:9s} " + ", ".join(f"{key.replace('_', ' ')} {shown:.4g}" for key, shown in value.items()))
    for path in gallery.report["files"]:
        print(f"wrote     {printable(path)}")
    return 0


def _parts(text: str) -> list[str]:
    asked = [part.strip() for part in text.split(",")]
    unknown = [part for part in asked if part not in (*PARTS, "all")]
    if unknown:
        raise InputError(f"--what: expected some of {', '.join(PARTS)} with commas between, or all, got {unknown[0]!r}")
    return [part for part in PARTS if part in asked or "all" in asked]
