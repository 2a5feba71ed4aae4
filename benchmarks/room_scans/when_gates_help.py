"""When does the gate help? Models whose truth is known, in places where it should.

    python benchmarks/room_scans/when_gates_help.py --out DIR --plain CHECKPOINT ... --hinted CHECKPOINT ...
        [--places PLACE ...] [--scans N]

The paper says that language overshadows visual tokens, and that scores of subspaces find those that matter. Places:

    trained        scans like those of the training, of 8 frames
    wide           16 frames over a scene twice as wide as any of the training
    long           24 frames, half as many again as any of the training, over the same scenes
    text between   60 words between video and question
    hint right     questions that name the right answer, for models in whose training 90% did ("Please answer red.")
    hint wrong     questions that name another: where wording and video disagree

Forms of the gate: on keys; on values; on keys and values in the published proportion; on values divided by the mean of
the gate over the scan's tokens, which keeps their size. Scores: of subspaces; cross-frame; both permuted and uniform,
the controls; truth, 1 on tokens that show an object. Each form and score gets the strength that is best on one half of
the scans and is reported on the other, paired, against no gate and against the permuted scores of the same form at the
strength that is best for those, with 95% intervals by bootstrap over scans.

Writes DIR/when-gates-help.json, .md and .png.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import videoanchor_triton as va
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.room_scans.accuracy import points
from benchmarks.room_scans.packed import TOKENS, Batch, Layout
from benchmarks.room_scans.train import HINT_WORDS, hinted
from videoanchor_triton.app.evaluation.paired import Difference, compare
from videoanchor_triton.app.room_scans import TEST_SEED, Asked, RoomScan

NAME = "when-gates-help"
N_ROWS = 20
FILLER = "these are frames of a video . " * 10
"""Says nothing, in words that the models know."""


class Place(NamedTuple):
    """Where a gate might help: scans, what is done to the questions, and the words that this adds."""

    n_frames: int = 8
    travel: int | None = None
    change: Callable[[list[Asked], np.random.Generator], list[Asked]] | None = None
    n_more: int = 0


def _after_filler(asked: list[Asked], _: np.random.Generator) -> list[Asked]:
    return [one._replace(text=f"{FILLER}{one.text}") for one in asked]


PLAIN = {
    "trained": Place(),
    "wide": Place(16, 350),
    "long": Place(24),
    "text between": Place(change=_after_filler, n_more=60),
}
HINTED = {
    "hint right": Place(change=lambda asked, rng: hinted(asked, 1.0, rng), n_more=HINT_WORDS),
    "hint wrong": Place(change=lambda asked, rng: hinted(asked, 0.0, rng), n_more=HINT_WORDS),
}
FORMS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "keys": lambda s, a: (1 + a * s, torch.ones_like(s)),
    "values": lambda s, a: (torch.ones_like(s), 1 + a * s),
    "both": lambda s, a: (1 + a * s, 1 + a * 2.5 / 9.5 * s),
    "values, size kept": lambda s, a: (torch.ones_like(s), (1 + a * s) / (1 + a * s).mean(1, keepdim=True)),
}
"""gamma_k and gamma_v (B, N) of scores (B, N) and a strength; "both" is in the proportion that is published."""
STRENGTHS = (0.5, 2.0, 9.5)
SCORES: dict[str, dict[str, Any]] = {
    "subspaces": {},
    "cross-frame": {"score": "cross_frame"},
    "permuted": {"score": "permuted"},
    "cross-frame, permuted": {"score": "cross_frame_permuted"},
    "uniform": {"scorer": "uniform"},
}
TRUTH, CONTROL, OWN_CONTROL = "truth", "permuted", "cross-frame, permuted"
CONTROLS = {"cross-frame": OWN_CONTROL, CONTROL: None, OWN_CONTROL: None}
"""What scores are compared with: values like theirs on tokens at random; of others `CONTROL`."""


@dataclass(frozen=True)
class Row:
    """The best strength of a form and a score in one place, on the scans that did not choose it."""

    checkpoint: str
    place: str
    form: str
    score: str
    strength: float
    without: float
    against_none: Difference
    against_control: Difference | None


class Study:
    """A checkpoint on the questions of a place.

    Args:
        checkpoint: a folder.
        n_scans: even; one half chooses strengths.
    """

    def __init__(self, checkpoint: Path, place: Place, n_scans: int) -> None:
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation={"text_config": "eager"}
        )
        self.layout = Layout(
            model.eval(),
            AutoProcessor.from_pretrained(checkpoint).tokenizer,
            place.n_frames,
            n_more=place.n_more,
        )
        rng = np.random.default_rng(0)
        scans = [RoomScan(TEST_SEED + n, place.n_frames, place.travel) for n in range(n_scans)]
        asked = [scan.questions() for scan in scans]
        if place.change is not None:
            asked = [place.change(one, rng) for one in asked]
        self.batch = self.layout.batch(scans, asked)
        with torch.inference_mode():
            self.seen = torch.cat([self.layout.see(frames) for frames in self.batch.frames.split(N_ROWS)])
        frames = torch.arange(place.n_frames).repeat_interleave(TOKENS)
        n_clusters, rank = (12, 32) if place.n_frames <= 8 else (24, 64)
        self.scores = {
            name: torch.stack(
                [
                    va.anchor_scores(
                        tokens,
                        va.VideoAnchorConfig(alpha_k=0, alpha_v=0, n_clusters=n_clusters, pca_rank=rank, **options),
                        frames=frames,
                    ).scores
                    for tokens in self.seen
                ]
            )
            for name, options in SCORES.items()
        }
        self.scores[TRUTH] = torch.stack([torch.from_numpy(s.objects_of_tokens().ravel() > 0).float() for s in scans])

    @torch.inference_mode()
    def right(self, gates: tuple[Tensor, Tensor] | None = None) -> np.ndarray:
        """(scans, kinds) 1, 0, or NaN where a scan has no such question."""
        found = []
        for start in range(0, len(self.seen), N_ROWS):
            rows = slice(start, start + N_ROWS)
            one = Batch(*(part[rows] for part in self.batch))
            gamma_k, gamma_v = (None, None) if gates is None else (gates[0][rows], gates[1][rows])
            hidden = self.layout.hidden(self.seen[rows], one.ids, gamma_k=gamma_k, gamma_v=gamma_v)
            logits = self.layout.logits(hidden, one.place)
            found.append(torch.where(one.answers >= 0, (logits.argmax(-1) == one.answers).float(), torch.nan))
        return torch.cat(found).numpy()


def difference(after: np.ndarray, before: np.ndarray) -> Difference:
    """Of (scans, kinds), over scans."""
    known = ~np.isnan(before)
    return compare(after[known], before[known], np.nonzero(known)[0])


def rows_of(name: str, place: str, study: Study) -> list[Row]:
    """Each form with each score; half of the scans choose the strength."""
    without = study.right()
    choose, judge = slice(0, None, 2), slice(1, None, 2)
    found: dict[tuple[str, str], tuple[float, np.ndarray]] = {}
    for form, make in FORMS.items():
        for score, scores in study.scores.items():
            tried = [(strength, study.right(make(scores, strength))) for strength in STRENGTHS]
            found[form, score] = max(tried, key=lambda one: round(float(np.nanmean(one[1][choose])), 12))
    rows = []
    for (form, score), (strength, right) in found.items():
        other = CONTROLS.get(score, CONTROL)
        control = None if other is None else difference(right[judge], found[form, other][1][judge])
        base = float(np.nanmean(without[judge]))
        rows.append(Row(name, place, form, score, strength, base, difference(right[judge], without[judge]), control))
    return rows


def marked(one: Difference | None) -> str:
    """Points, bold where the interval leaves out 0."""
    if one is None:
        return ""
    return points(one) if one.verdict == "no gain shown" else f"**{points(one)}**"


def summary(rows: Sequence[Row], n_scans: int) -> str:
    """For people."""
    columns: dict[str, Callable[[Row], object]] = {
        "checkpoint": lambda row: row.checkpoint,
        "place": lambda row: row.place,
        "no gate, %": lambda row: f"{100 * row.without:.1f}",
        "form": lambda row: row.form,
        "scores": lambda row: row.score,
        "best strength": lambda row: f"{row.strength:g}",
        "against none": lambda row: marked(row.against_none),
        "against permuted": lambda row: marked(row.against_control),
    }
    return (
        f"Strengths of {', '.join(f'{one:g}' for one in STRENGTHS)}, the best on {n_scans // 2} scans, reported on "
        f"{n_scans - n_scans // 2} others: points of accuracy, paired, with 95% intervals by bootstrap over scans; "
        f"bold where the interval leaves out 0 and 6 or more scans changed.\n\n{report.table(rows, columns)}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a place: the difference of each form and score from no gate, a mark a checkpoint."""
    places = list(dict.fromkeys(row.place for row in rows))
    scores = [*SCORES, TRUTH]
    figure, panels = plt.subplots(1, len(places), figsize=(2.4 * len(places), 5), sharey=True, squeeze=False)
    labels = [f"{form}: {score}" for form in FORMS for score in scores]
    for panel, place in zip(panels[0], places, strict=True):
        mine = [row for row in rows if row.place == place]
        names = list(dict.fromkeys(row.checkpoint for row in mine))
        for row in mine:
            at = -labels.index(f"{row.form}: {row.score}") - 0.2 * names.index(row.checkpoint)
            one, colour = row.against_none, report.COLOURS[scores.index(row.score)]
            panel.plot([100 * one.low, 100 * one.high], [at, at], color=colour, linewidth=1.4)
            marker = report.MARKERS[names.index(row.checkpoint)]
            panel.plot(100 * one.difference, at, marker, color=colour, markersize=3)
        panel.axvline(0, color="#555555", linewidth=0.8)
        panel.set_title(place, fontsize=9)
        panel.set_xlabel("points", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks([-n for n in range(len(labels))], labels, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=80)
    for name in ("plain", "hinted"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=[], metavar="CHECKPOINT")
    parser.add_argument("--places", nargs="+", choices=(*PLAIN, *HINTED), default=[*PLAIN, *HINTED], metavar="PLACE")
    args = parser.parse_args()
    rows: list[Row] = []
    for checkpoints, places in ((args.plain, PLAIN), (args.hinted, HINTED)):
        for checkpoint in checkpoints:
            for place, about in places.items():
                if place not in args.places:
                    continue
                name = f"{checkpoint.parent.name}/{checkpoint.name}"
                rows += rows_of(name, place, Study(checkpoint, about, args.scans))
                print(f"{name}, {place}: {100 * rows[-1].without:.1f} without a gate", flush=True)
    about = environment(torch.device("cpu"), processor())
    report.write_record(args.out, NAME, about, rows, summary(rows, args.scans))
    draw(rows, args.out / f"{NAME}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
