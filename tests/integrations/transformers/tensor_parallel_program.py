"""What each process of test_tensor_parallel.py runs: `torchrun tensor_parallel_program.py BACKBONE CHECKPOINT OUT`."""

import json
import sys
from pathlib import Path
from typing import Any

import dense_eager
import tiny_models as tiny
import torch
import torch.distributed as dist

import videoanchor_triton as va

PROMPTS = [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]]


def config(scorer: Any) -> va.VideoAnchorConfig:
    return va.VideoAnchorConfig(alpha_k=dense_eager.ALPHA_K, alpha_v=dense_eager.ALPHA_V, scorer=scorer)


def main(name: str, checkpoint: str, out: Path) -> None:
    torch.set_num_threads(1)
    model = type(tiny.build(name)).from_pretrained(
        checkpoint, tp_plan="auto", dtype=torch.float32, attn_implementation={"text_config": "videoanchor_triton"}
    )
    batch = tiny.inputs(name, PROMPTS)
    rank = dist.get_rank()
    calls = 0

    def differing(tokens: torch.Tensor) -> torch.Tensor:
        """Scores that would differ between the processes if each scored by itself."""
        nonlocal calls
        calls += 1
        return dense_eager.pseudo_scores(tokens) if rank == 0 else torch.rand(len(tokens))

    def failing(_tokens: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no score")

    with va.enable(model, config(differing)) as handle:
        generated = model.generate(**batch, **dense_eager.GENERATE)
        scores = [result.scores.tolist() for result in handle.last if result is not None]
    error = None
    with va.enable(model, config(failing)):
        try:
            model.generate(**batch, **dense_eager.GENERATE)
        except (ArithmeticError, RuntimeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    query = model.base_model.language_model.layers[0].self_attn.q_proj.weight
    report = {
        "tokens": generated.sequences.tolist(),
        "scores": scores,
        "calls": calls,
        "error": error,
        "share": (query.to_local() if hasattr(query, "to_local") else query).shape[0],
    }
    (out / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
