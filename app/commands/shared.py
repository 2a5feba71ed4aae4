"""What the commands share: the options of models, gate and scores, and what has to be there."""

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..libraries import prepare_libraries
from ..video.remote import MAX_DOWNLOAD, shown_url
from .progress_line import ProgressLine

if TYPE_CHECKING:  # these import torch and transformers
    from ..budget import Budget, Planner
    from ..prompt import Messages
    from ..token_sampling import TokenSampling
    from ..video.names import Videos
    from ..video.reader import VideoClip

Commands = Any
"""What `add_subparsers` returns."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype."""
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="a transformers checkpoint: folder or hub name"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: the checkpoint's")


def add_system_option(parser: argparse.ArgumentParser, of_row: bool = True) -> None:
    """--system.

    Args:
        of_row: rows may have one of their own.
    """
    own = '; a row\'s own "system" goes first' if of_row else ""
    about = f"system prompt, before video and question{own}; default: the chat template's, if it has one"
    parser.add_argument("--system", metavar="TEXT", help=about)


def add_tensor_parallel_option(parser: argparse.ArgumentParser) -> None:
    """--tensor-parallel; `check_tensor_parallel` refuses it."""
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="split the language model among N processes, each with a GPU of its own; default: %(default)s",
    )


def check_tensor_parallel(args: argparse.Namespace, here: bool = True) -> None:
    """Refuses what cannot be split, before any process is started.

    Args:
        here: the processes will run on this machine.
    """
    if args.tensor_parallel < 1:
        raise InputError(f"--tensor-parallel: expected 1 or more, got {args.tensor_parallel}")
    if args.tensor_parallel > 1 and here:
        prepare_libraries()
        from ..checkpoint import check_splits

        check_splits(args.model, args.tensor_parallel, args.device)


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """What `read_clips` and `fit_clips` use."""
    parser.add_argument(
        "--fps", type=float, metavar="N", help="frames per second of video; default: --max-frames over all of it"
    )
    parser.add_argument("--max-frames", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--sampling",
        choices=("uniform", "scene"),
        default="uniform",
        help="frames at even distances, or at least one of each scene; default: %(default)s",
    )
    from ..video.limits import MAX_PIXELS

    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="scale larger frames and images down to so many; default: %(default)s, more than 5K video has",
    )
    add_timeout_option(parser)
    parser.add_argument(
        "--fit",
        action="store_true",
        help="take as many frames as fit the model's context and the memory, instead of refusing too many",
    )


