"""Static caches, whose decoding transformers compiles: by inductor, and under the rules of CUDA graphs.

On a GPU it does so by itself (inductor, mode "reduce-overhead"); here it is told to, on the CPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE as SIX_TOKENS
from dense_eager import TOLERANCE, build, pseudo_scores
from gated_prompts import TWO
from graph_replay import Replays
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import videoanchor_triton as va
from videoanchor_triton.kernels import api

pytestmark = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 has no max_cache_len, and keeps its cache")
GENERATE = {**SIX_TOKENS, "max_new_tokens": 4}
SHORTER = [[3, 4, "V", 5, 6], [7, 8, "V", 9]]
ROOM = {"cache_implementation": "static", "max_cache_len": 64}


def config(alpha_k: float = 1.7, alpha_v: float = 1.3, **options: Any) -> va.VideoAnchorConfig:
    return va.VideoAnchorConfig(alpha_k=alpha_k, alpha_v=alpha_v, **{"scorer": pseudo_scores, **options})


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiling(backend: Any) -> dict[str, Any]:
    """Options of generate() that compile decoding with a static cache."""
    compile_config = CompileConfig(backend=backend, mode=None)  # pyright: ignore[reportArgumentType]
    # generate() compiles on a GPU only, unless told so
    compile_config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    return {**ROOM, "compile_config": compile_config}


def assert_as_uncompiled(model: Any, batch: dict[str, Tensor], compiled: dict[str, Any], **options: Any) -> Tensor:
    """The same tokens and logits as without compilation; returns the logits."""
    expected = model.generate(**batch, **GENERATE, **ROOM, disable_compile=True, **options)
    found = model.generate(**batch, **GENERATE, **compiled, **options)
    assert torch.equal(found.sequences, expected.sequences)
    logits = torch.stack(found.logits)
    torch.testing.assert_close(logits, torch.stack(expected.logits), atol=TOLERANCE, rtol=0)
    return logits


def assert_one_graph_for_all_prompts(model: Any, name: str, compiled: dict[str, Any]) -> None:
    """Decoding is compiled once, without a break; another gate, prompt or `enable` compiles nothing and is heeded."""
    batch = tiny.inputs(name, TWO)
    with va.enable(model, config()):
        first = assert_as_uncompiled(model, batch, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for other in (config(9.5, 4.0), config(scorer=lambda tokens: 1 - pseudo_scores(tokens))):
            with va.enable(model, other):
                logits = assert_as_uncompiled(model, batch, compiled)
            assert (logits[1:] - first[1:]).abs().max() > 1e-2, "the gate of this prompt must show in decoding"
        with va.enable(model, config()):
            assert_as_uncompiled(model, tiny.inputs(name, SHORTER, seed=9), compiled)
            assert torch.equal(assert_as_uncompiled(model, batch, compiled), first)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.timeout(900)  # a busy machine compiles C++ for minutes
@pytest.mark.parametrize(("name", "operator"), [("qwen2_5_vl", "triton"), ("internvl", "sdpa")])
def test_inductor(name: str, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "triton": decoding calls the operator that a GPU gets, in Triton's interpreter."""
    monkeypatch.setattr(api, "choose_backend", lambda _, q, **__: operator if q.shape[2] == 1 else "sdpa")
    assert_one_graph_for_all_prompts(build(name, num_hidden_layers=1), name, compiling("inductor"))


def test_a_step_is_one_graph_that_cuda_can_hold(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    replays = Replays()
    assert_one_graph_for_all_prompts(model, name, compiling(replays.backend))
    assert replays.skipped == []
    gates = [x for x in replays.inputs[0] if x.shape == (2, ROOM["max_cache_len"]) and x.dtype == torch.float32]
    assert len(gates) == 2, "the gates of keys and values are what a step is given, and no constants"
    assert_as_uncompiled(model, tiny.inputs(name, TWO), compiling(replays.backend))  # ungated: another graph
    assert len(replays.graphs) == 2


def test_given_scores_break_no_graph(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    replays = Replays()
    compiled = compiling(replays.backend)
    n = batch["input_ids"].shape[1]
    logits = []
    for seed in (0, 1):
        scores = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
        with va.enable(model, config()) as handle, handle.use_scores(scores):
            logits.append(assert_as_uncompiled(model, batch, compiled))
    assert (logits[0][1:] - logits[1][1:]).abs().max() > 1e-2
    assert len(replays.graphs) == 1
    assert not counters["graph_break"]
    assert replays.skipped == []


def test_what_a_chunk_leaves_on_the_cache_is_not_overwritten() -> None:
    """transformers compiles the chunks of a static cache too. Scores are found outside what is compiled."""
    model, batch = build("qwen2_5_vl", num_hidden_layers=1), tiny.inputs("qwen2_5_vl", TWO)
    traced: list[bool] = []

    def scorer(tokens: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return pseudo_scores(tokens)

    replays = Replays()
    with va.enable(model, config(scorer=scorer)):
        assert_as_uncompiled(model, batch, compiling(replays.backend), prefill_chunk_size=6)
    assert replays.graphs
    assert traced == [False] * 4


def test_a_gate_that_a_step_makes_is_not_overwritten() -> None:
    """A cache is continued by another config, one compiled step at a time."""
    model, batch = build("internvl", num_hidden_layers=1), tiny.inputs("internvl", TWO)
    n = batch["input_ids"].shape[1]
    replays = Replays()

    def steps(run: Any) -> Tensor:
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        with torch.no_grad():
            with va.enable(model, config()):
                model(**batch, past_key_values=cache)
            with va.enable(model, config(9.5, 4.0)):
                out = []
                for i in range(3):
                    replays.overwrite()
                    step = run(
                        input_ids=torch.full((2, 1), 20 + i),
                        attention_mask=mask[:, : n + 1 + i],
                        position_ids=torch.full((2, 1), n + i),
                        past_key_values=cache,
                    )
                    out.append(step.logits.clone())
        return torch.stack(out)

    expected, found = steps(model), steps(torch.compile(model, backend=replays.backend))
    assert replays.graphs
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
