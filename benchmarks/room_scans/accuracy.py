"""Accuracy as the judge: the trained model that comes with the package, asked in every way that there is.

    python benchmarks/room_scans/accuracy.py --out DIR [--scans 60] [--checkpoint DIR] [--only GROUP ...]

Each way of answering is compared with transformers' own, without this package, on the same questions about held-out
scans: accuracy by kind, and the paired difference with a 95% interval by bootstrap over scans. Groups:

    paths    another way to the same answers: the drop-in at alpha 0, batches, chunks, caches, backends
    rounded  weights and caches in fewer bits
    gate     strengths, with the scores of subspaces, their controls (permuted, uniform) and the truth (1 on tokens that
             show an object)
    keep     fewer visual tokens: merged with counts, by each rule; and what that is compared with, merged as if each
             group were one token ("no counts"), and representatives alone ("dropped")

Writes DIR/accuracy.json, .md and .png. The exit status is 1 if a path changes an answer.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import videoanchor_triton as va
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from videoanchor_triton.anchor.config import UNGATED
from videoanchor_triton.anchor.grouping import Group
from videoanchor_triton.app.evaluation.paired import ALL, Difference, compare, groups_of
from videoanchor_triton.app.output_size import Sizes, largest_change, output_sizes
from videoanchor_triton.app.prompt import video_metadata
from videoanchor_triton.app.room_scans import CHECKPOINT, TEST_SEED, RoomScan
from videoanchor_triton.integrations.transformers import attention
from videoanchor_triton.kernels.api import anchored_attention

NAME = "accuracy"
SCORES: dict[str, Any] = {"n_clusters": 12, "pca_rank": 32}
"""For 96 visual tokens."""
SUBSPACES: dict[str, Any] = {"scorer": "ssc", **SCORES}
KEEP = replace(UNGATED, keep=0.25, group="farthest")
MERGES = {"mean": "no counts", "drop": "dropped"}


@dataclass(frozen=True)
class Way:
    """A way of answering.

    Args:
        group, name: see the top of this file.
        config: of the gate; None leaves this package out.
        n_rows: prompts in a batch.
        options: of generate().
        cache: makes what keys and values are kept in.
        round_weights: what is done to each weight of the decoder's linear layers.
        truth: scores are 1 on tokens that show an object, else 0.
        backend: of `anchored_attention`.
    """

    group: str
    name: str
    config: va.VideoAnchorConfig | None = None
    n_rows: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    cache: Callable[[], Any] | None = None
    round_weights: Callable[[Tensor], Tensor] | None = None
    truth: bool = False
    backend: str = "auto"


class RoundedCache(DynamicCache):
    """Keys and values as an 8-bit cache gives them back.

    Args:
        rounded: of (batch, heads, tokens, width).
    """

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounded = rounded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See transformers."""
        return super().update(self._rounded(key_states), self._rounded(value_states), *args, **kwargs)


def by_row(bits: int) -> Callable[[Tensor], Tensor]:
    """Integers of so many bits with a scale for each row."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return (x / scale).round() * scale

    return rounded


def e4m3(x: Tensor) -> Tensor:
    """8-bit floating point, without a scale."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def gate(**options: Any) -> va.VideoAnchorConfig:
    """With the scores of this benchmark."""
    return va.VideoAnchorConfig(**{"alpha_k": 0.0, "alpha_v": 0.0, **SCORES, **options})


def ways() -> list[Way]:
    """All of them, `transformers` first, which the others are compared with."""
    strengths = [(0.5, 0.0), (2.0, 0.0), (9.5, 0.0), (0.0, 1.0), (2.0, 1.0)]
    named = {f"alpha_k {k:g}, alpha_v {v:g}": {"alpha_k": k, "alpha_v": v} for k, v in strengths}
    named["published (q 4, k 9.5, v 2.5)"] = {"alpha_q": 4.0, "alpha_k": 9.5, "alpha_v": 2.5}
    scores: dict[str, dict[str, Any]] = {
        "subspaces": {},
        "permuted": {"score": "permuted"},
        "uniform": {"scorer": "uniform"},
        "cross-frame": {"score": "cross_frame"},
    }
    found = [
        Way("paths", "transformers"),
        Way("paths", "alpha 0", UNGATED),
        Way("paths", "alpha 0, a prompt at a time", UNGATED, n_rows=1),
        Way("paths", "alpha 0, chunks of 40", UNGATED, options={"prefill_chunk_size": 40}),
        Way("paths", "alpha 0, static cache", UNGATED, options={"cache_implementation": "static"}),
        Way("paths", "alpha 0, no cache", UNGATED, options={"use_cache": False}),
        Way("paths", "alpha 0, reference attention", UNGATED, backend="reference"),
        *(Way("rounded", f"weights in int{bits}", UNGATED, round_weights=by_row(bits)) for bits in (8, 4, 3)),
        Way("rounded", "cache in int8", UNGATED, cache=lambda: RoundedCache(by_row(8))),
        Way("rounded", "cache in fp8", UNGATED, cache=lambda: RoundedCache(e4m3)),
    ]
    for name, strength in named.items():
        for score, options in scores.items():
            found.append(Way("gate", f"{name}, {score}", gate(**strength, **options)))
        found.append(Way("gate", f"{name}, truth", gate(**strength, scorer="uniform"), truth=True))
    weak = {"alpha_k": 2.0, "alpha_v": 0.0}
    found.append(Way("gate", "alpha_k 2, alpha_v 0, subspaces, prefill alone", gate(**weak, decode="prefill")))
    for keep in (0.5, 0.25, 0.1):
        for group in get_args(Group):
            if group == "evs" and keep < 1 / 8:  # of eight frames it keeps the first
                continue
            scorer: dict[str, Any] = SUBSPACES if group == "subspace" else {}
            config = replace(UNGATED, keep=keep, group=group, **scorer)
            found.append(Way("keep", f"keep {keep:g}, {group}", config))
            name = {"ward": "mean", "farthest": "drop", "evs": "drop", "vidcom2": "drop", "random": "drop"}.get(group)
            if name is not None:
                found.append(Way("keep", f"keep {keep:g}, {group}, {MERGES[name]}", replace(config, merge=name)))
    found.append(Way("keep", "keep 0.25, farthest, chunks of 10", KEEP, options={"prefill_chunk_size": 10}))
    found.append(Way("keep", "keep 0.25, farthest, a prompt at a time", KEEP, n_rows=1))
    return found


