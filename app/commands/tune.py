"""`videoanchor tune`: the strengths of the gate for a model, from questions with known answers."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from .eval import QUESTIONS_HELP, Session, add_questions_options
from .shared import Commands, add_score_options, numbers

if TYPE_CHECKING:  # they import torch
    from ..evaluation.settings import Setting
    from ..evaluation.tune import Point

GRID = "0,0.5,1,2,4,8"


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune",
        help="find alpha_k and alpha_v for a model from questions with known answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Searches the strengths of the gate on one part of the questions and judges what it finds, or the\n"
        "best gate where it finds that none is better, against alpha = 0 on the videos held out: without an interval\n"
        "above 0 there it says that no gain is shown.\n"
        "Writes replies.jsonl (each reply as it comes: a rerun goes on where it stopped), tune.md, tune.csv,\n"
        "tune.json and tune.png to --out.",
        epilog=f"{QUESTIONS_HELP}\nexample:\n  videoanchor tune questions.jsonl --model DIR --out out/tune",
    )
    add_questions_options(parser)
    search = parser.add_argument_group("search, of one coordinate after the other, with successive halving")
    about = "in whole videos, of each type; default: %(default)s"
    search.add_argument("--held-out", type=float, default=0.3, metavar="SHARE", help=about)
    search.add_argument("--seed", type=int, default=0, metavar="N", help="of the split; default: %(default)s")
    for name in ("k", "v"):
        about = f"values of alpha_{name}; default: %(default)s"
        search.add_argument(f"--grid-{name}", type=numbers, default=GRID, metavar="A,B,...", help=about)
    parser.add_argument("--decode", choices=("persist", "prefill"), help="gate also while decoding (default) or not")
    add_score_options(parser)
    parser.set_defaults(command=_tune, preset=None, alpha_q=None, alpha_k=1.0, alpha_v=1.0)  # alphas are replaced


def _tune(args: argparse.Namespace) -> int:
    session = Session(args)
    setting, questions = session.setting, session.questions
    for name, values in (("k", args.grid_k), ("v", args.grid_v)):
        for value in values:
            try:
                replace(setting.config, **{f"alpha_{name}": value})
            except ValueError as error:
                raise InputError(f"--grid-{name}: {error}") from error
    import numpy as np

    from ..evaluation import pictures, report
    from ..evaluation.paired import compare
    from ..evaluation.questions import videos_of
    from ..evaluation.tune import best_gate, conclusion, coordinate_search, split

    videos = videos_of(questions)
    order, held = split([question.type for question in questions], videos, args.held_out, args.seed)
    replies: dict[tuple[Point, int], tuple[float, bool]] = {}
    search = {"grid_k": args.grid_k, "grid_v": args.grid_v, "held_out_share": args.held_out, "seed": args.seed}

    def scores(points: "Sequence[Point]", numbers: Sequence[int]) -> Any:
        found = session.evaluate([questions[n] for n in numbers], [_at(setting, point) for point in points])
        pairs = [(point, number) for point in points for number in numbers]
        replies.update(zip(pairs, zip(found.scores.flat, found.unreadable.flat, strict=True), strict=True))
        return found.scores

    what = f"{len(order)} questions to search on, {len(held)} held out"
    with session.opened(what, [setting.config.to_dict(), args.max_frames, search]) as log:
        point, trials = coordinate_search(scores, args.grid_k, args.grid_v, order)
        gate = point if any(point) else best_gate(trials)
        difference, judged = None, order if gate is None else held
        if gate is not None:
            after, before = scores([gate, (0.0, 0.0)], held)
            known = ~np.isnan(after) & ~np.isnan(before)
            if not known.any():
                raise InputError(f"no question held out was answered: see {log.path}")
            difference = compare(after[known], before[known], videos[held][known])
    failed = {pair for pair, (score, _) in replies.items() if np.isnan(score)}
    unreadable = [garbage for pair, (_, garbage) in replies.items() if pair[1] in judged and pair not in failed]
    counts = {"n_failed": len(failed), "n_unreadable": int(sum(unreadable))}
    said = conclusion(point, gate, difference, counts["n_unreadable"], len(unreadable))
    found = replace(setting, config=replace(setting.config, alpha_k=point[0], alpha_v=point[1]))
    rows = [asdict(trial) for trial in trials]
    results = {
        "conclusion": said,
        "alpha_k": point[0],
        "alpha_v": point[1],
        "held_out_gate": None if gate is None else dict(zip(("alpha_k", "alpha_v"), gate, strict=True)),
        "held_out": None if difference is None else asdict(difference),
        "held_out_ids": [questions[number].id for number in held],
        "config": found.config.to_dict(),
        "max_frames": args.max_frames,
        **counts,
        **search,
        "search": rows,
    }
    text = report.tune_markdown({**session.facts, "run": found.columns(), "search": search, **counts}, said, trials)
    session.leave(results, text, rows, {"png": pictures.draw_search(trials, difference, said)})
    return int(bool(failed))


def _at(setting: "Setting", point: "Point") -> "Setting":
    return setting.at(alpha_k=point[0], alpha_v=point[1]) if any(point) else setting.baseline()
