"""`videoanchor run`: one video, one question, one checkpoint."""

import argparse
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..libraries import prepare_libraries
from ..text import asked, check_question, json_text, printable
from ..video.names import notes_of, sha256s_of, shown
from ..video.remote import is_url, located, path_or_url
from .shared import (
    Commands,
    ProgressLine,
    add_config_options,
    add_drawing_options,
    add_gate_effect_option,
    add_model_options,
    add_system_option,
    add_tensor_parallel_option,
    add_video_options,
    check_extras,
    check_tensor_parallel,
    config_of,
    download_limit,
    drawing_of,
    fit_clips,
    make_planner,
    read_clips,
)

if TYPE_CHECKING:
    from ..token_grid import TokenGrid


def add(commands: Commands) -> None:
    """Adds the command."""
    run = commands.add_parser(
        "run",
        help="one video (or several), one question, one checkpoint",
        description="Asks a checkpoint about a video, or several videos and images, with the gate on. Writes "
        "result.json, anchors.safetensors (scores, labels, grid, timestamps), anchors.png and viz.html to --out.",
    )
    add_model_options(run)
    add_tensor_parallel_option(run)
    run.add_argument(
        "--video",
        required=True,
        nargs="+",
        type=path_or_url,
        metavar="PATH",
        help="a video, an image, or a folder of images (views); a video or an image also by URL (http, s3, hf, ...); "
        "of several each is one of the prompt, in their order",
    )
    run.add_argument("--question", required=True)
    add_system_option(run, of_row=False)
    run.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_video_options(run)
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    run.add_argument("--json", action="store_true", help="print result.json instead of the report")
    add_gate_effect_option(run)
    add_drawing_options(run)
    add_config_options(run)
    run.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    from ..output import check_folder
    from ..video.reader import check_path

    check_extras()
    config = config_of(args)
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
    check_question(args.question)
    asked(args.question, args.system)
    check_folder(args.out)
    args.drawn = drawing_of(args)
    check_tensor_parallel(args)
    progress = ProgressLine(not args.json)
    args.local = [located(video, download_limit(args), progress) for video in args.video]
    for path in args.local:
        check_path(path)
    _, result, record = answer(args, config, progress, args.tensor_parallel)
    if args.json:
        print(json_text(record))
    else:
        report(result, record, args.out)
    return 0


def answer(args: argparse.Namespace, config: Any, progress: ProgressLine, tensor_parallel: int = 1) -> Any:
    """Reads what the checkpoint says of itself, decodes, works out the budget, loads, asks and writes; what `run` and
    `demo` share.

    Args:
        tensor_parallel: processes among which the model is split.

    Returns:
        the clips, the result, and what `result.json` holds.
    """
    try:
        return _answer(args, config, progress, tensor_parallel)
    finally:
        progress.close()


def _answer(args: argparse.Namespace, config: Any, progress: ProgressLine, tensor_parallel: int) -> Any:
    times = [time.perf_counter()]

    def stage(name: str) -> None:
        times.append(time.perf_counter())
        progress(name, 0, 0)

    progress("import", 0, 0)
    prepare_libraries()
    from .. import output
    from ..tensor_parallel import SplitModel
    from ..video_model import VideoModel

    stage("checkpoint")
    planner = make_planner(args, config, tensor_parallel)
    stage("decode")
    clips = read_clips(args, args.local, progress)
    stage("budget")
    question = asked(args.question, args.system)
    clips, budget = fit_clips(args, args.local, clips, question, planner, progress)
    stage("load")
    names = ("model", "device", "dtype", "max_new_tokens", "gate_effect", "drawn")
    make = partial(VideoModel, **{name: getattr(args, name) for name in names}, config=config)
    model = make(progress) if tensor_parallel == 1 else SplitModel(make, tensor_parallel, args.device, progress)
    times.append(time.perf_counter())
    with closing(model):
        progress.say(f"{args.model}: {model}")
        model.open(clips)
        result = model.answer(question).result
    names = ("import", "checkpoint", "decode_video", "budget", "load_model")
    about = {
        "model": str(Path(args.model).absolute()) if Path(args.model).exists() else str(args.model),
        "video": shown([video if is_url(video) else Path(video).absolute() for video in args.video]),
        "sha256": sha256s_of(args.video),
        "question": args.question,
        "system": args.system,
        "notes": notes_of(args.video, clips),
        "max_pixels": args.max_pixels,
        "sampled": {name: getattr(args, name) for name in ("fps", "max_frames", "sampling", "fit", "strict")},
        "dtype": args.dtype,
        "drawn": None if args.drawn is None else asdict(args.drawn),
        "budget": budget.to_dict(),
        "seconds": {name: end - start for name, (start, end) in zip(names, pairwise(times), strict=True)},
    }
    try:
        record = output.write_run(args.out, result, clips, config, about)
    except OSError:
        progress.say(f"not written, so here: answer    {result.text}")
        raise
    try:
        output.draw_run(args.out, result, clips, record, args.local)
    except Exception as error:
        progress.say(f"pictures could not be made ({type(error).__name__}: {error}); the results are written")
    return clips, result, record


def report(result: Any, record: dict[str, Any], out: Path) -> None:
    from ..answer import output_warning

    seconds = record["seconds"]
    scores, sizes = result.anchor.scores, result.anchor.labels.bincount()
    print(f"answer    {printable(result.text, lines=True)}")
    if (effect := result.gate_effect) is not None:
        print(
            f"gate      first token {printable(effect.token)!r}: probability {effect.probability:.3f} with the gate, "
            f"{effect.probability_without:.3f} without, where the likeliest is {printable(effect.token_without)!r}; "
            f"attention's output {effect.output_size:.2f} times as large"
        )
        if (warning := output_warning([effect.output_size])) is not None:
            print(f"          {warning}")
    print(
        f"tokens    {result.n_prompt_tokens} in the prompt, {result.n_visual_tokens} visual "
        f"({', '.join(map(_size, result.grids))}), {result.n_generated_tokens} generated"
    )
    print(
        f"scores    min {float(scores.min()):.3f}, median {float(scores.median()):.3f}, max {float(scores.max()):.3f}; "
        f"{int((sizes > 0).sum())} subspaces of {int(sizes[sizes > 0].min())} to {int(sizes.max())} tokens; "
        f"{result.anchor.n_iter} iterations"
    )
    if result.anchor.in_gap is False:
        print("          the tokens do not say that there are so many subspaces: labels are one choice of several")
    stages = (
        "import",
        "checkpoint",
        "decode_video",
        "budget",
        "load_model",
        "vision",
        "ssc",
        "prefill",
        "decode_per_token",
        "generate",
    )
    print("seconds   " + ", ".join(f"{stage.replace('_', ' ')} {seconds[stage]:.3f}" for stage in stages))
    for name in ("result.json", "anchors.safetensors", "anchors.png", "viz.html"):
        if (out / name).exists():
            print(f"wrote     {printable(out / name)}")


def _size(grid: "TokenGrid") -> str:
    places = f"{grid.t} x {grid.h} x {grid.w}" if grid.t else ""
    return " + ".join(part for part in (places, str(grid.n_extra) if grid.n_extra else "") if part)
