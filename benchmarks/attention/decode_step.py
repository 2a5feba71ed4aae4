"""What the gate adds to one decoding step of a whole model: operations, kernel launches, waits for the device, time.

    python benchmarks/attention/decode_step.py --out DIR [--device cpu]

A decoder with random weights (on a GPU of Qwen2.5-7B's shape, on the CPU a tiny one) prefills a prompt and decodes,
once with torch's SDPA, once with videoanchor_triton ungated, once gated. Operations are what PyTorch dispatches in a
step, views left out; our attention is one of them. On the CPU the kernels run in Triton's interpreter and nothing is
timed. The rows are printed and written to DIR/decode_step.csv and DIR/decode_step.json.
"""

import argparse
import csv
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
WAITING = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal")
"""Operations that read a value on the host, and on a GPU wait for it."""
STEPS = 20


class Operations(TorchDispatchMode):
    """Counts the operations dispatched under it, by name; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = function._schema.returns
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        if not view:
            self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """Operations that read a value on the host."""
        return sum(count for name, count in self.count.items() if name.startswith(WAITING))


def operations_of(step: Callable[[], Any]) -> Operations:
    """The operations of one call."""
    with torch.inference_mode(), Operations() as operations:
        step()
    return operations


@contextmanager
def kernels_as_on_a_gpu() -> Iterator[None]:
    """Our kernels, in the interpreter on the CPU, without the checks of values that only the CPU gets."""
    from videoanchor_triton.integrations.transformers import attention
    from videoanchor_triton.kernels import api, validation

    attend = partial(api.anchored_attention, backend="triton")
    with (
        patch.object(attention, "anchored_attention", attend),
        patch.object(validation, "values_are_free", lambda *_: False),
    ):
        yield


def decoder(layers: int, hidden: int, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A multimodal model with a Qwen2 decoder of this shape, its vision tower as small as can be, random weights."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text = {
        "model_type": "qwen2",
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=1000, image_seq_length=4)
    with torch.device(device):
        torch.manual_seed(0)
        model: Any = InternVLForConditionalGeneration(config)
    return model.to(dtype).eval()


@contextmanager
def prepared(model: Any, kind: str, scores: torch.Tensor) -> Iterator[Any]:
    """The model as one of the contenders, and its scores given."""
    import videoanchor_triton as va

    if kind == "sdpa":
        model.set_attn_implementation("sdpa")
        yield
        return
    alpha = 0.0 if kind == "ungated" else 1.5
    with (
        va.enable(model, va.VideoAnchorConfig(alpha_k=alpha, alpha_v=alpha)) as handle,
        handle.use_scores(scores),
    ):
        yield


def prefilled(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Prefills and returns a decoding step; two were taken already."""
    from transformers import DynamicCache

    cache = DynamicCache()
    step = partial(model, ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step()
        step()
    return step


def on_the_gpu(step: Callable[[], Any]) -> dict[str, float]:
    """Kernel launches and waits of a step, and its median time."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        names = Counter(event.name for event in seen.events() or ())
        launches = sum(count for name, count in names.items() if "LaunchKernel" in name)
        # one wait is the synchronisation above
        waits = sum(count for name, count in names.items() if name.startswith("cudaStreamSynchronize"))
        times = []
        for _ in range(STEPS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    return {"launches": launches, "stream_waits": waits, "ms": statistics.median(times)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, help="keys in the cache; default 8192, on the CPU 40")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu, which counts but does not time")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
    if device.type == "cpu":
        import interpreter_fixes

        interpreter_fixes.apply()
    from videoanchor_triton.app.torchvision_compat import make_torchvision_importable

    make_torchvision_importable()
    from benchmarks.helpers.environment import environment, processor

    tokens = options.tokens or (8192 if device.type == "cuda" else 40)
    shape = (28, 3584, 28, 4, torch.bfloat16) if device.type == "cuda" else (4, 64, 4, 2, torch.float32)
    model = decoder(*shape, device=device)
    ids = torch.randint(0, 900, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    scores = torch.rand(1, tokens, generator=torch.Generator().manual_seed(1)).to(device)
    rows = []
    for kind in ("sdpa", "ungated", "gated"):
        with prepared(model, kind, scores):
            step = prefilled(model, ids)
            with kernels_as_on_a_gpu():
                operations = operations_of(step)
            row = {
                "attention": kind if kind == "sdpa" else f"videoanchor_triton, {kind}",
                "layers": shape[0],
                "keys": tokens,
                "operations": operations.count.total(),
                "host_reads": operations.waits,
            }
            rows.append(row | (on_the_gpu(step) if device.type == "cuda" else {}))
        print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "decode_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    content = {**environment(device, processor()), "rows": rows}
    (options.out / "decode_step.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