def add_timeout_option(parser: argparse.ArgumentParser) -> None:
    """--timeout, --strict and --max-download, of `read_video`."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a video that shows a sign of damage, instead of noting it (in VP8, VP9 and HEVC it may show none)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="give a video up that cannot be read any further for so long; default: %(default)g",
    )
    parser.add_argument(
        "--max-download",
        type=float,
        default=MAX_DOWNLOAD / 2**30,
        metavar="GIB",
        help="of a video that is given by a URL: refuse larger ones; default: %(default)g",
    )


def download_limit(args: argparse.Namespace) -> int:
    """Bytes, of --max-download."""
    return int(args.max_download * 2**30)


def read_clips(
    args: argparse.Namespace, videos: "Videos", progress: ProgressLine, max_frames: int | None = None
) -> "list[VideoClip]":
    """The frames that the options of `add_video_options` ask for, and a word about them on standard error.

    Args:
        videos: each a video, an image, or a folder of images; or a URL.
        max_frames: instead of --max-frames.

    Raises:
        InputError: see `read_video`.
    """
    from ..video.names import each
    from ..video.reader import read_video

    clips = []
    for video in each(videos):
        clip = read_video(
            video,
            fps=args.fps,
            max_frames=args.max_frames if max_frames is None else max_frames,
            sampling=args.sampling,
            max_pixels=args.max_pixels,
            strict=args.strict,
            timeout=args.timeout,
            max_download=download_limit(args),
            progress=progress,
        )
        what = "images" if clip.names else f"frames, {clip.duration:.1f} s"
        name = shown_url(video)
        progress.say(f"{name}: {len(clip.frames)} of {clip.n_source_frames} {what}")
        for note in clip.notes:
            progress.say(f"{name}: {note}")
        clips.append(clip)
    return clips


def make_planner(args: argparse.Namespace, config: Any, tensor_parallel: int = 1) -> "Planner":
    """Of the token budget, by the options of `add_model_options` and --max-new-tokens; make it before the model is
    loaded.

    Args:
        tensor_parallel: see `Planner`.

    Raises:
        InputError: see `Planner`.
    """
    from ..budget import Planner

    return Planner(
        str(args.model),
        config,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        dtype=args.dtype,
        tensor_parallel=tensor_parallel,
    )


def fit_clips(
    args: argparse.Namespace,
    videos: "Videos",
    clips: "list[VideoClip]",
    question: "Messages",
    planner: "Planner",
    progress: ProgressLine,
) -> "tuple[list[VideoClip], Budget]":
    """Prints the budget of `clips`; where they do not fit, with --fit, reads `videos` again with as many frames of each
    as do.

    Returns:
        the clips to ask about, and their budget.

    Raises:
        InputError: it does not fit, with what would.
    """
    budget = planner.budget(clips, question)
    while budget.problem is not None:
        n = planner.largest(clips, question) if args.fit else 0
        if n == 0:
            raise InputError(f"{budget.problem}: {planner.advice(clips, question)}")
        progress.say(f"--fit chose --max-frames {n}: {budget.problem}")
        clips = read_clips(args, videos, progress, max_frames=n)
        budget = planner.budget(clips, question)
    for line in budget.lines():
        progress.say(line)
    return clips, budget


def add_config_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The settings of `VideoAnchorConfig`, in two groups; `config_of` reads them.

    Args:
        several: each strength may be a list.
    """
    gate = parser.add_argument_group(
        "gate", "published for one model only: --preset internvl2-8b; else give both alphas"
    )
    gate.add_argument("--preset", metavar="NAME", help="published settings of a model")
    number: dict[str, Any] = {"type": numbers, "metavar": "A,B,..."} if several else {"type": float, "metavar": "A"}
    gate.add_argument("--alpha-k", **number, help="strength on keys: gamma_k = 1 + A * score")
    gate.add_argument("--alpha-v", **number, help="strength on values: gamma_v = 1 + A * score")
    gate.add_argument("--alpha-q", **number, help="on queries; cancels in the softmax")
    gate.add_argument(
        "--decode", choices=("persist", "prefill"), help="gate also while decoding (paper, default) or not"
    )
    add_score_options(parser)


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """--temperature and what goes with it; `drawing_of` reads them."""
    drawing = parser.add_argument_group("tokens of the answer; default: the likeliest each time")
    drawing.add_argument("--temperature", type=float, metavar="T", help="draw them, by logits divided by T")
    drawing.add_argument("--top-p", type=float, metavar="P", help="of those that together have probability P")
    drawing.add_argument("--top-k", type=int, metavar="K", help="of the K likeliest")
    drawing.add_argument("--seed", type=int, metavar="N", help="of each answer; default: 0")


