"""`videoanchor eval`: questions with known answers, with the gate and without."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..batch.stopping import StoppedError
from ..csv_text import csv_text
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
    prepare_libraries,
    read_clip,
)

if TYPE_CHECKING:  # they import torch
    from ..batch.results import ResultsLog
    from ..evaluation.questions import Question
    from ..evaluation.settings import Setting
    from ..video.reader import VideoClip

SCORES_BYTES = 2**30
"""The most that scores may take on disk."""
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
    """The options of a `Session`."""
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl", help="see below")
    add_model_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_video_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")


def _eval(args: argparse.Namespace) -> int:
    session = Session(args)
    from ..evaluation import pictures, report
    from ..evaluation.evaluate import judge
    from ..evaluation.settings import ablations

    setting, questions = session.setting, session.questions
    if not setting.gated:
        raise InputError("--alpha-k 0 --alpha-v 0 is the baseline itself: give a strength above 0")
    settings = list(dict.fromkeys(one for gate in ablations(setting, args.ablate) for one in (gate.baseline(), gate)))
    configs = {one.name: {"max_frames": one.max_frames, **one.config.to_dict()} for one in settings}
    stopped = None
    with session.opened(f"{len(questions)} questions in {len(settings)} settings", configs) as log:
        try:
            judged = session.evaluate(questions, settings)
        except StoppedError as error:
            stopped, judged = error, judge(questions, settings, log)
    replies = [(one, question, log.records.get(one.key(question))) for one in settings for question in questions]
    failures = [
        {"id": question.id, "setting": one.name, "error": reply["error"]}
        for one, question, reply in replies
        if reply is not None and "error" in reply
    ]
    table = report.compared(questions, settings, judged)
    results = {
        "n_failed": len(failures),
        "n_unasked": sum(reply is None for *_, reply in replies),
        "n_unreadable": {one.name: int(some.sum()) for one, some in zip(settings, judged.unreadable, strict=True)},
        "settings": configs,
        "results": table,
        "failures": failures,
        "note": report.NOTE,
        "stopped": None if stopped is None else str(stopped),
    }
    counts = ("n_failed", "n_unasked", "n_unreadable")
    about = {**session.facts, "gate": setting.columns(), **{name: results[name] for name in counts}}
    session.leave(results, report.eval_markdown(about, table), table, pictures.draw_eval(table))
    if stopped is not None:
        raise stopped
    return int(bool(failures))


class Session:
    """What `eval` and `tune` share: a setting, questions, the replies so far, a checkpoint that gives others, a report.

    Attributes:
        setting: the gate that is asked for, and what else replies depend on.
        questions: of the file.
        evaluate: once it is opened, `evaluation.evaluate.evaluate` of questions and settings.
        facts: once it is opened, where the numbers come from.

    Raises:
        InputError: an option or a question is wrong.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        check_extras()
        config = config_of(args)
        if args.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
        from ..evaluation.questions import read_questions
        from ..evaluation.settings import Setting
        from ..output import check_folder

        check_folder(args.out)
        names = ("model", "dtype", "max_new_tokens", "fps", "sampling", "max_pixels", "strict", "fit")
        run = tuple((name, str(getattr(args, name))) for name in names)
        self.args, self.setting = args, Setting("gate", config, args.max_frames, run)
        self.questions = read_questions(args.questions)
        prepare_libraries()

    @contextmanager
    def opened(self, what: str, settings: Any) -> "Iterator[ResultsLog]":
        """The replies so far, judged by the questions as they are now.

        Args:
            what: will be asked, for people.
            settings: in which; reports of others have another tag.
        """
        import torch

        from .. import pipeline
        from ..batch.results import ResultsLog
        from ..evaluation import evaluate as ev
        from ..score_cache import ScoreCache

        args, progress = self.args, ProgressLine(not self.args.json)
        with ResultsLog(args.out / "replies.jsonl") as log, closing(progress):
            again = ev.refresh(self.questions, log)
            videos = {question.video for question in self.questions}
            if missing := sorted(str(video) for video in videos if not video.exists()):
                some = ", ".join(missing[:3])
                progress.say(f"{len(missing)} of {len(videos)} videos are missing, their questions fail: {some}")
            clip, cache = self._reader(progress), ScoreCache(args.out / "scores", SCORES_BYTES)
            model, processor = pipeline.load(args.model, args.device, args.dtype)
            dtype = str(model.dtype).removeprefix("torch.")
            progress.say(f"{args.model}: {type(model).__name__} on {model.device}, {dtype}")
            progress.say(f"{what}; {len(log.records)} replies in {log.path}")
            device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device
            self.facts = self._facts(f"{device}, {dtype}", settings)

            def ask(question: "Question", setting: "Setting") -> str:
                scores = None if setting.config.scorer == "uniform" else cache  # nothing to keep
                options: dict[str, Any] = {
                    "max_new_tokens": args.max_new_tokens,
                    "scores": scores,
                    "progress": progress,
                }
                frames = clip(question.video, setting.max_frames)
                return pipeline.answer(model, processor, frames, question.prompt(), setting.config, **options).answer

            self.evaluate = partial(ev.evaluate, ask=ask, log=log, progress=progress, again=again)
            yield log

    def _reader(self, progress: ProgressLine) -> "Callable[[Path, int], VideoClip]":
        """Reads clips that leave room for the longest of the questions, and keeps the last."""
        args, planner, told = self.args, make_planner(self.args, self.setting.config), set[tuple[Path, int]]()
        longest = max((question.prompt() for question in self.questions), key=len)

        @lru_cache(maxsize=1)
        def read(video: Path, max_frames: int) -> "VideoClip":
            line = _Quiet(False) if told else progress  # frames and memory of the first clip stand for the others
            clip = read_clip(args, video, line, max_frames)
            fitted = fit_clip(args, video, clip, longest, planner, line)[0]
            if told and (video, max_frames) not in told:
                for note in clip.notes:
                    progress.say(f"{video}: {note}")
                if len(fitted.frames) < len(clip.frames):
                    progress.say(f"{video}: --fit took {len(fitted.frames)} frames in place of {len(clip.frames)}")
            told.add((video, max_frames))
            return fitted

        return read

    def _facts(self, device: str, settings: Any) -> dict[str, Any]:
        from ..checkpoint import revision_of
        from ..evaluation.questions import digest, videos_of
        from ..output import versions

        run, found = dict(self.setting.run), versions()
        sha256, version = hashlib.sha256(self.args.questions.read_bytes()).hexdigest(), found["videoanchor-triton"]
        return {
            "run": run,
            "revision": revision_of(run["model"]),
            "questions": str(self.args.questions),
            "n_questions": len(self.questions),
            "n_videos": len({*videos_of(self.questions)}),
            "questions_sha256": sha256,
            "device": device,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": found,
            "tag": digest(settings, run, sha256, version)[:8],
        }

    def leave(self, results: dict[str, Any], text: str, rows: Sequence[dict[str, Any]], picture: bytes) -> None:
        """Writes a report, prints it, and says what is missing.

        Args:
            results: for the JSON, beside `facts`.
            text: Markdown.
            rows: of the CSV; what they lack is the same in all of them.
        """
        from ..evaluation import report

        args, tag, record = self.args, self.facts["tag"], {**results, **self.facts}
        same = {"n_unasked": 0, **record, **record["run"], "version": record["versions"]["videoanchor-triton"]}
        table = csv_text(report.COLUMNS[args.name], [{**same, **row} for row in rows])
        as_json = json_text(record)
        contents = {"md": text.encode(), "csv": table.encode(), "json": f"{as_json}\n".encode(), "png": picture}
        files, others = report.write(args.out, args.name, tag, contents)
        print(as_json if args.json else printable(text, lines=True))
        if not args.json:
            for path in files:
                print(f"wrote     {printable(path)}")
            print(f"          and the same with -{tag} in their names, which no other run replaces")
            for path in others:
                print(f"kept      {printable(path)}")
        if n := results["n_failed"]:
            where = printable(args.out / "replies.jsonl")
            print(f"{n} replies failed and are left out: see {where}; a rerun asks again", file=sys.stderr)


class _Quiet(ProgressLine):
    """Says nothing about a clip that is read again, or like others."""

    def say(self, text: str) -> None:
        pass
