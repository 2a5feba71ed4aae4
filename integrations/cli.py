"""The command line: `videoanchor demo | run | convert | info`.

Exit codes: 0 done, 2 wrong input, 1 failure, 130 interrupted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import InputError


class ProgressLine:
    """One line on standard error that is written over, with the stage and how far it is; silent where nobody
    watches."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._enabled and now - self._last > 0.1:
            self._last = now
            share = f" {done}/{total} ({100 * done // total}%)" if total else f" {done}"
            print(f"\r\033[K  {stage}{share}", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A message that stays."""
        self.close()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._enabled:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `videoanchor`."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.command(args)
    except InputError as error:
        print(f"videoanchor {args.name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that vanished
        print(f"videoanchor {args.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"videoanchor {args.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="videoanchor",
        description="VideoAnchor for video language models: visual tokens are scored by sparse subspace clustering and "
        "every decoder attention is gated by the scores.",
        epilog="Start with: videoanchor demo",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="the whole pipeline on a clip and a tiny random model made on the spot; downloads nothing",
        description="Makes a clip with known camera motion and a tiny random Qwen2.5-VL, runs `videoanchor run` on "
        "them, and compares its attention calls with a dense fp64 reference.",
    )
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    demo.set_defaults(command=_demo)

    run = commands.add_parser(
        "run",
        help="one video, one question, one checkpoint",
        description="Asks a checkpoint about a video with the gate on. Writes result.json, anchors.safetensors "
        "(scores, labels, grid, timestamps) and anchors.png to --out.",
    )
    run.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="a transformers checkpoint: folder or hub name"
    )
    run.add_argument("--video", required=True, type=Path, metavar="FILE")
    run.add_argument("--question", required=True)
    run.add_argument("--out", required=True, type=Path, metavar="DIR")
    run.add_argument(
        "--fps", type=float, metavar="N", help="frames per second of video; default: --max-frames over all of it"
    )
    run.add_argument("--max-frames", type=int, default=32, metavar="N", help="default: %(default)s")
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")
    run.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: the checkpoint's")
    run.add_argument("--json", action="store_true", help="print result.json instead of the report")
    gate = run.add_argument_group("gate", "published for one model only: --preset internvl2-8b; else give both alphas")
    gate.add_argument("--preset", metavar="NAME", help="published settings of a model")
    gate.add_argument("--alpha-k", type=float, metavar="A", help="strength on keys: gamma_k = 1 + A * score")
    gate.add_argument("--alpha-v", type=float, metavar="A", help="strength on values: gamma_v = 1 + A * score")
    gate.add_argument("--alpha-q", type=float, metavar="A", help="on queries; cancels in the softmax")
    gate.add_argument(
        "--decode", choices=("persist", "prefill"), help="gate also while decoding (paper, default) or not"
    )
    scores = run.add_argument_group("scores")
    scores.add_argument("--scorer", choices=("ssc", "kmeans", "uniform"), help="default: ssc")
    scores.add_argument(
        "--n-clusters", type=_count_or_auto, metavar="N", help='subspaces, or "auto"; default: 24 (published)'
    )
    scores.add_argument("--pca-rank", type=int, metavar="R", help="default: 64")
    scores.add_argument("--random-state", type=int, metavar="SEED", help="default: 0")
    scores.add_argument(
        "--algorithm",
        choices=("auto", "dense", "blocked", "working-set", "authors"),
        help="of the self-expression; default: auto, by the number of tokens",
    )
    scores.add_argument("--tol", type=float, metavar="T", help="relative duality gap of every token; default: 0.001")
    scores.add_argument(
        "--memory-budget", type=_bytes, metavar="GIB", help="of the self-expression; default: half of what is free"
    )
    run.set_defaults(command=_run)

    convert = commands.add_parser(
        "convert",
        help="a checkpoint that needs its own code (InternVL2, LLaVA-Video) in transformers' format",
        description="Writes a checkpoint in the format of its own repository again in transformers' format, for "
        "`videoanchor run --model`. Converts InternVL2, 2.5 and 3 (internvl_chat; decoders InternLM2, Llama, Qwen2, "
        "Qwen3) and LLaVA-Video (llava_qwen). Reads safetensors and runs no code of the checkpoint. Needs as much disk "
        "as the weights take and memory for one shard.",
        epilog="Download first: hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="folder of the checkpoint as it was downloaded")
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    convert.add_argument("--json", action="store_true", help="print the report as JSON")
    convert.set_defaults(command=_convert)

    info = commands.add_parser("info", help="versions, device and what each attention backend can do here")
    info.add_argument("--json", action="store_true")
    info.add_argument(
        "--backbones", action="store_true", help="instead: the models of the installed transformers that can be gated"
    )
    info.set_defaults(command=_info)
    return parser


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _bytes(gib: str) -> int:
    return int(float(gib) * 2**30)


_CONFIG_OPTIONS = (
    *("alpha_k", "alpha_v", "alpha_q", "decode"),
    *("scorer", "n_clusters", "pca_rank", "random_state", "algorithm", "tol", "memory_budget"),
)


def _config(args: argparse.Namespace) -> Any:
    from ..anchor.config import VideoAnchorConfig

    given = {name: getattr(args, name) for name in _CONFIG_OPTIONS if getattr(args, name) is not None}
    if args.preset is None and not {"alpha_k", "alpha_v"} <= given.keys():
        raise InputError(
            "the strength of the gate is not known for this model: give --alpha-k and --alpha-v, or --preset "
            "internvl2-8b (4.0, 9.5, 2.5 for Q, K, V: the only published values)"
        )
    try:
        return VideoAnchorConfig(**given) if args.preset is None else VideoAnchorConfig.preset(args.preset, **given)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _check_extras() -> None:
    """Refuses before any work is done where the packages of the extras are missing."""
    missing = [name for name in ("av", "torchvision", "PIL", "accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)}: pip install 'videoanchor-triton[video,viz]'")


def _prepare_libraries() -> None:
    """Imports what the pipeline needs, quietly."""
    from .torchvision_compat import make_torchvision_importable

    make_torchvision_importable()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _run(args: argparse.Namespace) -> int:
    from .output import check_folder

    _check_extras()
    config = _config(args)
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
    check_folder(args.out)
    _, result, record = _answer(args, config, ProgressLine(not args.json))
    if args.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _report(result, record, args.out)
    return 0


def _answer(args: argparse.Namespace, config: Any, progress: ProgressLine) -> Any:
    """Decodes, loads, asks and writes; what `run` and `demo` share. Returns the clip, the result and what
    `result.json` holds."""
    from .video import read_video

    start = time.perf_counter()
    clip = read_video(args.video, fps=args.fps, max_frames=args.max_frames, progress=progress)
    decoded = time.perf_counter()
    progress.say(f"{args.video}: {len(clip.frames)} of {clip.n_source_frames} frames, {clip.duration:.1f} s")
    _prepare_libraries()
    from . import output, pipeline

    model, processor = pipeline.load(args.model, args.device, args.dtype)
    loaded = time.perf_counter()
    progress.say(f"{args.model}: {type(model).__name__} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    result = pipeline.answer(
        model, processor, clip, args.question, config, max_new_tokens=args.max_new_tokens, progress=progress
    )
    progress.close()
    about = {
        "model": str(args.model),
        "video": str(args.video),
        "question": args.question,
        "seconds": {"decode_video": decoded - start, "load_model": loaded - decoded},
    }
    return clip, result, output.write_run(args.out, result, clip, config, about)


def _report(result: Any, record: dict[str, Any], out: Path) -> None:
    seconds = record["seconds"]
    scores, sizes = result.anchor.scores, result.anchor.labels.bincount()
    grid = result.grid
    print(f"answer    {result.answer}")
    print(
        f"tokens    {result.n_prompt_tokens} in the prompt, {result.n_visual_tokens} visual ({grid.t} x {grid.h} x "
        f"{grid.w}{f' + {grid.n_extra}' if grid.n_extra else ''}), {result.n_generated_tokens} generated"
    )
    print(
        f"scores    min {float(scores.min()):.3f}, median {float(scores.median()):.3f}, max {float(scores.max()):.3f}; "
        f"{int((sizes > 0).sum())} subspaces of {int(sizes[sizes > 0].min())} to {int(sizes.max())} tokens; "
        f"{result.anchor.n_iter} iterations"
    )
    stages = ("decode_video", "load_model", "vision", "ssc", "prefill", "decode_per_token", "generate")
    print("seconds   " + ", ".join(f"{stage.replace('_', ' ')} {seconds[stage]:.3f}" for stage in stages))
    for name in ("result.json", "anchors.safetensors", "anchors.png"):
        print(f"wrote     {out / name}")


def _demo(args: argparse.Namespace) -> int:
    from .output import check_folder

    _check_extras()
    check_folder(args.out)
    import torch

    if not torch.cuda.is_available():  # before Triton is imported: its kernels run in Triton's interpreter here
        os.environ.setdefault("TRITON_INTERPRET", "1")
    _prepare_libraries()
    from ..anchor.config import VideoAnchorConfig
    from . import demo

    progress = ProgressLine(True)
    args.out.mkdir(parents=True, exist_ok=True)
    args.video, args.model = args.out / "clip.mp4", args.out / "checkpoint"
    cameras = demo.make_clip(args.video)
    demo.write_cameras(args.out / "cameras.json", cameras)
    demo.make_checkpoint(args.model)
    args.question, args.fps, args.max_frames = demo.QUESTION, None, 12
    args.device, args.dtype, args.max_new_tokens = "auto", "auto", 12
    with demo.record_attention() as calls:
        clip, result, record = _answer(args, VideoAnchorConfig.preset("internvl2-8b"), progress)
    _report(result, record, args.out)
    print("kernels   largest |output - dense fp64 reference| over attention calls of this run")
    interpreted = not torch.cuda.is_available()
    for backend in ("sdpa", "triton"):
        # The interpreter is slow: one prefill, and one decoding step of every layer.
        n_layers = sum(call.q.shape[2] > 1 for call in calls)
        some = calls if backend == "sdpa" or not interpreted else [calls[0], *calls[-n_layers:]]
        try:
            error, largest = demo.compare_with_reference(some, backend, progress)
        except ValueError as problem:
            shown = str(problem)
        else:
            where = ", in Triton's interpreter" if backend == "triton" and interpreted else ""
            shown = f"{error:.1e}  ({len(some)} calls, largest |output| {largest:.1f}{where})"
        progress.close()
        print(f"          {backend:7s} {shown}")
    agree, chance, n_pairs = demo.agreement(result.anchor.labels.cpu().numpy(), cameras[clip.indices], result.grid)
    print(
        f"camera    {100 * agree:.0f}% of {n_pairs} token pairs that show the same place in neighbouring steps share a "
        f"subspace ({100 * chance:.0f}% would by chance)"
    )
    print("The weights are random, so the answer is noise and the times are not a model's. On a checkpoint of yours:")
    print("videoanchor run --model NAME_OR_PATH --video FILE --question '...' --alpha-k A --alpha-v A --out DIR")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .output import check_folder

    check_folder(args.out)
    _prepare_libraries()
    from .convert import convert_checkpoint

    progress = ProgressLine(not args.json)
    try:
        converted = convert_checkpoint(args.source, args.out, progress=progress)
    finally:
        progress.close()
    if args.json:
        print(json.dumps(asdict(converted), indent=2, default=str))
        return 0
    print(f"read      {args.source}: {converted.source}")
    print(
        f"wrote     {converted.out}: {converted.architecture}, {converted.n_tensors} tensors in "
        f"{converted.n_shards} {'file' if converted.n_shards == 1 else 'files'}, {converted.n_bytes / 2**30:.1f} GiB"
    )
    for note in converted.notes:
        print(f"note      {note}")
    print("Next (InternVL2-8B has --preset internvl2-8b in place of the alphas):")
    print(f"videoanchor run --model {converted.out} --video FILE --question '...' --alpha-k A --alpha-v A --out DIR")
    return 0


def _info(args: argparse.Namespace) -> int:
    _prepare_libraries()
    if args.backbones:
        return _info_backbones(args.json)
    import torch

    from ..kernels.api import available_backends
    from .output import versions

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    report = {
        "versions": versions(),
        "devices": [
            {
                "device": str(device),
                "name": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"{torch.get_num_threads()} threads",
                "backends": available_backends(device),
            }
            for device in devices
        ],
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, version in report["versions"].items():
        print(f"{name:18s} {version}")
    for entry in report["devices"]:
        print(f"\n{entry['device']} ({entry['name']})")
        for backend, what in entry["backends"].items():
            print(f"  {backend:10s} {what}")
    return 0


def _info_backbones(as_json: bool) -> int:
    import transformers

    from .backbones import installed_backbones

    found = installed_backbones()
    if as_json:
        report = {"transformers": transformers.__version__, "backbones": [asdict(backbone) for backbone in found]}
        print(json.dumps(report, indent=2))
        return 0
    name_width, class_width = (max(len(getattr(one, key)) for one in found) for key in ("name", "model"))
    print(f"{'name':{name_width}s}  tested  {'class':{class_width}s}  visual token ids")
    for one in found:
        ids = ", ".join(f"{modality} {token}" for modality, token in one.token_ids.items()) or "the checkpoint's"
        shown = "yes" if one.tested else "no"
        print(f"{one.name:{name_width}s}  {shown:6s}  {one.model:{class_width}s}  {ids}")
    print(
        f"\ntransformers {transformers.__version__}. Tested: tokens and logits equal to a dense gate's on a tiny "
        f"random model. Token ids are the default config's; a checkpoint's own count."
    )
    for one in found:
        if one.tested_as is not None and one.tested_as.note:
            print(f"{one.name}: {one.tested_as.note}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
