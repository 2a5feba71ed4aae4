"""`videoanchor eval`: questions with known answers, with the gate and without."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..csv_text import csv_text
from ..libraries import prepare_libraries
from ..text import json_text, printable
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
    read_clip,
)

if TYPE_CHECKING:
    from ..batch.results import ResultsLog

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
        "it comes: a rerun goes on where it stopped), eval.md, eval.csv, eval.json and eval.png to --out, and the\n"
        "same with a tag of settings and questions in their names, which no other run replaces. A question that fails\n"
        "(its video is missing, for one) is left out of both sides: exit code 1, and a rerun asks it again.",
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
    from ..evaluation.ablations import ablations
    from ..evaluation.questions import read_questions

    setting = ev.Setting("gate", config, args.max_frames, run_facts(args))
    if not setting.gated:
        raise InputError("--alpha-k 0 --alpha-v 0 is the baseline itself: give a strength above 0")
    settings = ablations(setting, args.ablate)
    questions = read_questions(args.questions)
    from ..batch.results import ResultsLog
    from ..batch.stopping import StoppedError

    progress = ProgressLine(not args.json)
    stopped = None
    with ResultsLog(args.out / "replies.jsonl") as log, closing(progress):
        again = replies_as_of_now(log, questions, progress)
        asker = load_asker(args, config, questions, progress)
        pairs = [(setting, setting.baseline()) for setting in settings]
        distinct = list(dict.fromkeys(one for pair in pairs for one in reversed(pair)))
        progress.say(
            f"{len(questions)} questions in {len(distinct)} settings, {len(log.records)} replies in {log.path}"
        )
        try:
            ev.evaluate(questions, distinct, asker, log, progress, again)
        except StoppedError as error:
            stopped = str(error)
        record, table = _judge(args, questions, pairs, distinct, log, asker)
    return _write(args, {**record, "stopped": stopped}, table)


def replies_as_of_now(log: "ResultsLog", questions: Sequence[Any], progress: ProgressLine) -> set[str]:
    """Has the replies in `log` judged by the questions as they are now, and says what is missing.

    Returns:
        keys of the failures, which are asked again.
    """
    from ..evaluation.evaluate import failures, refreshed

    current = refreshed(questions, log.records)
    if current != log.records:
        log.replace(current)
    videos = {question.video for question in questions}
    missing = sorted(str(video) for video in videos if not video.exists())
    if missing:
        progress.say(
            f"{len(missing)} of {len(videos)} videos are missing, their questions fail: {', '.join(missing[:3])}"
        )
    return failures(log)


def _judge(
    args: argparse.Namespace,
    questions: Sequence[Any],
    pairs: Sequence[Any],
    distinct: Sequence[Any],
    log: Any,
    asker: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """All of the results, and those of the table."""
    from ..evaluation import evaluate as ev
    from ..evaluation import report
    from ..evaluation.questions import digest, videos_of

    scores = dict(zip(distinct, ev.scores_of(questions, distinct, log), strict=True))
    unread = {one: ev.unreadable(questions, one, log) for one in distinct}
    table = report.lines(
        questions, pairs, *([(of[after], of[before]) for after, before in pairs] for of in (scores, unread))
    )
    asked = {one.key(question): (one, question) for one in distinct for question in questions}
    failed = {key: log.records[key]["error"] for key in asked if "error" in log.records.get(key, {})}
    record = {
        "questions": str(args.questions),
        "n_questions": len(questions),
        "n_videos": len({*videos_of(questions)}),
        "n_failed": len(failed),
        "n_unasked": sum(key not in log.records for key in asked),
        "n_unreadable": {one.name: int(unread[one].sum()) for one in distinct},
        "settings": {one.name: {"max_frames": one.max_frames, **one.config.to_dict()} for one in distinct},
        "results": [line.to_dict() for line in table],
        "failures": [
            {"id": asked[key][1].id, "setting": asked[key][0].name, "error": error} for key, error in failed.items()
        ],
        "note": report.NOTE,
        **about(args, asker),
    }
    parts = [(one.config.to_dict(), one.max_frames, one.run) for one in distinct]
    record["tag"] = digest(parts, record["questions_sha256"], record["versions"]["videoanchor-triton"])[:8]
    return record, table


def _write(args: argparse.Namespace, record: dict[str, Any], table: Sequence[Any]) -> int:
    from ..evaluation import report

    gate = record["settings"]["gate"]
    unread = ", ".join(f"{n} of {record['n_questions']} ({name})" for name, n in record["n_unreadable"].items())
    counts = {
        "gate": ", ".join(f"{name} {gate[name]:g}" for name in ("alpha_q", "alpha_k", "alpha_v"))
        + f", decode {gate['decode']}",
        "scores": ", ".join(f"{name} {gate[name]}" for name in ("scorer", "score", "n_clusters", "pca_rank")),
        "frames": f"{gate['max_frames']} at most, sampling {args.sampling}, fps {args.fps}",
        "replies": f"{record['n_failed']} failed, {record['n_unasked']} not asked; nothing could be read from {unread}",
    }
    text = report.markdown(table, {**facts(record), **counts})
    texts = {
        "md": text,
        "csv": csv_text(report.CSV_COLUMNS, [{**line.to_dict(), **cited(record)} for line in table]),
        "json": json_text(record) + "\n",
    }
    written = report.write(args.out, "eval", record["tag"], texts, lambda path: report.draw(path, table))
    return tell(args, record, text, written)


def facts(record: dict[str, Any]) -> dict[str, str]:
    """Where the numbers come from, for people."""
    revision = record["revision"] or "not known"
    run = record["run"]
    return {
        "model": f"{run['model']}, revision {revision}, dtype {run['dtype']}, max_new_tokens {run['max_new_tokens']}",
        "questions": f"{record['questions']}, {record['n_questions']} about {record['n_videos']} videos, "
        f"sha256 {record['questions_sha256']}",
        "run": f"{record['date']} on {record['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "this report": f"tag {record['tag']}",
    }


def cited(record: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table that are the same in all of its rows."""
    names = ("revision", "device", "date", "questions", "questions_sha256", "n_unasked", "tag")
    return {**{name: record[name] for name in names}, "version": record["versions"]["videoanchor-triton"]}


