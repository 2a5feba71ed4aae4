# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""A vLLM engine with the plug-in: are its answers right, and what does the gate cost?

`python benchmarks/serving/engine.py --out DIR [--device cuda|cpu] [--graphs]`, where vLLM is installed. On the demo's
tiny Qwen2.5-VL in fp32, greedy answers about images, whose tokens all have one score, are compared with those of
`va.enable`. Then the engine answers the same requests in turns: with the gate; with strengths of 0, which take the same
path; and by the same two calls of this package a layer without gates. A turn is all requests at once, a ratio one of
medians of whole turns.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import videoanchor_triton as va

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {  # read when vLLM is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the turns are told apart in the worker
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ALPHAS: dict[str, Any] = {"alpha_k": 9.5, "alpha_v": 2.5}
SIZES = ((112, 168), (84, 112), (140, 140), (112, 112))
QUESTIONS = ("Which roof is nearer?", "Where is the left one?", "What is near the camera, on the right?")
ALLOWED = 1e-3  # of a logprob in fp32, where TF32 may be on


def prompts(n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]
    start, end = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    asked = [(start + QUESTIONS[i % 3] + end, pictures[i % 4]) for i in range(n)]
    return [{"prompt": text, "multi_modal_data": {"image": picture}} for text, picture in asked]


@torch.no_grad()
def expected(folder: Path, prompt: dict[str, Any], n: int, device: str) -> tuple[list[int], list[float]]:
    """Greedy tokens and logprobs of `va.enable`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, device_map=device)
    model.generation_config.suppress_tokens = None
    model.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[prompt["prompt"]], images=[prompt["multi_modal_data"]["image"]], return_tensors="pt")
    with va.enable(model, va.VideoAnchorConfig(**ALPHAS, scorer="uniform")):
        options: dict[str, Any] = {"max_new_tokens": n, "do_sample": False, "output_logits": True}
        out = model.generate(**inputs.to(device), **options, return_dict_in_generate=True)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = [torch.log_softmax(row[0].double(), -1) for row in out.logits]
    return tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)]


@contextmanager
def without_gates(layers: list[Any]) -> Iterator[None]:
    """The same calls of this package, over a cache without gates."""
    from videoanchor_triton.integrations.vllm.gated_attention import GatedAttention

    before = [(layer.impl, type(layer.impl), layer.impl.gates) for layer in layers]
    for impl, kind, _ in before:

        class Ungated(kind):
            def do_kv_cache_update(self, *arguments: Any) -> None:
                GatedAttention.write(self, *arguments)

            def forward(self, layer: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:  # noqa: ARG002
                cache, metadata, output = (*rest, *more.values())[:3]
                return GatedAttention.attend(self, layer, query, cache, metadata, output, (None, None))

        impl.gates, impl.__class__ = None, Ungated
    try:
        yield
    finally:
        for impl, kind, gates in before:
            impl.gates, impl.__class__ = gates, kind


@contextmanager
def strengths_of_0(gates: Any) -> Iterator[None]:
    settings, gates.config = gates.config, replace(gates.config, alpha_k=0.0, alpha_v=0.0)
    try:
        yield
    finally:
        gates.config = settings


def run(device: str, graphs: bool, turns: int, requests: int, length: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from videoanchor_triton.app.demo import make_checkpoint

    folder = Path(tempfile.mkdtemp(), "tiny")
    make_checkpoint(folder)
    cache = (
        {"kv_cache_memory_bytes": 64 << 20, "block_size": 32} if device == "cpu" else {"gpu_memory_utilization": 0.3}
    )
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=not graphs,
        max_model_len=1024,
        enable_prefix_caching=False,
        generation_config="vllm",
        limit_mm_per_prompt={"image": 1, "video": 0},
        attention_backend="CUSTOM",
        additional_config={"videoanchor": {**ALPHAS, "scorer": "uniform"}},
        seed=0,
        **cache,
    )
    asked = prompts(requests)
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=1)
    worst, equal = 0.0, 0
    outputs = llm.generate(asked, sampling, use_tqdm=False)
    checked = range(min(4, requests))
    for i in checked:
        tokens, logprobs = expected(folder, asked[i], length, device)
        got = list(outputs[i].outputs[0].token_ids)
        equal += got == tokens
        found = [row[token].logprob for row, token in zip(outputs[i].outputs[0].logprobs, got, strict=True)]
        worst = max([worst, *(abs(a - b) for a, b in zip(found, logprobs, strict=True))])
    result: dict[str, Any] = {"equal": equal, "compared": len(checked), "error": worst, "allowed": ALLOWED}
    if equal < len(checked) or worst > ALLOWED or graphs:  # a graph holds its calls: there is no other path to swap in
        return result
    core: Any = llm.llm_engine.engine_core
    model = core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    kinds: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "gated": nullcontext,
        "strengths of 0": lambda: strengths_of_0(model.step_gates),
        "no gates": lambda: without_gates(model._layers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    for turn in range(turns + 1):
        for name, kind in kinds.items():
            with kind():
                start = time.perf_counter()
                llm.generate(asked, sampling, use_tqdm=False)
                spent = time.perf_counter() - start
            if turn:  # the first of each is for warming up
                seconds[name].append(spent)
            print(f"{name}: {spent:.3f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rates = {name: requests * length / one for name, one in medians.items()}
    ratios = {f"gated over {name}": medians["gated"] / one for name, one in medians.items() if name != "gated"}
    return {**result, "seconds": seconds, "tokens per second": rates, "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for engine.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, compared and not timed")
    parser.add_argument("--turns", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--length", type=int, default=24, help="tokens of an answer")
    options = parser.parse_args()
    os.environ.update(SETTINGS)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks.helpers.environment import environment

    result = run(options.device, options.graphs, options.turns, options.requests, options.length)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "environment": environment(torch.device(options.device), platform.processor() or platform.machine()),
        "requests": options.requests,
    }
    text = json.dumps({**about, "length": options.length, "graphs": options.graphs, **result}, indent=1)
    (options.out / "engine.json").write_text(text + "\n")
    print(text)
    return 0 if result["equal"] == result["compared"] and result["error"] <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
