"""generate() with the gate on the emulated card: the CPU's tokens, and no wait of ours beyond those of the prompt."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from dense_eager import GENERATE
from emulated_cuda.budgets import assert_within
from emulated_cuda.device import EmulatedCuda
from gated_prompts import TWO
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.kernels import dispatch

N_TOKENS = 4


def scores_of(tokens: Tensor) -> Tensor:
    """(N, D) -> (N,) in [0, 1], which another order of sums does not change much."""
    x = tokens.float().sum(-1)
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-5)


CONFIG = va.VideoAnchorConfig(alpha_k=4.0, alpha_v=2.0, scorer=scores_of)


class Mode(NamedTuple):
    """A way of generating: its options, whether for one row only, and what its prompt may cost."""

    options: dict[str, Any]
    prompt: str
    one_row: bool = False


MODES = {
    "dynamic": Mode({}, "generate: prompt, two rows"),
    "static": Mode({"cache_implementation": "static", "disable_compile": True}, "generate: prompt, two rows"),
    "chunked": Mode({"prefill_chunk_size": 5}, "generate: prompt in chunks, two rows"),
    "beams": Mode({"num_beams": 2}, "generate: prompt, two rows of two beams"),
    "lookup": Mode({"prompt_lookup_num_tokens": 2}, "generate: prompt, one padded row", one_row=True),
    "assistant": Mode({"assistant_model": None}, "generate: prompt, one padded row", one_row=True),
}


class Backbone(NamedTuple):
    """A tiny model, and another that drafts for it, on the CPU and on the card."""

    name: str
    cpu: tuple[Any, Any]
    card: tuple[Any, Any]


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    models = []
    for seed in (0, 3):
        model = tiny.build(request.param, seed=seed, num_hidden_layers=2)
        model.generation_config.assistant_confidence_threshold = 0.0  # it indexes by a Python list, see device.py
        models.append(model)
    return Backbone(request.param, tuple(models), tuple(copy.deepcopy(model).to("cuda") for model in models))


@pytest.fixture
def on_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch instead of in Triton's interpreter, which is slow."""
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: "the kernels are not the point of this test")


def prompt(name: str, *, one_row: bool) -> dict[str, Tensor]:
    """Two left-padded rows, or one that repeats itself."""
    if not one_row:
        return tiny.inputs(name, TWO)
    batch = tiny.inputs(name, [[3, 4, 5, "V", 3, 4, 5, 3, 4]])
    shape = batch["input_ids"].shape
    return {key: F.pad(x, (1, 0), value=tiny.PAD * (key == "input_ids")) if x.shape == shape else x
            for key, x in batch.items()}  # fmt: skip


@contextmanager
def passes_of(model: Any, after_prompt: Callable[[], None], n_chunks: int) -> Iterator[list[int]]:
    """How many positions each pass of the language model gets; `after_prompt` is called after so many passes."""
    lengths: list[int] = []

    def passed(_module: Any, _args: Any, inputs: dict[str, Any], _output: Any) -> None:
        lengths.append(inputs["inputs_embeds"].shape[1])
        if len(lengths) == n_chunks:
            after_prompt()

    hook = model.base_model.language_model.register_forward_hook(passed, with_kwargs=True)
    yield lengths
    hook.remove()


def generate(models: tuple[Any, Any], batch: dict[str, Tensor], options: dict[str, Any]) -> Any:
    model, assistant = models
    if "assistant_model" in options:
        options = {**options, "assistant_model": assistant}
    return model.generate(**batch, **{**GENERATE, "max_new_tokens": N_TOKENS, **options})


@pytest.mark.usefixtures("on_sdpa")
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_those_of_the_cpu_and_no_step_waits(backbone: Backbone, mode: str, card: EmulatedCuda) -> None:
    options, budget, one_row = MODES[mode]
    batch = prompt(backbone.name, one_row=one_row)
    with va.enable(backbone.cpu[0], CONFIG):
        expected = generate(backbone.cpu, batch, options)
    ungated = generate(backbone.cpu, batch, options)
    assert not torch.equal(expected.logits[0], ungated.logits[0]), "the gate must show"

    def prompt_is_done() -> None:
        assert_within(card, budget)
        card.reset()

    batch = {key: value.to("cuda") for key, value in batch.items()}
    chunks = -(-batch["input_ids"].shape[1] // 5) if mode == "chunked" else 1
    model = backbone.card[0]
    with va.enable(model, CONFIG) as handle, passes_of(model, prompt_is_done, chunks) as lengths:
        card.reset()
        out = generate(backbone.card, batch, options)
    assert_within(card, "generate: decoding step")
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert all(result is not None and result.scores.is_cuda for result in handle.last)
    steps = lengths[chunks:]
    assert (max(steps) > 1) if mode == "assistant" else steps, "a model of its own drafts for each step"
