"""`videoanchor tune`: the strengths of the gate for a model, from questions with known answers."""

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

from ...integrations.errors import InputError
from ..csv_text import csv_text
from ..text import json_text, printable
from .eval import (
    QUESTIONS_HELP,
    about,
    add_questions_options,
    cited,
    facts,
    load_asker,
    replies_as_of_now,
    run_facts,
    tell,
)
from .shared import Commands, ProgressLine, add_score_options, check_extras, config_of

GRID = "0,0.5,1,2,4,8"


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune",
        help="find alpha_k and alpha_v for a model from questions with known answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Searches the strengths of the gate on one part of the questions and judges what it finds,\n"
        "against alpha = 0, on the videos held out: without an interval above 0 there it says that no gain is shown.\n"
        "Writes replies.jsonl (each reply as it comes: a rerun goes on where it stopped), tune.md, tune.csv,\n"
        "tune.json and tune.png to --out.",
        epilog=f"{QUESTIONS_HELP}\n"
        "examples:\n"
        "  videoanchor tune questions.jsonl --model DIR --out out/tune\n"
        "  videoanchor tune questions.jsonl --model DIR --out out/tune --method gradient --steps 40",
    )
    add_questions_options(parser)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--method",
        choices=("grid", "gradient"),
        default="grid",
        help="grid: coordinate search with successive halving; gradient: descent on -log p(right answer); "
        "default: %(default)s",
    )
    search.add_argument(
        "--held-out",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="in whole videos, of each type; default: %(default)s",
    )
    search.add_argument("--seed", type=int, default=0, metavar="N", help="of the split; default: %(default)s")
    grid = parser.add_argument_group("--method grid")
    grid.add_argument("--grid-k", type=_numbers, metavar="A,B,...", help=f"values of alpha_k; default: {GRID}")
    grid.add_argument("--grid-v", type=_numbers, metavar="A,B,...", help=f"values of alpha_v; default: {GRID}")
    gradient = parser.add_argument_group("--method gradient")
    gradient.add_argument("--steps", type=int, metavar="N", help="default: 30")
    gradient.add_argument("--batch", type=int, metavar="N", help="questions a step; default: 4")
    gradient.add_argument("--rate", type=float, metavar="R", help="of Adam on log alpha; default: 0.1")
    gradient.add_argument("--start", type=_numbers, metavar="K,V", help="first alpha_k and alpha_v; default: 1,1")
    parser.add_argument("--decode", choices=("persist", "prefill"), help="gate also while decoding (default) or not")
    add_score_options(parser)
    parser.set_defaults(command=_tune)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _tune(args: argparse.Namespace) -> int:
    from ..output import check_folder

    check_extras()
    _check_method(args)
    args.preset = args.alpha_q = None
    args.alpha_k = args.alpha_v = 1.0  # replaced by those that are tried
    config = config_of(args)
    for name, values in (("alpha_k", args.grid_k), ("alpha_v", args.grid_v)):
        for value in values or ():
            try:
                replace(config, **{name: value})
            except ValueError as error:
                raise InputError(f"--grid-{name[-1]}: {error}") from error
    run = run_facts(args)
    check_folder(args.out)
    from ..batch.results import ResultsLog
    from ..batch.stopping import StoppedError
    from ..evaluation import evaluate as ev
    from ..evaluation.questions import read_questions, videos_of
    from ..evaluation.tune import conclusion, split

    questions = read_questions(args.questions)
    order, held = split([question.type for question in questions], videos_of(questions), args.held_out, args.seed)
    progress = ProgressLine(not args.json)
    with ResultsLog(args.out / "replies.jsonl") as log, closing(progress):
        again = replies_as_of_now(log, questions, progress)
        asker = load_asker(args, config, questions, progress)
        progress.say(
            f"{len(order)} questions to search on, {len(held)} held out; {len(log.records)} replies in {log.path}"
        )
        tuner = _Tuner(questions, ev.Setting("tune", config, args.max_frames, run), asker, log, progress, again)
        try:
            point, rows, draw = (tuner.by_grid if args.method == "grid" else tuner.by_gradient)(args, order)
            difference = tuner.judge(point, held)
        except StoppedError as error:
            why = printable(error)
            print(
                f"videoanchor tune: {why}: {printable(log.path)} has what was done, the same command goes on",
                file=sys.stderr,
            )
            return 1
        said = conclusion(point, difference, *tuner.unreadable())
        record = {
            "conclusion": said,
            "alpha_k": point[0],
            "alpha_v": point[1],
            "held_out": None if difference is None else difference.to_dict(),
            "method": args.method,
            "questions": str(args.questions),
            "n_questions": len(questions),
            "n_videos": len({*videos_of(questions)}),
            "held_out_ids": [questions[number].id for number in held],
            "n_failed": tuner.n_failed(),
            "n_unreadable": tuner.unreadable()[0],
            "seed": args.seed,
            "config": {name: value for name, value in config.to_dict().items() if name not in ("alpha_k", "alpha_v")},
            "max_frames": args.max_frames,
            "search": rows,
            "stopped": None,
            **about(args, asker),
        }
    return _write(args, record, lambda path: draw(path, difference, said))