def tell(args: argparse.Namespace, record: dict[str, Any], text: str, written: tuple[list[Path], list[Path]]) -> int:
    """Prints a report, and says what was written, what is missing, and why.

    Returns:
        the exit code.
    """
    print(json_text(record) if args.json else printable(text, lines=True), end="\n")
    files, others = written
    if not args.json:
        for path in files:
            print(f"wrote     {printable(path)}")
        print(f"          and the same with -{record['tag']} in their names, which no other run replaces")
        for path in others:
            print(f"kept      {printable(path)}")
    replies = printable(args.out / "replies.jsonl")
    if record["n_failed"]:
        failed = f"{record['n_failed']} replies failed and are left out"
        print(f"{failed}: see {replies}; a rerun asks again", file=sys.stderr)
    if record["stopped"] is not None:
        rest = f"what was answered is in {replies}, the same command goes on"
        print(f"videoanchor {args.name}: {printable(record['stopped'])}: {rest}", file=sys.stderr)
    return 1 if record["n_failed"] or record["stopped"] is not None else 0


def run_facts(args: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """What replies depend on beside the gate, the question and the number of frames."""
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
    names = ("model", "dtype", "max_new_tokens", "fps", "sampling", "max_pixels", "strict", "fit")
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
        line = _Quiet(False) if told else progress  # the frames and the memory of the first clip stand for the others
        clip = read_clip(args, video, line, max_frames)
        fitted = fit_clip(args, video, clip, longest, planner, line)[0]
        if told and (video, max_frames) not in told:
            for note in clip.notes:
                progress.say(f"{video}: {note}")
            if len(fitted.frames) < len(clip.frames):
                progress.say(f"{video}: --fit took {len(fitted.frames)} frames in place of {len(clip.frames)}")
        told.add((video, max_frames))
        return fitted

    model, processor = pipeline.load(args.model, args.device, args.dtype)
    progress.say(f"{args.model}: {type(model).__name__} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    return Asker(model, processor, read, args.out / "scores", args.max_new_tokens, progress)


class _Quiet(ProgressLine):
    """Says nothing about a clip that is read again, or like others."""

    def say(self, text: str) -> None:
        pass


def about(args: argparse.Namespace, asker: Any) -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    from ..checkpoint import revision_of
    from ..output import versions

    model = asker.model
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    return {
        "run": dict(run_facts(args)),
        "revision": revision_of(str(args.model)),
        "questions_sha256": hashlib.sha256(args.questions.read_bytes()).hexdigest(),
        "device": f"{device}, {str(model.dtype).removeprefix('torch.')}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
