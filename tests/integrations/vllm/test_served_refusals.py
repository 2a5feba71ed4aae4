"""What would run ungated or wrongly ends before anything is loaded, with a sentence that says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_media import GATED
from vllm_runs import environment, run_engine

pytestmark = pytest.mark.timeout(600)

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "another attention": ({"attention_backend": "TRITON_ATTN"}, "--attention-backend CUSTOM"),
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "pruned videos": ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
    "KV transfer": ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV transfer"),
    "KV offloading": ({"kv_offloading_size": 1.0}, "KV offloading"),
    "speculation": ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    "encoder graphs": ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
    "embeddings": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "e5m2": ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
    "pooling": ({"runner": "pooling"}, "pooling"),
    "unknown field": ({"gate": {"alpha": 1.0}}, "unexpected keyword argument 'alpha'"),
    "no strength": ({"gate": {"alpha_k": 1.0}}, "alpha_v"),
    "no dict": ({"gate": 3}, "additional_config['videoanchor']"),
    "empty": ({"gate": {}}, "alpha_k"),
    "unknown preset": ({"gate": {"preset": "qwen"}}, "nothing|no values are published"),
    "unknown scorer": ({"gate": {**GATED, "scorer": "nowhere:by_norm"}}, "No module named 'nowhere'"),
    "prompt only": ({"gate": {**GATED, "decode": "prefill"}}, 'decode="prefill" cannot be served'),
    "frames": ({"gate": {"alpha_k": 1.0, "alpha_v": 1.0, "score": "cross_frame"}}, "cross_frame"),
}
PROGRAM = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
cases = json.loads(sys.stdin.read())
for name, options in cases.items():
    gate = options.pop("gate", {gated})
    try:
        given = {{"videoanchor": gate}} if gate is not None else {{}}
        config = EngineArgs(max_model_len=512, additional_config=given, **options).create_engine_config()
    except Exception as error:
        print("SAID", json.dumps([name, f"{{type(error).__name__}}: {{error}}"]))
    else:
        print("SAID", json.dumps([name, "nothing " + config.compute_hash()]))
"""


@pytest.fixture(scope="module")
def said(qwen: Path) -> dict[str, str]:
    """What vLLM says to each configuration, in one process."""
    cases = {
        name: {"model": str(qwen), "attention_backend": "CUSTOM", **options} for name, (options, _) in REFUSALS.items()
    }
    cases["all is well"] = {"model": str(qwen), "attention_backend": "CUSTOM"}
    cases["preset"] = {**cases["all is well"], "gate": {"preset": "internvl2-8b", "alpha_v": 1.0}}
    cases["other alphas"] = {**cases["all is well"], "gate": {**GATED, "alpha_k": 9.0}}
    cases["no gate"] = {**cases["all is well"], "gate": None}
    cases["no gate, other attention"] = {"model": str(qwen), "gate": None, "pipeline_parallel_size": 2}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(gated=GATED)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=500,
    )
    lines = [line.removeprefix("SAID ") for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert len(lines) == len(cases), done.stderr[-3000:]
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(said: dict[str, str], name: str) -> None:
    assert "videoanchor: " in said[name]
    assert any(part in said[name] for part in REFUSALS[name][1].split("|")), said[name]


def test_what_fits_is_taken(said: dict[str, str]) -> None:
    taken = [said[name] for name in ("all is well", "preset", "other alphas", "no gate", "no gate, other attention")]
    assert all(one.startswith("nothing ") for one in taken), taken


def test_other_alphas_are_another_configuration(said: dict[str, str]) -> None:
    """What vLLM keys caches by."""
    assert len({said[name] for name in ("all is well", "preset", "other alphas", "no gate")}) == 4


def test_no_gated_class(tmp_path: Path) -> None:
    """A checkpoint of text alone."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    hf.Qwen2Config(**sizes, vocab_size=64, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    out = run_engine(tmp_path, tmp_path, "TEXT", check=False, skip_tokenizer_init=True)
    assert "videoanchor: Qwen2ForCausalLM has no gated class; serve one of" in out["failed"]


def test_a_plug_in_that_is_left_out(qwen: Path, tmp_path: Path) -> None:
    """VLLM_PLUGINS without it. On CUDA the attention CUSTOM is unknown then; on a CPU vLLM takes its own, so that who
    needs a gate there has to look: `videoanchor_summary` is not there. The engine of the app does look."""
    out = run_engine(tmp_path, qwen, "TEXT", env={"VLLM_PLUGINS": "none"}, n=1)
    assert out["models"][0]["gated"] == 0
    assert "scored" not in out["models"][0]


def test_the_entry_point_imports_nothing_heavy() -> None:
    """vLLM only logs what goes wrong in its import."""
    program = (
        "import sys, videoanchor_triton.integrations.vllm.plugin as p; print({'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "set()"
