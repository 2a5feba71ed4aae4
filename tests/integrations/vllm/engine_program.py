# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""One engine and its answers, in a process of its own: `python engine_program.py CASE.json OUT.json`."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parent))

ENGINE = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "dtype": "float32",
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 2048,
    "block_size": 32,
    "limit_mm_per_prompt": {"video": 2, "image": 2},
    "seed": 0,
    "skip_mm_profiling": True,
    "generation_config": "vllm",
    "attention_backend": "CUSTOM",
    "disable_log_stats": False,
}


def answers(outputs: Any) -> list[dict[str, Any]]:
    rows = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        row = {"prompt": list(output.prompt_token_ids), "tokens": tokens, "logprobs": logprobs}
        rows.append(row | {"text": output.outputs[0].text, "cached": output.num_cached_tokens})
    return rows


def of_model(model: Any) -> dict[str, Any]:
    """What the model says of itself, within the worker."""
    layers = [module for module in model.modules() if type(module).__name__ == "Attention"]
    gates = getattr(model, "step_gates", None)
    pages = [] if gates is None else [list(key) for key in gates._pages]
    summary = model.videoanchor_summary() if hasattr(model, "videoanchor_summary") else {}
    return {
        "class": type(model).__name__,
        "attention": sorted({type(layer.impl).__name__ for layer in layers}),
        "gated": sum(getattr(layer.impl, "gates", None) is not None for layer in layers),
        "pages": pages,
        **summary,
    }


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.insert(0, str(Path(__file__).parents[2]))
        importlib.import_module("interpreter_fixes").apply()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    requests = getattr(importlib.import_module(case["requests"][0]), case["requests"][1])
    if case.get("gate") is not None:
        case["engine"]["additional_config"] = {"videoanchor": case["gate"]}
    llm = LLM(**{**ENGINE, **case["engine"]})
    sampling = SamplingParams(temperature=0, max_tokens=case.get("n", 12), logprobs=1, ignore_eos=True)
    adapter = {"lora_request": LoRARequest("adapter", 1, case["lora"])} if case.get("lora") else {}
    rounds = []
    for _ in range(case.get("rounds", 1)):
        asked = [one.for_vllm() for one in requests.values()]
        rounds.append(answers(llm.generate(asked, sampling, use_tqdm=False, **adapter)))
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    runner = None if core is None else core.model_executor.driver_worker.worker.model_runner
    result = {
        "rounds": [dict(zip(requests, some, strict=True)) for some in rounds],
        "models": llm.apply_model(importlib.import_module("engine_program").of_model),  # by a name that workers find
        "runner": [one.__module__ for one in type(runner).__mro__],
        "metrics": {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")},
        "config_hash": llm.llm_engine.vllm_config.compute_hash(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
