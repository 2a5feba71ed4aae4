"""`videoanchor tune`: the strengths of the gate for a model, from questions with known answers."""

import argparse
import json
from typing import Any

from ..errors import InputError
from .eval import QUESTIONS_HELP, about, add_questions_options, load_asker, run_facts
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
    run = run_facts(args)
    check_folder(args.out)
    from ..batch.results import ResultsLog
    from ..evaluation import evaluate as ev
    from ..evaluation import tune_report as report
    from ..evaluation.tune import conclusion, split

    questions = ev.read_questions(args.questions)
    order, held = split([question.type for question in questions], ev.videos_of(questions), args.held_out, args.seed)
    progress = ProgressLine(not args.json)
    with ResultsLog(args.out / "replies.jsonl") as log:
        ev.forget_failures(log)
        asker = load_asker(args, config, questions, progress)
        progress.say(
            f"{len(order)} questions to search on, {len(held)} held out; {len(log.records)} replies in {log.path}"
        )
        tuner = _Tuner(questions, ev.Setting("tune", config, args.max_frames, run), asker, log, progress)
        point, rows, draw = (tuner.by_grid if args.method == "grid" else tuner.by_gradient)(args, order)
        difference = tuner.judge(point, held)
    progress.close()
    said = conclusion(point, difference)
    n_failed = sum("error" in record for record in log.records.values())
    record = {
        "conclusion": said,
        "alpha_k": point[0],
        "alpha_v": point[1],
        "held_out": None if difference is None else difference.to_dict(),
        "method": args.method,
        "questions": str(args.questions),
        "held_out_ids": [questions[number].id for number in held],
        "n_failed": n_failed,
        "seed": args.seed,
        "config": {name: value for name, value in config.to_dict().items() if name not in ("alpha_k", "alpha_v")},
        "search": rows,
        **about(args),
    }
    written = report.write(args.out, said, rows, record, lambda path: draw(path, difference, said))
    print(json.dumps(record, indent=2, ensure_ascii=False) if args.json else report.markdown(said, rows))
    if not args.json:
        print("\n".join(f"wrote     {path}" for path in written))
    if n_failed:
        progress.say(
            f"{n_failed} replies failed and are left out: see {args.out / 'replies.jsonl'}; a rerun asks again"
        )
    return 1 if n_failed else 0


def _check_method(args: argparse.Namespace) -> None:
    other = {"grid": ("steps", "batch", "rate", "start"), "gradient": ("grid_k", "grid_v")}[args.method]
    for name in other:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is not for --method {args.method}: leave it out")
    if args.start is not None and len(args.start) != 2:
        raise InputError(f"--start: expected two strengths K,V, got {args.start}")


class _Tuner:
    """The search and its judgement, on one checkpoint."""

    def __init__(self, questions: Any, setting: Any, asker: Any, log: Any, progress: ProgressLine) -> None:
        self.questions, self.setting, self.asker, self.log, self.progress = questions, setting, asker, log, progress

    def scores(self, points: Any, numbers: Any) -> Any:
        """(points, numbers) scores."""
        from ..evaluation.evaluate import evaluate

        settings = [self._at(point) for point in points]
        some = [self.questions[number] for number in numbers]
        return evaluate(some, settings, self.asker, self.log, self.progress)

    def _at(self, point: tuple[float, float]) -> Any:
        from dataclasses import replace

        if not any(point):
            return self.setting.baseline()
        config = replace(self.setting.config, alpha_k=point[0], alpha_v=point[1])
        return replace(self.setting, name=f"alpha_k {point[0]:g}, alpha_v {point[1]:g}", config=config)

    def judge(self, point: tuple[float, float], held: list[int]) -> Any:
        """The point against no gate on the questions held out; None for no gate itself."""
        import numpy as np

        from ..evaluation.evaluate import videos_of
        from ..evaluation.paired import compare

        if not any(point):
            return None
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
        from ..evaluation.evaluate import digest
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