@contextmanager
def attention_by(backend: str) -> Iterator[None]:
    """The backend of `anchored_attention`."""
    with mock.patch.object(attention, "anchored_attention", partial(anchored_attention, backend=backend)):
        yield


class Asker:
    """A checkpoint and questions about held-out scans.

    Args:
        checkpoint: a folder.
        n_scans: of 8 frames.
        n_frames, travel: see `RoomScan`.
    """

    def __init__(self, checkpoint: Path, n_scans: int, n_frames: int = 8, travel: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.processor.tokenizer.padding_side = "left"
        self.scans = [RoomScan(TEST_SEED + n, n_frames, travel) for n in range(n_scans)]
        self.asked = [(n, one) for n, scan in enumerate(self.scans) for one in scan.questions()]
        self.kinds = np.array([one.kind for _, one in self.asked])
        self.videos = np.array([n for n, _ in self.asked])
        self.sizes: Sizes = {}
        self._known: dict[Any, va.AnchorResult] = {}
        self._sums: Tensor | None = None

    def model(self, way: Way) -> Any:
        """Loaded anew where weights are rounded."""
        model: Any = AutoModelForImageTextToText.from_pretrained(self.checkpoint, dtype=torch.float32).eval()
        if way.round_weights is not None:
            for name, module in model.model.language_model.named_modules():
                if isinstance(module, torch.nn.Linear) and "layers" in name:
                    module.weight.data = way.round_weights(module.weight.data)
        return model

    def inputs(self, numbers: Sequence[int]) -> Any:
        """Of a batch of questions."""
        texts, clips = [], [self.scans[self.asked[n][0]].clip() for n in numbers]
        for n in numbers:
            content = [{"type": "video"}, {"type": "text", "text": self.asked[n][1].text}]
            message = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        return self.processor(
            text=texts,
            videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips],
            video_metadata=[video_metadata(clip) for clip in clips],
            do_sample_frames=False,
            padding=True,
            return_tensors="pt",
        )

    @torch.inference_mode()
    def right(self, way: Way, progress: Callable[[int, int], None] | None = None) -> tuple[np.ndarray, list[str]]:
        """(N,) 1 where a reply is the answer, else 0; and the replies. `sizes` is left to tell of the attention."""
        model, replies = self.model(way), []
        with attention_by(way.backend), self._gated(model, way), output_sizes() as self.sizes:
            for start in range(0, len(self.asked), way.n_rows):
                numbers = range(start, min(start + way.n_rows, len(self.asked)))
                inputs = self.inputs(numbers)
                options = {"past_key_values": way.cache()} if way.cache is not None else {}
                ids = model.generate(**inputs, **way.options, **options, max_new_tokens=2, do_sample=False)
                generated = ids[:, inputs["input_ids"].shape[1] :]
                replies += [text.strip() for text in self.processor.batch_decode(generated, skip_special_tokens=True)]
                if progress is not None:
                    progress(len(replies), len(self.asked))
        truth = [one.answer for _, one in self.asked]
        return np.array([reply == answer for reply, answer in zip(replies, truth, strict=True)], dtype=float), replies

    @contextmanager
    def _gated(self, model: Any, way: Way) -> Iterator[None]:
        """`enable`, in which a scan is scored once."""
        if way.config is None:
            yield
            return
        if self._sums is None:
            visual = [self.inputs([int((self.videos == n).argmax())]) for n in range(len(self.scans))]
            names = "pixel_values_videos", "video_grid_thw"
            found = [model.get_video_features(*(one[name] for name in names)) for one in visual]
            self._sums = torch.stack([torch.cat(list(one.pooler_output)).sum(0) for one in found])
        with va.enable(model, way.config) as handle:
            handle.anchor_scores = lambda *args, **kwargs: self._scores(way, *args, **kwargs)
            yield

    def _scores(self, way: Way, tokens: Tensor, config: va.VideoAnchorConfig, **kwargs: Any) -> va.AnchorResult:
        assert self._sums is not None
        scan = int((self._sums - tokens.sum(0)).norm(dim=1).argmin())
        key = (scan, way.truth, config.scorer, config.score)
        if key not in self._known:
            self._known[key] = va.anchor_scores(tokens, config, **kwargs)
            if way.truth:
                shown = torch.from_numpy(self.scans[scan].objects_of_tokens().ravel() > 0)
                self._known[key].scores = shown.float()
        return self._known[key]