def drawing_of(args: argparse.Namespace) -> "TokenSampling | None":
    """What the options of `add_drawing_options` ask for.

    Raises:
        InputError: one is out of its range, or goes with nothing.
    """
    names = ("temperature", "top_p", "top_k", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not given:
        return None
    if args.temperature is None:
        some = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{some}: tokens are drawn with a --temperature only, and else the likeliest is taken")
    if getattr(args, "tensor_parallel", 1) > 1:
        raise InputError("--temperature: not with --tensor-parallel, whose processes would each draw a token of theirs")
    from ..token_sampling import TokenSampling

    try:
        return TokenSampling(**given)
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from error


def add_gate_effect_option(parser: Any) -> None:
    """Of a command or a group of its options."""
    parser.add_argument(
        "--gate-effect",
        action="store_true",
        help="say also how likely the answer's first token is with the gate and without, the likeliest without, and "
        "how much larger the gate makes the attention's output: two more prefills",
    )


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """The settings of the scores alone."""
    scores = parser.add_argument_group("scores")
    scores.add_argument("--scorer", choices=("ssc", "knn", "kmeans", "uniform"), help="default: ssc (the paper's)")
    scores.add_argument(
        "--score",
        choices=("published", "size", "row_sum", "projector", "cross_frame", "permuted", "cross_frame_permuted"),
        help="of scorer ssc or knn: the paper's (default), its size of the subspace or row sum alone, with a size that "
        "does not depend on labels, the share of a token that other frames express, or the paper's or this share on "
        "tokens at random",
    )
    scores.add_argument(
        "--n-clusters", type=_count_or_auto, metavar="N", help='subspaces, or "auto"; default: 24 (published)'
    )
    scores.add_argument("--pca-rank", type=int, metavar="R", help="default: 64")
    scores.add_argument(
        "--assign-labels",
        choices=("cluster_qr", "kmeans", "discretize"),
        help="how eigenvectors become labels; default: cluster_qr, which has no seed",
    )
    scores.add_argument(
        "--random-state", type=int, metavar="SEED", help="of kmeans, discretize and permuted; default: 0"
    )
    scores.add_argument("--tol", type=float, metavar="T", help="relative duality gap of every token; default: 0.001")
    scores.add_argument(
        "--memory-budget", type=_bytes, metavar="GIB", help="of the self-expression; default: half of what is free"
    )
    merging = parser.add_argument_group("merged tokens (this package's own, not the paper's)")
    merging.add_argument(
        "--keep",
        type=_share_or_number,
        metavar="N",
        help="merge the visual tokens of a prompt to a share of them (0.25) or to a number (256); default: 1, all",
    )
    merging.add_argument(
        "--group",
        choices=("ward", "farthest", "kmeans", "subspace", "grid", "tome", "evs", "vidcom2", "random"),
        help="how they are grouped; default: ward",
    )
    merging.add_argument(
        "--merge",
        choices=("counts", "mean", "drop"),
        help="what becomes of a group: one token that counts as its members (default); counted once; one member, the "
        "others dropped",
    )


def numbers(text: str) -> list[float]:
    """Of an option with commas."""
    return [float(part) for part in text.split(",")]


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _share_or_number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def _bytes(gib: str) -> int:
    return int(float(gib) * 2**30)


_CONFIG_OPTIONS = (
    *("alpha_k", "alpha_v", "alpha_q", "decode"),
    *("scorer", "score", "n_clusters", "pca_rank", "assign_labels", "random_state", "tol", "memory_budget"),
    *("keep", "group", "merge"),
)


def config_of(args: argparse.Namespace) -> Any:
    """The `VideoAnchorConfig` that the options of `add_config_options` ask for.

    Raises:
        InputError: the strengths are not given, or a setting is out of its range.
    """
    from ...anchor.config import VideoAnchorConfig

    given = {name: getattr(args, name) for name in _CONFIG_OPTIONS if getattr(args, name) is not None}
    if args.preset is None and not {"alpha_k", "alpha_v"} <= given.keys():
        raise InputError(
            "the strength of the gate is not known for this model: give --alpha-k and --alpha-v, which "
            "`videoanchor tune` finds, or --preset internvl2-8b (4.0, 9.5, 2.5 for Q, K, V: the only published values)"
        )
    try:
        return VideoAnchorConfig(**given) if args.preset is None else VideoAnchorConfig.preset(args.preset, **given)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def machine_lines(report: dict[str, Any]) -> list[str]:
    """What `machine` returned, for people."""
    lines = [f"{name:18s} {version}" for name, version in report["versions"].items()]
    for entry in report["devices"]:
        lines += ["", f"{entry['device']} ({entry['name']})"]
        lines += [f"  {backend:10s} {what}" for backend, what in entry["backends"].items()]
    return lines


def check_extras() -> None:
    """Refuses before any work is done where the packages of the extras are missing."""
    missing = [name for name in ("av", "torchvision", "PIL", "accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)}: pip install 'videoanchor-triton[video,viz]'")
