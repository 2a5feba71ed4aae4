"""What do merged tokens cost, and what do they save?

    python benchmarks/scores/keep_cost.py --out DIR [--quick]

In one process: scores and groups of the same tokens, timed by turns, at several sizes and by each rule; then a prompt
with a video through generate() of a Qwen2.5-VL with random weights (4 layers of 512, 8 heads), by "ward" and whole.

    scoring, grouping    seconds of processor time, of all threads, the median of the repeats; beyond 4,096 tokens each
                         is timed once, and beyond --scored-up-to nothing is scored; share: grouping over scoring
    prefill              seconds of the language model's pass over the prompt; decode: of one over a token, the median
    kv                   bytes of keys and values after the prompt

Writes DIR/keep-cost.csv, .json and .md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.helpers import report
from benchmarks.helpers.environment import environment, processor
from benchmarks.scores.helpers import token_sets
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.grouping import Group, group_tokens
from videoanchor_triton.anchor.scores import anchor_scores

NAME = "keep-cost"
GRIDS = {2048: (16, 8, 16), 8192: (32, 16, 16), 16384: (64, 16, 16), 32768: (64, 16, 32)}
QUICK = {96: (6, 4, 4)}
KEEPS = (1.0, 0.5, 0.25, 0.1)
VIDEO, START, END = 101, 102, 103


@dataclass(frozen=True)
class Row:
    """One measurement; see the top of this file."""

    tokens: int
    keep: float
    group: str
    scoring: float | None = None
    grouping: float | None = None
    share: float | None = None
    prefill: float | None = None
    decode: float | None = None
    kv: int | None = None


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Of the call, and what it returns."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def angles(grid: Tensor) -> Tensor:
    """(n, 128) of Qwen2.5-VL's rotary embedding."""
    axes = torch.tensor([0] * 16 + [1] * 24 + [2] * 24)
    phase = grid[:, axes] * 10000.0 ** -(torch.arange(64) / 64)
    return torch.cat([phase.cos(), phase.sin()], 1)


def grouping_rows(grids: dict[int, tuple[int, int, int]], repeats: int, scored_up_to: int) -> Iterator[Row]:
    """Grouping beside scoring. Left out: k-means beyond 4,096 tokens, subspaces where nothing is scored."""
    for n, shape in grids.items():
        tokens = torch.as_tensor(token_sets.vit_like(n).X).float()
        grid = torch.cartesian_prod(*map(torch.arange, shape))
        config = VideoAnchorConfig(alpha_k=0, alpha_v=0)
        left_out = {"kmeans": n > 4096, "subspace": n > scored_up_to}
        rules: list[Group] = [rule for rule in get_args(Group) if not left_out.get(rule, False)]
        timed: dict[str, list[float]] = {name: [] for name in ("scoring", *rules)}
        for _ in range(repeats if n <= 4096 else 1):
            labels = None
            if n <= scored_up_to:
                spent, result = seconds(partial(anchor_scores, tokens, config))
                timed["scoring"].append(spent)
                labels = result.labels
            for rule in rules:
                call = partial(group_tokens, tokens, n // 4, rule, grid=grid, rotary=angles(grid), labels=labels)
                timed[rule].append(seconds(call)[0])
        scoring = statistics.median(timed["scoring"]) if timed["scoring"] else None
        for rule in rules:
            grouping = statistics.median(timed[rule])
            yield Row(n, 0.25, rule, scoring, grouping, grouping / scoring if scoring else None)


def make_model() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 40000, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 512,
        "window_size": 16, "fullatt_block_indexes": [],
    }  # fmt: skip
    ids: dict[str, Any] = {
        "image_token_id": 100,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)).eval()
    model.set_attn_implementation("sdpa")
    return model


@contextmanager
def passes(module: Any) -> Iterator[list[float]]:
    """The seconds of each pass of a module."""
    times: list[float] = []
    before = module.register_forward_pre_hook(lambda *_: times.append(-time.perf_counter()))
    after = module.register_forward_hook(lambda *_: times.append(times.pop() + time.perf_counter()))
    yield times
    before.remove()
    after.remove()


def generation_rows(grids: dict[int, tuple[int, int, int]], n_new: int) -> Iterator[Row]:
    """A prompt of each size that is not too long for one core, merged and not."""
    import videoanchor_triton as va

    model: Any = make_model()
    for n, (steps, height, width) in grids.items():
        if n > 4096:
            continue
        ids = torch.tensor([[1, 2, START, *[VIDEO] * n, END, 3, 4, 5]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == VIDEO),
            "pixel_values_videos": torch.randn(4 * n, 3 * 2 * 4 * 4),
            "video_grid_thw": torch.tensor([[steps, 2 * height, 2 * width]]),
        }
        for keep in KEEPS:
            config = VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer="uniform", keep=keep)
            with va.enable(model, config), torch.inference_mode():
                model.generate(**inputs, max_new_tokens=2)
                with passes(model.base_model.language_model) as times:
                    out = model.generate(**inputs, max_new_tokens=n_new, return_dict_in_generate=True)
            cache = [part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)]
            kept = cache[0].shape[2] - n_new + 1
            kv = sum(part[:, :, :kept].nbytes for part in cache)
            yield Row(n, keep, "ward", prefill=times[0], decode=statistics.median(times[1:]), kv=kv)


def summary(rows: list[Row]) -> str:
    """Markdown: both tables."""
    costs = {
        "tokens": lambda row: row.tokens,
        "rule": lambda row: row.group,
        "scoring, s": lambda row: row.scoring,
        "grouping to a quarter, s": lambda row: row.grouping,
        "share": lambda row: row.share,
    }
    gains = {
        "tokens": lambda row: row.tokens,
        "keep": lambda row: row.keep,
        "prefill, s": lambda row: row.prefill,
        "decode, s": lambda row: row.decode,
        "KV, bytes": lambda row: row.kv,
    }
    parts = ["# Merged tokens: cost and gain", report.table([row for row in rows if row.grouping is not None], costs)]
    return "\n\n".join([*parts, report.table([row for row in rows if row.prefill is not None], gains)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="96 tokens, to see that everything runs")
    parser.add_argument("--sizes", type=int, nargs="+", choices=GRIDS, default=[2048], help="default: %(default)s")
    parser.add_argument("--scored-up-to", type=int, default=8192, help="tokens; default: %(default)s")
    options = parser.parse_args(arguments)
    grids = QUICK if options.quick else {n: GRIDS[n] for n in options.sizes}
    rows = []
    costs = grouping_rows(grids, 1 if options.quick else 3, options.scored_up_to)
    for row in chain(costs, generation_rows(grids, 4 if options.quick else 16)):
        rows.append(row)
        print(row, flush=True)
    report.write(options.out, NAME, environment(torch.device("cpu"), processor()), rows, summary(rows))
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
