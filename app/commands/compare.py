"""`videoanchor compare`: two results of the same questions, whoever made them."""

import argparse
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from ...integrations.errors import InputError
from ..atomic_write import write_whole
from ..text import json_text, printable
from .shared import Commands

_EPILOG = (
    "A and B, each one of:\n"
    "  the --out folder of `videoanchor eval`, or an eval-TAG.json of it\n"
    "  a folder that lmms-eval wrote with --log_samples, or a *_samples_TASK.jsonl of it\n"
    "  a result file of VLMEvalKit (.xlsx, .tsv, .csv or .json), or the folder of one\n"
    '  any .jsonl with rows of one of these forms, and {"card": {...}} as first line if you like:\n'
    '    {"id": 1, "video": "a.mp4", "score": 0.5}\n'
    '    {"id": 2, "video": "a.mp4", "prediction": "(B) lamp", "answer": "B", "options": ["sofa", "lamp"]}\n\n'
    "examples:\n"
    "  videoanchor compare out/eval-7b out/eval-3b --out out/7b-3b\n"
    '  videoanchor compare out/eval out/eval --setting-a "baseline, 32 frames" --setting-b gate\n'
    "  videoanchor compare results/baseline results/gated --videos vsibench.jsonl"
)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compare",
        help="two results of the same questions, of any harness: what differs, and whether it shows",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compares B with A question by question: the difference with its interval by a paired bootstrap\n"
        "over videos, McNemar's exact test, the difference that so many videos could show, the questions that\n"
        "flipped, and what of the protocols differs or could not be checked. Different question sets are refused.",
        epilog=_EPILOG,
    )
    parser.add_argument("a", type=Path, metavar="A", help="see below")
    parser.add_argument("b", type=Path, metavar="B", help="see below")
    parser.add_argument(
        "--setting-a",
        metavar="NAME",
        help="of a `videoanchor eval` with several; default: gate, or the only one with a gate",
    )
    parser.add_argument("--setting-b", metavar="NAME", help="the same for B")
    parser.add_argument("--metric", metavar="NAME", help="of lmms-eval's samples, where they have several")
    parser.add_argument(
        "--rescore", action="store_true", help="score the replies of both by the rules of `eval`, not as their files do"
    )
    parser.add_argument(
        "--videos", type=Path, metavar="FILE.jsonl", help="rows of id and video, where neither result names the videos"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for compare.json, compare.md and compare.html")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(command=_compare)


def _compare(args: argparse.Namespace) -> int:
    from ..evaluation.comparison_page import comparison_page
    from ..evaluation.comparison_report import comparison_markdown, comparison_text
    from ..evaluation.head_to_head import head_to_head
    from ..evaluation.readers.reading import read_result, with_videos
    from ..evaluation.readers.result import rescored

    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: it is a file; give a folder")
    a, b = read_result(args.a, args.setting_a, args.metric), read_result(args.b, args.setting_b, args.metric)
    if args.videos is not None:
        a, b = with_videos(a, args.videos), with_videos(b, args.videos)
    if args.rescore:
        a, b = rescored(a), rescored(b)
    record = {
        **head_to_head(a, b),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("videoanchor-triton"),
    }
    as_json = json_text(record)
    print(as_json if args.json else printable(comparison_text(record), lines=True))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        contents = {
            "json": f"{as_json}\n",
            "md": comparison_markdown(record),
            "html": comparison_page(record),
        }
        for suffix, content in contents.items():
            path = args.out / f"compare.{suffix}"
            write_whole(path, content.encode())
            if not args.json:
                print(f"wrote     {printable(path)}")
    return 0