@dataclass(frozen=True)
class Row:
    """A way of answering against transformers' own; `kinds` are accuracies, `output_size` the `largest_change` of the
    attention's output against alpha 0, of gates."""

    group: str
    name: str
    seconds: float
    difference: Difference
    low: float
    high: float
    kinds: dict[str, float]
    n_other_replies: int
    output_size: float | None


def accuracy_interval(right: np.ndarray, videos: np.ndarray) -> tuple[float, float]:
    """95%, by bootstrap over scans."""
    found = compare(right, np.zeros(len(right)), videos)
    return found.low, found.high


def measure(asker: Asker, wanted: Sequence[Way]) -> Iterator[Row]:
    """Each way, the first of which the others are compared with; the second is the drop-in without a gate."""
    base: np.ndarray | None = None
    replies: list[str] = []
    ungated: Sizes = {}
    for way in wanted:
        start = time.perf_counter()
        right, said = asker.right(way)
        if base is None:
            base, replies = right, said
        ungated = ungated or asker.sizes
        size = largest_change(asker.sizes, ungated) if way.group == "gate" else None
        known = np.ones(len(right), dtype=bool)
        kinds = {name: float(right[group].mean()) for name, group, _ in groups_of(asker.kinds, known)}
        different = sum(one != other for one, other in zip(said, replies, strict=True))
        difference, seconds = compare(right, base, asker.videos), time.perf_counter() - start
        interval = accuracy_interval(right, asker.videos)
        yield Row(way.group, way.name, seconds, difference, *interval, kinds, different, size)


def points(one: Difference) -> str:
    """With the interval."""
    return f"{100 * one.difference:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def summary(rows: Sequence[Row], asker: Asker) -> str:
    """For people."""
    kinds = [kind for kind in rows[0].kinds if kind in set(asker.kinds)]
    columns: dict[str, Callable[[Row], object]] = {
        "": lambda row: row.group,
        "way": lambda row: row.name,
        "right, %": lambda row: f"{100 * row.kinds[ALL]:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]",
        "difference, points": lambda row: points(row.difference),
        "other replies": lambda row: row.n_other_replies,
        "output": lambda row: "" if row.output_size is None else f"{row.output_size:.2f}",
        **{kind: lambda row, kind=kind: f"{100 * row.kinds[kind]:.0f}" for kind in kinds},
        "s": lambda row: f"{row.seconds:.0f}",
    }
    n_frames = len(asker.scans[0].frames)
    return (
        f"{len(asker.asked)} questions about {len(asker.scans)} held-out scans of {n_frames} frames, fp32; differences "
        "from transformers' own, paired, with 95% intervals by bootstrap over scans; other replies: of how many "
        "questions the reply differs; output: the attention's output with the gate over that without (root mean "
        f"square, of the layer that changes most).\n\n{report.table(rows, columns)}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Differences with their intervals."""
    figure, panel = plt.subplots(figsize=(8, 1 + 0.2 * len(rows)))
    groups = list(dict.fromkeys(row.group for row in rows))
    for place, row in enumerate(reversed(rows)):
        one, colour = row.difference, report.COLOURS[groups.index(row.group) % len(report.COLOURS)]
        panel.plot([100 * one.low, 100 * one.high], [place, place], color=colour, linewidth=1.6)
        panel.plot(100 * one.difference, place, "o", color=colour, markersize=4)
    panel.margins(y=0.01)
    panel.axvline(0, color="#555555", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [f"{row.name}" for row in reversed(rows)], fontsize=7)
    panel.set_xlabel("points, against transformers' own; 95% intervals over scans")
    panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=60)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--travel", type=int)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--only", nargs="+", choices=("paths", "rounded", "gate", "keep"))
    args = parser.parse_args()
    asker = Asker(args.checkpoint, args.scans, args.frames, args.travel)
    first, ungated, *others = ways()
    wanted = [first, ungated, *(way for way in others if args.only is None or way.group in args.only)]
    rows = []
    for row in measure(asker, wanted):
        rows.append(row)
        print(f"{row.seconds:5.1f} s  {100 * row.kinds[ALL]:5.1f}  {row.group} {row.name}", flush=True)
    about = environment(torch.device("cpu"), processor())
    report.write_record(args.out, NAME, about, rows, summary(rows, asker))
    draw(rows, args.out / f"{NAME}.png")
    changed = [row.name for row in rows if row.group == "paths" and row.n_other_replies]
    if changed:
        print(f"other replies than transformers' own: {', '.join(changed)}", file=sys.stderr)
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
