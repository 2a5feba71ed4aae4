"""A model split among two processes by transformers' own tensor parallelism: the tokens of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tensor_parallel_program as program
import tiny_models as tiny
import torch
from dense_eager import GENERATE, generate_dense, merged_scores

TESTS = Path(__file__).parent


def test_two_processes(tmp_path: Path) -> None:
    name = "qwen2_5_vl"
    model = tiny.build(name)
    model.save_pretrained(tmp_path / "model")
    model.set_attn_implementation("sdpa")
    batch = tiny.inputs(name, program.PROMPTS)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores)
    assert GENERATE["do_sample"] is False
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program.__file__]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    finished = subprocess.run(
        [*command, name, str(tmp_path / "model"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["share"] == second["share"] == 32, "each process holds half of the query projection"
    assert (first["calls"], second["calls"]) == (2, 0), "one process scores"
    assert first["scores"] == second["scores"]
    visual = torch.isin(batch["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    for row, received in enumerate(first["scores"]):
        torch.testing.assert_close(torch.tensor(received), scores[row, visual[row]])
    assert first["tokens"] == second["tokens"] == expected.sequences.tolist()
    assert first["error"] == "ArithmeticError: no score"
    assert second["error"].startswith("RuntimeError: the visual tokens could not be scored")
