"""`videoanchor eval`: questions with known answers, with the gate and without."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .shared import (
    Commands,
    ProgressLine,
    add_config_options,
    add_model_options,
    add_video_options,
    check_extras,
    config_of,
    fit_clip,
    make_planner,
    prepare_libraries,
    read_clip,
)

QUESTIONS_HELP = (
    "rows of the file (paths start at its folder):\n"
    '  {"video": "a.mp4", "question": "Which is nearer?", "options": ["sofa", "lamp"], "answer": "B"}\n'
    '  {"video": "a.mp4", "question": "How many chairs are there?", "answer": 4, "type": "counting"}\n'
    '  {"video": "b.mp4", "question": "Which room comes last?", "answer": "kitchen"}\n'
    "options: multiple choice, by accuracy. A number: by VSI-Bench's mean relative accuracy. Text: by exact match\n"
    '(also for numbers with "metric": "exact"). Results are given by "type".\n'
)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "eval",
        help="questions with known answers, with the gate and without",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Asks every question of a JSONL file with the gate on and with alpha = 0 through the same code,\n"
        "and compares the two, with intervals by a paired bootstrap over videos. Writes replies.jsonl (each reply as\n"
        "it comes: a rerun goes on where it stopped), eval.md, eval.csv, eval.json and eval.png to --out.",
        epilog=f"{QUESTIONS_HELP}\n"
        "ablations, one thing changed at a time (NAME alone takes the values shown):\n"
        "  scorer=ssc,kmeans,uniform   score=published,size,row_sum   clusters=8,16,24,32   terms=K,V,KV\n"
        "  frames=8,16,32\n\n"
        "example:\n"
        "  videoanchor eval questions.jsonl --model DIR --alpha-k 4 --alpha-v 1 --out out/eval --ablate scorer",
    )
    add_questions_options(parser)
    parser.add_argument(
        "--ablate", action="append", default=[], metavar="NAME[=A,B,...]", help="see below; may be repeated"
    )
    add_config_options(parser)
    parser.set_defaults(command=_eval)


def add_questions_options(parser: argparse.ArgumentParser) -> None:
    """What `eval` and `tune` share."""
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl", help="see below")
    add_model_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_video_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")


def _eval(args: argparse.Namespace) -> int:
    from ..output import check_folder

    check_extras()
    config = config_of(args)
    check_folder(args.out)
    from ..evaluation import evaluate as ev

    setting = ev.Setting("gate", config, args.max_frames, run_facts(args))
    if not setting.gated:
        raise InputError("--alpha-k 0 --alpha-v 0 is the baseline itself: give a strength above 0")
    settings = ev.ablations(setting, args.ablate)
    questions = ev.read_questions(args.questions)
    from ..batch.results import ResultsLog
    from ..evaluation import report

    progress = ProgressLine(not args.json)
    with ResultsLog(args.out / "replies.jsonl") as log:
        ev.forget_failures(log)
        asker = load_asker(args, config, questions, progress)
        pairs = [(setting, setting.baseline()) for setting in settings]
        distinct = list(dict.fromkeys(one for pair in pairs for one in reversed(pair)))
        progress.say(
            f"{len(questions)} questions in {len(distinct)} settings, {len(log.records)} replies in {log.path}"
        )
        scores = dict(zip(distinct, ev.evaluate(questions, distinct, asker, log, progress), strict=True))
    progress.close()
    n_failed = sum(int((scores[one] != scores[one]).sum()) for one in distinct)
    table = report.lines(questions, pairs, [(scores[after], scores[before]) for after, before in pairs])
    record = {
        "questions": str(args.questions),
        "n_questions": len(questions),
        "n_videos": len({*ev.videos_of(questions)}),
        "n_failed": n_failed,
        "settings": {one.name: {"max_frames": one.max_frames, **one.config.to_dict()} for one in distinct},
        "results": [line.to_dict() for line in table],
        "note": report.NOTE,
        **about(args),
    }
    written = report.write(args.out, "eval", table, record)
    print(json.dumps(record, indent=2, ensure_ascii=False) if args.json else report.markdown(table), end="\n")
    if not args.json:
        print("\n".join(f"wrote     {path}" for path in written))
    if n_failed:
        progress.say(
            f"{n_failed} replies failed and are left out: see {args.out / 'replies.jsonl'}; a rerun asks again"
        )
    return 1 if n_failed else 0


def run_facts(args: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """What replies depend on beside the gate, the question and the number of frames."""
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
    names = ("model", "dtype", "max_new_tokens", "fps", "sampling", "fit")
    return tuple((name, str(getattr(args, name))) for name in names)


def load_asker(args: argparse.Namespace, config: Any, questions: Sequence[Any], progress: ProgressLine) -> Any:
    """The checkpoint, ready to be asked; every clip leaves room for the longest of the questions."""
    prepare_libraries()
    from .. import pipeline
    from ..evaluation.answerer import Asker

    planner = make_planner(args, config)
    longest = max((question.prompt() for question in questions), key=len)

    told: set[tuple[Path, int]] = set()

    def read(video: Path, max_frames: int) -> Any:
        line = _Quiet(False) if (video, max_frames) in told else progress
        told.add((video, max_frames))
        clip = read_clip(args, video, line, max_frames)
        return fit_clip(args, video, clip, longest, planner, line)[0]

    model, processor = pipeline.load(args.model, args.device, args.dtype)
    progress.say(f"{args.model}: {type(model).__name__} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    return Asker(model, processor, read, args.out / "scores", args.max_new_tokens, progress)


class _Quiet(ProgressLine):
    """Says nothing about a clip that is read again."""

    def say(self, text: str) -> None:
        pass


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Where the numbers come from."""
    from ..output import versions

    return {"run": dict(run_facts(args)), "versions": versions()}
