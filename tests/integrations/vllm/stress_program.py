# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Many requests of mixed lengths through one small engine, some of them given up, in a process of its own:
`python stress_program.py CHECKPOINT N OUT.json`. OUT gets what was answered, and what the engine holds at the end."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import engine_program  # which settles how vLLM starts
from vllm_media import GATED, QWEN


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    checkpoint, n, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"num_gpu_blocks_override": 20, "max_model_len": 256, "max_num_batched_tokens": 128}
    options["additional_config"] = {"videoanchor": GATED}
    llm = LLM(**{**engine_program.ENGINE, "model": checkpoint, **options})
    engine: Any = llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    rng = random.Random(0)
    waiting = [(str(i), rng.choice(list(QWEN)), rng.randint(1, 24), rng.random() < 0.1) for i in range(n)]
    running: dict[str, tuple[str, int, bool]] = {}
    answered, given_up, wrong_length, memory = {name: set() for name in QWEN}, 0, 0, []
    while waiting or running:
        while waiting and len(running) < 16:
            key, name, length, leaves = waiting.pop()
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            engine.add_request(key, QWEN[name].for_vllm(), sampling)
            running[key] = name, length, leaves
        for output in engine.step():
            name, length, leaves = running.get(output.request_id, ("", 0, False))
            tokens = output.outputs[0].token_ids
            if not name:
                continue
            if leaves and not output.finished and len(tokens) > length // 2:
                engine.abort_request([output.request_id])
                del running[output.request_id]
                given_up += 1
            elif output.finished:
                del running[output.request_id]
                wrong_length += len(tokens) != length
                answered[name].add(tuple(tokens))
                if sum(map(len, answered.values())) and len(waiting) % 100 == 0:
                    memory.append(resident())
    while engine.has_unfinished_requests():
        engine.step()
    llm.reset_prefix_cache()
    result = {
        "answered": {name: [list(tokens) for tokens in some] for name, some in answered.items()},
        "given_up": given_up,
        "wrong_length": wrong_length,
        "memory": memory,
        "blocks": [free, pool.get_num_free_blocks()],
        "prompts": {},
        "metrics": {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")},
        "scored": llm.apply_model(engine_program.of_model)[0]["scored"],
    }
    greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for name, request in QWEN.items():
        result["prompts"][name] = list(llm.generate([request.for_vllm()], greedy, use_tqdm=False)[0].prompt_token_ids)
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
