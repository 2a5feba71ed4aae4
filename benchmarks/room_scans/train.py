"""Trains the tiny model that answers about room scans, from nothing.

    python benchmarks/room_scans/train.py --out DIR [--seed 0] [--steps 5000] [--without-object-heads] [--hints SHARE]
        [--dtype bfloat16]

On the CPU in bf16, with masters in fp32; 20 minutes on two cores that know bf16. On others --dtype float32 is faster
by far. Writes DIR/checkpoint (what the package ships), DIR/half (the first that answers 65% of the validation
questions), DIR/training.json (settings, the accuracy by kind along the way). The same seed, precision and number of
threads give the same weights.

What makes so small a model learn this so fast: weights of the size its width wants; Muon for the matrices of its
layers and AdamW for the rest; and heads that are thrown away, which say of each visual token which object it shows and
in which eighth of the scene it lies (from the tower's output), whether it shows an object for the first time, how many
were seen until its frame, and again the eighth (from the last but one layer of the decoder). The tower learns the
objects alone in the first steps. --without-object-heads leaves out the first of them and those steps, so that nothing
asks the tower to tell objects apart but the questions.

With --hints each question ends in "Please answer X", where X is right in this share of the training: a model that
learns to trust words, for `when_gates_help.py`. It is trained on 8 frames alone.
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.room_scans.packed import Layout, patches, see
from benchmarks.room_scans.tiny_model import make_model, make_tokenizer, save
from videoanchor_triton.app.room_scans import ANSWERS, QUESTIONS, Asked, RoomScan

VALIDATION_SEED, TOWER_SEED, SEEDS = 10**9, 5 * 10**8, 10**7
KINDS = tuple(QUESTIONS)
RATE, TOWER_STEPS, EVERY = 2e-3, 350, 200
AUXILIARY = 0.3
CLASSES = torch.tensor([0.2] + [1.0] * 16)
"""Weights of no object and of each kind of object."""


class Part(NamedTuple):
    """Of the training: what its batches are, and how often they come once all parts do."""

    share: float
    n_frames: int
    n_scans: int
    kinds: Sequence[str] = KINDS
    worded: bool = False


PARTS = (
    Part(0.5, 8, 16),
    Part(0.06, 8, 12, KINDS[::2], worded=True),
    Part(0.06, 8, 12, KINDS[1::2], worded=True),
    Part(0.1, 12, 12),
    Part(0.15, 16, 8),
    Part(0.13, 1, 32),
)
HINT_WORDS = 3
ALONE = 0.3
"""Share of the steps in which only the first part is trained on."""


def hinted(asked: Sequence[Asked], share: float, rng: np.random.Generator) -> list[Asked]:
    """Questions that name an answer, the right one with this probability, else another of their kind."""
    found = []
    for one in asked:
        others = [answer for answer in ANSWERS[one.kind] if answer != one.answer]
        hint = one.answer if rng.random() < share else str(rng.choice(others))
        found.append(one._replace(text=f"{one.text} Please answer {hint}."))
    return found


class Trainer:
    """A model with its masters in fp32.

    Args:
        args: the command's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.tokenizer = args, make_tokenizer()
        model = make_model(self.tokenizer)
        model.set_attn_implementation({"text_config": "eager"})
        width = model.config.text_config.hidden_size
        sizes = {"object": 17, "first_sight": 2, "so_far": 7, "eighth": 8, "eighth_seen": 8}
        if args.without_object_heads:
            del sizes["object"]
        heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.master: Any = nn.ModuleDict({"model": model, "heads": heads})
        self.work: Any = copy.deepcopy(self.master).to(getattr(torch, args.dtype))
        self.model: Any = self.work["model"]
        self.middle: list[torch.Tensor] = []
        self.model.model.language_model.layers[-2].register_forward_hook(self._keep)
        self.n_more = 0 if args.hints is None else HINT_WORDS
        self.layouts = [
            Layout(self.model, self.tokenizer, part.n_frames, part.kinds, part.worded, self.n_more) for part in PARTS
        ]
        self.pools: list[list[RoomScan]] = [[] for _ in PARTS]
        self.rng, self.next_seed = np.random.default_rng(args.seed), args.seed * SEEDS
        self.validation = [[RoomScan(VALIDATION_SEED + 32 * j + i) for i in range(32)] for j in range(6)]
        self.asked = [[self.questions(scan) for scan in scans] for scans in self.validation]

    def _keep(self, *called: Any) -> None:
        self.middle.append(called[-1])

    def questions(self, scan: RoomScan) -> list[Asked]:
        """With hints, as wanted."""
        asked = scan.questions()
        return asked if self.args.hints is None else hinted(asked, self.args.hints, self.rng)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the layers, AdamW for the rest."""
        of_layers = {
            name: weight.ndim == 2 and ("layers" in name or "blocks" in name)
            for name, weight in self.master.named_parameters()
        }
        split = {
            matrix: [weight for name, weight in self.master.named_parameters() if of_layers[name] == matrix]
            for matrix in (True, False)
        }
        return [
            torch.optim.AdamW(split[False], lr=RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True),
            torch.optim.Muon(split[True], lr=RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        ]

    def step(self, loss: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
        """Gradients go to the masters, these to the working copy."""
        loss.backward()
        for weight, master in zip(self.work.parameters(), self.master.parameters(), strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        # Muon would iterate in bf16 whatever the precision of the weights
        iterated = torch.Tensor.bfloat16 if self.args.dtype == "bfloat16" else torch.Tensor.float
        with mock.patch.object(torch.Tensor, "bfloat16", iterated):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
        self.work.zero_grad()
        self.copy_masters()

    def copy_masters(self) -> None:
        """To the working copy."""
        with torch.no_grad():
            for weight, master in zip(self.work.parameters(), self.master.parameters(), strict=True):
                weight.copy_(master)

    def train_tower(self) -> None:
        """The tower alone: which object does a token show?"""
        optimizer = torch.optim.AdamW(self.master.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
        for step in range(TOWER_STEPS):
            scans = [RoomScan(TOWER_SEED + self.args.seed * SEEDS + 12 * step + i) for i in range(12)]
            frames = torch.from_numpy(np.stack([scan.frames for scan in scans]))
            objects = torch.from_numpy(np.stack([scan.objects_of_tokens() for scan in scans]))
            seen = see(self.model.model.visual, patches(frames).to(getattr(torch, self.args.dtype)))
            loss = F.cross_entropy(self.work["heads"]["object"](seen).flatten(0, 1).float(), objects.flatten(), CLASSES)
            self.step(loss, [optimizer], RATE * min(1, (step + 1) / 50) * (0.3 + 0.7 * _cosine(step / TOWER_STEPS)))

    def scans(self, part: int) -> list[RoomScan]:
        """Half of them new, half seen before and asked anew, once there are some."""
        pool, n = self.pools[part], PARTS[part].n_scans
        n_new = n if len(pool) < 512 else n // 2
        new = [RoomScan(self.next_seed + i, PARTS[part].n_frames) for i in range(n_new)]
        self.next_seed += n_new
        old = [pool[i] for i in self.rng.integers(len(pool), size=n - n_new)] if n_new < n else []
        self.pools[part] = (pool + new)[-4096:]
        return new + old

    def loss(self, part: int) -> tuple[torch.Tensor, float]:
        """Of a batch: with the heads; and of the answers alone."""
        layout, scans = self.layouts[part], self.scans(part)
        batch = layout.batch(scans, [self.questions(scan) for scan in scans])
        seen = layout.see(batch.frames)
        self.middle.clear()
        hidden = layout.hidden(seen, batch.ids, later=bool(self.rng.random() < 0.5))
        answers = _mean_loss(layout.logits(hidden, batch.place), batch.answers)
        end = torch.where(batch.answers >= 0, self.tokenizer.eos_token_id, -100)
        total = answers + 0.1 * _mean_loss(layout.logits(hidden, batch.place + 1), end)
        middle = self.middle[0][:, layout.first : layout.first + layout.n_visual]
        truths = {"eighth": [scan.eighths() for scan in scans]}
        truths["eighth_seen"] = truths["eighth"]
        first, so_far = zip(*[scan.first_sights() for scan in scans], strict=True)
        truths["first_sight"] = list(first)
        truths["so_far"] = [
            np.broadcast_to(count[:, None, None], new.shape) for count, new in zip(so_far, first, strict=True)
        ]
        truths["object"] = [scan.objects_of_tokens() for scan in scans]
        for name, head in self.work["heads"].items():
            guess = head(seen if name in ("object", "eighth_seen") else middle).flatten(0, 1).float()
            weight = {"object": CLASSES, "first_sight": CLASSES[:2]}.get(name)
            total = total + AUXILIARY * F.cross_entropy(
                guess, torch.from_numpy(np.stack(truths[name])).flatten(), weight
            )
        return total, answers.item()

    def accuracy(self) -> dict[str, float]:
        """By kind of question, and of all, on the validation scans."""
        pairs = zip(self.validation, self.asked, strict=True)
        right = torch.cat([self.layouts[0].right(self.layouts[0].batch(*pair)) for pair in pairs])
        self.middle.clear()
        by_kind = dict(zip(KINDS, right.nanmean(0).tolist(), strict=True))
        return {"all": right.nanmean().item(), **by_kind}

    def save(self, name: str) -> None:
        """The checkpoint as it is now."""
        model = copy.deepcopy(self.model)
        model.model.language_model.layers[-2]._forward_hooks.clear()
        save(model, self.tokenizer, self.args.out / name)


def _mean_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())


def _cosine(share: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * share)


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--without-object-heads", action="store_true")
    parser.add_argument("--hints", type=float)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, trainer = time.time(), Trainer(args)
    if not args.without_object_heads:
        trainer.train_tower()
    optimizers, curve, mean, half = trainer.optimizers(), [], 0.0, False
    shares = np.array([part.share for part in PARTS])
    for step in range(args.steps):
        alone = step < ALONE * args.steps or args.hints is not None
        part = 0 if alone else int(trainer.rng.choice(len(PARTS), p=shares / shares.sum()))
        loss, of_answers = trainer.loss(part)
        trainer.step(loss, optimizers, RATE * min(1, (step + 1) / 100) * (0.02 + 0.98 * _cosine(step / args.steps)))
        mean += (of_answers - mean) / min(step + 1, 100)
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            now = {"seconds": round(time.time() - start), "step": step + 1, "loss": round(mean, 3)}
            curve.append({**now, **{kind: round(share, 3) for kind, share in trainer.accuracy().items()}})
            print(json.dumps(curve[-1]), flush=True)
            if not half and curve[-1]["all"] >= 0.65:
                half = True
                trainer.save("half")
    trainer.save("checkpoint")
    weights = (args.out / "checkpoint" / "model.safetensors").read_bytes()
    about = {
        **{name: value for name, value in vars(args).items() if name != "out"},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sha256": hashlib.sha256(weights).hexdigest(),
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