def _write(args: argparse.Namespace, record: dict[str, Any], draw: Any) -> int:
    from ..evaluation import report
    from ..evaluation.questions import digest
    from ..evaluation.tune_report import markdown

    searched = {
        name: getattr(args, name) for name in ("grid_k", "grid_v", "steps", "batch", "rate", "start", "held_out")
    }
    known = ("method", "seed", "config", "max_frames", "run", "questions_sha256")
    version = record["versions"]["videoanchor-triton"]
    record["tag"] = digest(searched, [record[name] for name in known], version)[:8]
    config = record["config"]
    about = {
        **facts(record),
        "scores": ", ".join(f"{name} {config[name]}" for name in ("scorer", "score", "n_clusters", "pca_rank"))
        + f", decode {config['decode']}",
        "frames": f"{args.max_frames} at most, sampling {args.sampling}, fps {args.fps}",
        "replies": f"{record['n_failed']} failed; of those that are judged, nothing could be read from "
        f"{record['n_unreadable']}",
    }
    text = markdown(record["conclusion"], record["search"], about)
    rows = [{**row, "model": record["run"]["model"], **cited({**record, "n_unasked": 0})} for row in record["search"]]
    texts = {"md": text, "csv": csv_text([*rows[0]], rows), "json": json_text(record) + "\n"}
    return tell(args, record, text, report.write(args.out, "tune", record["tag"], texts, draw))


def _check_method(args: argparse.Namespace) -> None:
    other = {"grid": ("steps", "batch", "rate", "start"), "gradient": ("grid_k", "grid_v")}[args.method]
    for name in other:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is not for --method {args.method}: leave it out")
    if args.start is not None and len(args.start) != 2:
        raise InputError(f"--start: expected two strengths K,V, got {args.start}")


class _Tuner:
    """The search and its judgement, on one checkpoint."""

    def __init__(
        self, questions: Any, setting: Any, asker: Any, log: Any, progress: ProgressLine, again: set[str]
    ) -> None:
        self.questions, self.setting, self.asker, self.log, self.progress = questions, setting, asker, log, progress
        self._again = again
        self._keys: set[str] = set()
        self._readable: dict[str, bool] = {}

    def scores(self, points: Any, numbers: Any) -> Any:
        """(points, numbers) scores."""
        from ..evaluation.evaluate import evaluate, unreadable

        settings = [self._at(point) for point in points]
        some = [self.questions[number] for number in numbers]
        scores = evaluate(some, settings, self.asker, self.log, self.progress, self._again)
        for setting in settings:
            keys = [setting.key(question) for question in some]
            self._keys.update(keys)
            answered = [(key, garbage) for key, garbage in zip(keys, unreadable(some, setting, self.log), strict=True)]
            self._readable |= {key: not garbage for key, garbage in answered if "reply" in self.log.records[key]}
        return scores

    def n_failed(self) -> int:
        return sum("error" in self.log.records[key] for key in self._keys)

    def unreadable(self) -> tuple[int, int]:
        """Of the replies that are judged, those from which nothing could be read, and all of them."""
        return sum(not one for one in self._readable.values()), len(self._readable)

    def _at(self, point: tuple[float, float]) -> Any:
        from dataclasses import replace

        if not any(point):
            return self.setting.baseline()
        config = replace(self.setting.config, alpha_k=point[0], alpha_v=point[1])
        return replace(self.setting, name=f"alpha_k {point[0]:g}, alpha_v {point[1]:g}", config=config)

    def judge(self, point: tuple[float, float], held: list[int]) -> Any:
        """The point against no gate on the questions held out; None for no gate itself."""
        import numpy as np

        from ..evaluation.paired import compare
        from ..evaluation.questions import videos_of

        if not any(point):
            return None
        self._readable.clear()  # those of the search are judged no more
        after, before = self.scores([point, (0.0, 0.0)], held)
        known = ~np.isnan(after) & ~np.isnan(before)
        if not known.any():
            raise InputError(f"no question held out was answered: see {self.log.path}")
        some = [self.questions[number] for number, answered in zip(held, known, strict=True) if answered]
        return compare(after[known], before[known], videos_of(some))

    def by_grid(self, args: argparse.Namespace, order: list[int]) -> Any:
        from ..evaluation.tune import coordinate_search
        from ..evaluation.tune_report import draw_search

        grids = (args.grid_k or _numbers(GRID), args.grid_v or _numbers(GRID))
        point, trials = coordinate_search(self.scores, *grids, order)
        rows = [trial.to_dict() for trial in trials]
        return point, rows, lambda path, difference, said: draw_search(path, trials, difference, said)

    def by_gradient(self, args: argparse.Namespace, order: list[int]) -> Any:
        from ..evaluation.questions import digest
        from ..evaluation.tune_gradient import answer_loss, learn, recomputed_layers
        from ..evaluation.tune_report import draw_descent

        model, setting = self.asker.model, self.setting

        def loss(alphas: Any, number: int) -> Any:
            question = self.questions[number]
            clip = self.asker.clip(question.video, setting.max_frames)
            return answer_loss(model, self.asker.processor, clip, question, setting.config, alphas, self.asker.scores)

        options = {"n_steps": args.steps, "batch": args.batch, "rate": args.rate, "start": args.start}
        options = {name: value for name, value in options.items() if value is not None}
        asked = [(setting.key(self.questions[number]), self.questions[number].answer) for number in order]
        key = digest({name: value for name, value in options.items() if name != "n_steps"}, asked)
        with recomputed_layers(model):
            point, steps = learn(loss, order, self.log, key, **options, progress=self.progress)
        return point, steps, lambda path, difference, said: draw_descent(path, steps, difference, said)
