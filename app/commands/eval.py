"""`videoanchor eval`: questions with known answers, with the gate and without."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..atomic_write import write_whole
from ..batch.stopping import StoppedError
from ..csv_text import csv_text
from ..libraries import prepare_libraries
from ..text import json_text, printable
from ..video.names import each
from ..video.remote import shown_url
from .shared import (
    Commands,
    ProgressLine,
    add_config_options,
    add_drawing_options,
    add_model_options,
    add_system_option,
    add_video_options,
    check_extras,
    config_of,
    drawing_of,
    fit_clips,
    make_planner,
    read_clips,
)

if TYPE_CHECKING:  # they import torch
    from ..batch.results import ResultsLog
    from ..evaluation.questions import Question
    from ..evaluation.settings import Setting
    from ..evaluation.thumbnails import Thumbnails
    from ..token_sampling import TokenSampling
    from ..video.names import Videos
    from ..video.reader import VideoClip

QUESTIONS_HELP = (
    "rows of the file (paths start at its folder):\n"
    '  {"video": "a.mp4", "question": "Which is nearer?", "options": ["sofa", "lamp"], "answer": "B"}\n'
    '  {"video": "a.mp4", "question": "How many chairs are there?", "answer": 4, "type": "counting"}\n'
    '  {"video": "b.mp4", "question": "Which room comes last?", "answer": "kitchen"}\n'
    '  {"video": ["a.mp4", "b.jpg"], "question": "Is the lamp of the picture in the video?", "answer": "yes"}\n'
    "options: multiple choice, by accuracy. A number: by VSI-Bench's mean relative accuracy. Text and 0: by exact\n"
    'match (also other numbers with "metric": "exact"). Results are given by "type".\n'
)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "eval",
        help="questions with known answers, with the gate and without",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Asks every question of a JSONL file with the gate on and with alpha = 0 through the same code,\n"
        "and compares the two, with intervals by a paired bootstrap over videos. Writes replies.jsonl (each reply as\n"
        "it comes: a rerun goes on where it stopped), eval.md, .csv, .json, .png and .html to --out, and the\n"
        "same with a tag of settings and questions in their names, which no other run replaces. A question that fails\n"
        "(its video is missing, for one) is left out of both sides: exit code 1, and a rerun asks it again.",
        epilog=f"{QUESTIONS_HELP}\n"
        "ablations, one thing changed at a time (NAME alone takes the values shown):\n"
        "  control=permuted,uniform    the same scores on tokens at random, and a score of 1 on all: a gate whose\n"
        "                              scores say something is better than both\n"
        "  scorer=ssc,kmeans,uniform   score=published,size,row_sum   clusters=8,16,24,32   terms=K,V,KV\n"
        "  frames=8,16,32   keep=0.5,0.25,0.1   group=ward,farthest,random   merge=counts,mean,drop (of --keep)\n\n"
        "several strengths, as --alpha-k 2,4 --alpha-v 0,1: each combination is compared with the answers without a\n"
        "gate; a video is decoded, seen by the vision tower and scored once.\n\n"
        "example:\n"
        "  videoanchor eval questions.jsonl --model DIR --alpha-k 4 --alpha-v 1 --out out/eval --ablate control",
    )
    add_questions_options(parser)
    about = "see below; may be repeated"
    parser.add_argument("--ablate", action="append", default=[], metavar="NAME[=A,B,...]", help=about)
    add_drawing_options(parser)
    add_config_options(parser, several=True)
    parser.set_defaults(command=_eval)


def add_questions_options(parser: argparse.ArgumentParser) -> None:
    """The options of a `Session`."""
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl", help="see below")
    add_model_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_video_options(parser)
    about = (
        "how questions are put: as they stand (plain), in VSI-Bench's words (vsi-bench), or by a text FILE with "
        "{question} and, on a line of its own, {options}; default: %(default)s, VSI-Bench's words for its own types of "
        "questions, plain for others"
    )
    add_system_option(parser)
    parser.add_argument("--prompt", default="auto", metavar="plain|vsi-bench|FILE", help=about)
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")


def _eval(args: argparse.Namespace) -> int:
    strengths = {name: getattr(args, name) for name in ("alpha_k", "alpha_v", "alpha_q")}
    strengths = {name: values for name, values in strengths.items() if values is not None}
    for name, values in strengths.items():
        setattr(args, name, values[0])
    session = Session(args, drawing_of(args))
    from ..evaluation import pictures, report
    from ..evaluation.card import answered, card_facts, protocol_card
    from ..evaluation.eval_page import eval_page
    from ..evaluation.evaluate import judge
    from ..evaluation.questions import videos_of
    from ..evaluation.settings import ablations, sweep
    from ..evaluation.thumbnails import Thumbnails

    thumbnails = session.thumbnails = Thumbnails(args.out, vars(args))
    setting, questions = session.setting, session.questions
    gates = sweep(setting, strengths)
    if len(gates) > 1 and args.ablate:
        raise InputError("--ablate varies one gate: give one strength each for K, V and Q, not several")
    gates = [*dict.fromkeys(gate for one in gates for gate in ablations(one, args.ablate))]
    if not any(one.config.alpha_k or one.config.alpha_v or one.config.merges for one in gates):
        raise InputError("--alpha-k 0 --alpha-v 0 is the baseline itself: give a strength above 0")
    settings = list(dict.fromkeys(one for gate in gates for one in (gate.baseline(), gate)))
    configs = {one.name: {"max_frames": one.max_frames, **one.config.to_dict()} for one in settings}
    stopped = None
    with session.opened(f"{len(questions)} questions in {len(settings)} settings", configs) as log:
        try:
            judged = session.evaluate(questions, settings)
        except StoppedError as error:
            stopped, judged = error, judge(questions, settings, log)
    asked = {one.key(question): (one.name, question.id) for one in settings for question in questions}
    errors = {key: reply["error"] for key in asked if "error" in (reply := log.records.get(key, {}))}
    table = report.compared(questions, settings, judged)
    card = protocol_card(session.facts, session.checkpoint, settings)
    results = {
        "n_failed": len(errors),
        "n_unasked": len(asked.keys() - log.records.keys()),
        "n_unreadable": {one.name: int(some.sum()) for one, some in zip(settings, judged.unreadable, strict=True)},
        "settings": configs,
        "results": table,
        "failures": [{"id": asked[key][1], "setting": asked[key][0], "error": error} for key, error in errors.items()],
        "note": report.NOTE,
        "stopped": None if stopped is None else str(stopped),
        "card": card,
        "answered": answered(questions, videos_of(questions).tolist(), settings, log.records, thumbnails),
    }
    counts = ("n_failed", "n_unasked", "n_unreadable")
    about = {
        **session.facts,
        **{"run": setting.columns(), **card_facts(card)},
        **{name: results[name] for name in counts},
    }
    page = eval_page({**results, **session.facts}, str(args.out / "eval.json")).encode()
    session.leave(results, report.eval_markdown(about, table), table, {"png": pictures.draw_eval(table), "html": page})
    if stopped is not None:
        raise stopped
    return int(bool(errors))


class Session:
    """What `eval` and `tune` share: a setting, questions, the replies so far, a checkpoint that gives others, a report.

    Attributes:
        setting: the gate that is asked for, and what else replies depend on.
        questions: of the file.
        evaluate, facts, checkpoint: once it is opened, `evaluate` of questions and settings, where the numbers come
            from, and what the checkpoint adds to their card.
        thumbnails: where frames are kept for a page; None for nowhere.

    Args:
        drawn: see `pipeline.answer`.

    Raises:
        InputError: an option or a question is wrong.
    """

    def __init__(self, args: argparse.Namespace, drawn: "TokenSampling | None" = None) -> None:
        check_extras()
        config = config_of(args)
        if args.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
        from ..evaluation.questions import read_questions
        from ..evaluation.settings import Setting
        from ..output import check_folder

        check_folder(args.out)
        names = ("model", "dtype", "prompt", "max_new_tokens", "fps", "sampling", "max_pixels", "strict", "fit")
        run = tuple((name, str(getattr(args, name))) for name in names)
        if args.system is not None:
            run += (("system", args.system),)
        if drawn is not None:
            run += tuple((name, str(value)) for name, value in asdict(drawn).items())
        self.drawn = drawn
        self.thumbnails: Thumbnails | None = None
        self.args, self.setting = args, Setting("gate", config, args.max_frames, run)
        self.questions = read_questions(args.questions, args.prompt, args.system)
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
        from ..checkpoint import revision_of
        from ..evaluation import evaluate as ev
        from ..evaluation.card import checkpoint_card
        from ..evaluation.questions import digest, may_be_there, videos_of
        from ..machine import versions
        from ..score_cache import ScoreCache
        from ..shared_vision import shared_vision

        args, progress = self.args, ProgressLine(not self.args.json)
        with ResultsLog(args.out / "replies.jsonl") as log, closing(progress):
            again = ev.refresh(self.questions, log)
            videos = {video for question in self.questions for video in each(question.video)}
            if missing := sorted(str(video) for video in videos if not may_be_there(video)):
                some = ", ".join(missing[:3])
                progress.say(f"{len(missing)} of {len(videos)} videos are missing, their questions fail: {some}")
            clips, cache = self._reader(progress), ScoreCache(args.out / "scores", max_bytes=2**30)
            model, processor = pipeline.load(args.model, args.device, args.dtype)
            dtype = str(model.dtype).removeprefix("torch.")
            progress.say(f"{args.model}: {type(model).__name__} on {model.device}, {dtype}")
            progress.say(f"{what}; {len(log.records)} replies in {log.path}")
            device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device
            run, sha256 = dict(self.setting.run), hashlib.sha256(args.questions.read_bytes()).hexdigest()
            self.facts = {
                "run": run,
                "revision": revision_of(args.model),
                "questions": str(args.questions),
                "n_questions": len(self.questions),
                "systems": sorted({question.system for question in self.questions if question.system is not None}),
                "templates": sorted({question.template for question in self.questions}),
                "n_videos": len({*videos_of(self.questions)}),
                "questions_sha256": sha256,
                "device": f"{device}, {dtype}",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "tag": digest(settings, run, sha256, version("videoanchor-triton"))[:8],
            }

            self.checkpoint = checkpoint_card(model, processor, args.max_pixels, args.max_new_tokens, self.drawn)
            options = {"max_new_tokens": args.max_new_tokens, "drawn": self.drawn, "progress": progress}
            answer = partial(pipeline.answer, model, processor, **options)

            def ask(question: "Question", setting: "Setting") -> str:
                scores = None if setting.config.scorer == "uniform" else cache  # nothing to keep
                media = clips(question.video, setting.max_frames)
                return answer(media, question.messages(), setting.config, scores=scores).text

            self.evaluate = partial(ev.evaluate, ask=ask, log=log, progress=progress, again=again)
            with shared_vision(model):
                yield log

    def _reader(self, progress: ProgressLine) -> "Callable[[Videos, int], list[VideoClip]]":
        """Reads clips that leave room for the longest of the questions, and keeps the last."""
        args, planner, told = self.args, make_planner(self.args, self.setting.config), set[tuple[Any, int]]()
        longest = max(self.questions, key=lambda one: len(one.prompt()) + len(one.system or "")).messages()

        @lru_cache(maxsize=1)
        def read(videos: "Videos", max_frames: int) -> "list[VideoClip]":
            line = _Quiet(False) if told else progress  # frames and memory of the first clip stand for the others
            clips = read_clips(args, videos, line, max_frames)
            fitted = fit_clips(args, videos, clips, longest, planner, line)[0]
            if told and (videos, max_frames) not in told:
                for video, clip, taken in zip(each(videos), clips, fitted, strict=True):
                    for note in clip.notes:
                        progress.say(f"{shown_url(video)}: {note}")
                    if len(taken.frames) < len(clip.frames):
                        n = f"{len(taken.frames)} frames in place of {len(clip.frames)}"
                        progress.say(f"{shown_url(video)}: --fit took {n}")
            told.add((videos, max_frames))
            if self.thumbnails is not None:
                self.thumbnails.keep(videos, max_frames, fitted)
            return fitted

        return read

    def leave(
        self, results: dict[str, Any], text: str, rows: Sequence[dict[str, Any]], others: dict[str, bytes]
    ) -> None:
        """Writes a report, prints it, and says what is missing. Its files are written with their tag in their names as
        well: those stay when another run writes the others.

        Args:
            results: for the JSON, beside `facts`.
            text: Markdown.
            rows: of the CSV; what they lack is the same in all of them.
            others: further files by suffix.
        """
        from ..evaluation.card import card_columns
        from ..evaluation.report import COLUMNS

        args, tag, record = self.args, self.facts["tag"], {**results, **self.facts}
        same = {"n_unasked": 0, **record, **record["run"], "version": version("videoanchor-triton")}
        if "card" in record:
            same |= card_columns(record["card"])
        table, as_json = csv_text(COLUMNS[args.name], [{**same, **row} for row in rows]), json_text(record)
        contents = {"md": text.encode(), "csv": table.encode(), "json": f"{as_json}\n".encode(), **others}
        for stem in (f"{args.name}-{tag}", args.name):
            for suffix, content in contents.items():
                write_whole(args.out / f"{stem}.{suffix}", content)
        print(as_json if args.json else printable(text, lines=True))
        if not args.json:
            for suffix in contents:
                print(f"wrote     {printable(args.out / f'{args.name}.{suffix}')}")
            print(f"          and the same with -{tag} in their names, which no other run replaces")
            for path in sorted({*args.out.glob(f"{args.name}-*.md")} - {args.out / f"{args.name}-{tag}.md"}):
                print(f"kept      {printable(path)}")
        if n := results["n_failed"]:
            where = printable(args.out / "replies.jsonl")
            print(f"{n} replies failed and are left out: see {where}; a rerun asks again", file=sys.stderr)


class _Quiet(ProgressLine):
    """Says nothing about a clip that is read again, or like others."""

    def say(self, text: str) -> None:
        pass
